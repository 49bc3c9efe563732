"""Packing: the windows are the documents, in order, with EOS between them and losses where asked."""

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from atp.data import collate
from atp.data.packing import IGNORE, best_fit, fitted, pack, unpacked
from atp.data.splits import Example
from atp.ground.errors import InputError


def byte_tokenizer(bos=False):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the cat sat on the mat", "yes no maybe"], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def examples(*pairs):
    return [Example(str(index), prompt, completion) for index, (prompt, completion) in enumerate(pairs)]


DATA = examples(("the cat sat on", " the mat"), ("is the mat on the cat", " no"), ("plain text about cats", ""))


def scored(ids, labels):
    return any(label != IGNORE for label in labels[1:])


def plainly(data, tokenizer, length, loss_on, way):
    """(ids, labels, positions) of each sample, and how many documents are longer, by a loop over tokens."""
    documents = []
    for example in data:
        ids = [*tokenizer(example.text).input_ids, tokenizer.eos_token_id]
        unread = int(tokenizer.bos_token_id == ids[0])
        if loss_on == "completion" and example.completion:
            unread = len(tokenizer(example.prompt).input_ids)
        documents.append((ids, [IGNORE] * unread + ids[unread:]))
    longer = sum(len(ids) > length for ids, _ in documents)
    if way == "unpacked":
        return [(ids[-length:], labels[-length:], None) for ids, labels in documents if scored(ids, labels)], longer
    stream = [one for ids, labels in documents for one in zip(ids, labels, range(len(ids)), strict=True)]
    stream += [(tokenizer.eos_token_id, IGNORE, place) for place in range(length - len(stream))]
    found = []
    for begin in range(0, len(stream) // length * length, length):
        ids, labels, places = map(list, zip(*stream[begin : begin + length], strict=True))
        if way == "separate":
            places = [min(place, column) for column, place in enumerate(places)]
            labels = [label if place else IGNORE for label, place in zip(labels, places, strict=True)]
        if scored(ids, labels):
            found.append((ids, labels, places if way == "separate" else None))
    return found, longer


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize(("count", "length"), [(3, 5), (3, 8), (1, 64)])
def test_samples_are_those_of_a_plain_loop(bos, loss_on, count, length):
    tokenizer, data = byte_tokenizer(bos), DATA[:count]
    for way, samples in {
        "joined": pack(data, tokenizer, length, loss_on=loss_on),
        "separate": pack(data, tokenizer, length, loss_on=loss_on, separate=True),
        "unpacked": unpacked(data, tokenizer, length, loss_on=loss_on),
    }.items():
        expected, longer = plainly(data, tokenizer, length, loss_on, way)
        found = [tuple(row[name].tolist() for name in row) for row in samples]
        assert found == [sample[: len(found[0])] for sample in expected], way
        assert len(found[0]) == (3 if way == "separate" else 2) and samples.longer == longer
        if way == "unpacked":
            assert samples.lengths == [len(ids) for ids, _, _ in expected]
        else:
            assert samples.tokens == length * len(expected)


def test_batch_of_windows():
    packed = pack(DATA, byte_tokenizer(), 8)
    batch = collate([packed[0], packed[2]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8) and batch["tokens"] == 16
    assert torch.equal(batch["input_ids"][1], packed.input_ids[2])
    assert batch["scored"].tolist() == [*range(7), *range(8, 15)]
    assert torch.equal(batch["targets"], batch["labels"][:, 1:].flatten())


def test_ragged_batches_are_padded_where_no_loss_is():
    samples = unpacked(DATA, byte_tokenizer(), 100)
    batch = collate([samples[1], samples[0]])
    assert batch["input_ids"].shape == (2, max(samples.lengths[:2])) and batch["tokens"] == sum(samples.lengths[:2])
    short, longest = samples.lengths[0], max(samples.lengths[:2])
    assert short < longest and (batch["labels"][1, short:] == IGNORE).all()
    assert len(batch["targets"]) == sum(samples.lengths[:2]) - 2


def test_examples_without_a_scored_token_are_left_out():
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="no token has a loss"):
        unpacked(examples(("", "")), tokenizer, 8)
    assert len(unpacked([*examples(("", "")), *DATA], tokenizer, 8)) == len(DATA)


def test_refusals():
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="no examples"):
        pack([], tokenizer, 8)
    with pytest.raises(InputError, match="at least 2"):
        pack(DATA, tokenizer, 1)
    with pytest.raises(InputError, match="no token has a loss"):
        # The completion falls into the partial window at the end, which is dropped.
        pack(examples(("the cat sat on the mat" * 4, " no")), tokenizer, 16, loss_on="completion")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        pack(DATA, tokenizer, 8)


def test_best_fit_decreasing_by_hand():
    # 7 opens a bin and leaves 3; 6 opens one and leaves 4; 4 fills that; 3 fills the first; 2 and 2 share a third.
    bins = best_fit(np.array([2, 7, 3, 4, 6, 2]), 10)
    assert bins.tolist() == [2, 0, 0, 1, 1, 2]
    rng = random.Random(3)
    sizes = np.array([rng.randint(1, 50) for _ in range(500)])
    bins = best_fit(sizes, 50)
    held = np.bincount(bins, weights=sizes)
    assert held.max() <= 50 and len(held) <= np.ceil(sizes.sum() / 50) * 1.05


def test_fitted_rows_hold_whole_documents_apart():
    tokenizer = byte_tokenizer(bos=True)
    part = [Example(str(n), "the cat sat on the mat " * (1 + n % 5)) for n in range(11)]
    samples = fitted(part, tokenizer, 60)
    texts = []
    for row in samples:
        ids, positions = row["input_ids"], row["position_ids"]
        assert len(ids) <= 60 and (row["labels"][positions == 0] == -100).all()
        borders = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in zip(borders, borders[1:], strict=False):
            assert positions[begin:end].tolist() == list(range(end - begin))
            texts.append(tokenizer.decode(ids[begin:end], skip_special_tokens=True))
    whole = [e.text for e in part if len(tokenizer(e.text).input_ids) + 1 <= 60]
    assert samples.longer == len(part) - len(whole) and not set(whole) - set(texts)
    assert "".join(sorted("".join(texts))) == "".join(sorted("".join(e.text for e in part)))
