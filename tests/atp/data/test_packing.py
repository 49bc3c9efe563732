"""Packing: the windows are the documents, in order, with EOS between them and losses where asked."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from atp.data import collate
from atp.data.packing import IGNORE, pack, unpacked
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


def test_windows_hold_all_documents_in_order():
    tokenizer = byte_tokenizer()
    packed = pack(DATA, tokenizer, 8)
    stream = tokenizer.decode(packed.input_ids.flatten())
    assert "</s>".join(e.text for e in DATA).startswith(stream)
    whole = sum(len(tokenizer(e.text).input_ids) + 1 for e in DATA)
    assert packed.tokens == 8 * (whole // 8) and len(packed) == whole // 8
    assert torch.equal(packed.input_ids, packed.labels)


def test_loss_on_completions_and_their_eos_only():
    tokenizer = byte_tokenizer()
    packed = pack(DATA, tokenizer, 8, loss_on="completion")
    scored = packed.labels[packed.labels != IGNORE]
    assert " the mat</s> no</s>plain text about cats</s>".startswith(tokenizer.decode(scored))
    kept = packed.labels != IGNORE
    assert torch.equal(packed.labels[kept], packed.input_ids[kept])


def test_bos_starts_each_document_and_bears_no_loss():
    tokenizer = byte_tokenizer(bos=True)
    packed = pack(DATA, tokenizer, 6)
    stream = tokenizer.decode(packed.input_ids.flatten())
    assert "".join(f"<s>{e.text}</s>" for e in DATA).startswith(stream)
    is_bos = packed.input_ids == tokenizer.bos_token_id
    assert is_bos.sum() >= 2 and torch.equal(packed.labels == IGNORE, is_bos)


def test_single_short_window_is_padded_without_loss():
    tokenizer = byte_tokenizer()
    packed = pack(DATA[:1], tokenizer, 64)
    length = len(tokenizer(DATA[0].text).input_ids) + 1
    assert packed.input_ids.shape == (1, 64)
    assert (packed.labels[0, length:] == IGNORE).all() and (packed.labels[0, :length] != IGNORE).all()


def test_batch_of_windows():
    packed = pack(DATA, byte_tokenizer(), 8)
    batch = collate([packed[0], packed[2]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8) and batch["tokens"] == 16
    assert torch.equal(batch["input_ids"][1], packed.input_ids[2])
    assert batch["scored"].tolist() == [*range(7), *range(8, 15)]
    assert torch.equal(batch["targets"], batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("bos", [False, True])
def test_separate_windows_start_anew_with_every_document(bos):
    tokenizer = byte_tokenizer(bos)
    joined, packed = pack(DATA, tokenizer, 8), pack(DATA, tokenizer, 8, separate=True)
    assert torch.equal(packed.input_ids, joined.input_ids)
    expected, at = [], 0
    for window in packed.input_ids.tolist():
        for column, _ in enumerate(window):
            previous = window[column - 1] if column else tokenizer.eos_token_id
            at = 0 if column == 0 or previous == tokenizer.eos_token_id else at + 1
            expected.append(at)
    assert packed.position_ids.flatten().tolist() == expected and expected.count(0) > len(packed)
    first = packed.position_ids == 0
    assert (packed.labels[first] == IGNORE).all(), "no loss crosses a border"
    assert torch.equal(packed.labels[~first], joined.labels[~first])
    assert collate([packed[1], packed[0]])["position_ids"].equal(packed.position_ids[[1, 0]])


def test_unpacked_examples_are_whole_or_lose_their_left_end():
    tokenizer = byte_tokenizer()
    whole = [tokenizer(e.text).input_ids + [tokenizer.eos_token_id] for e in DATA]
    samples = unpacked(DATA, tokenizer, 100, loss_on="completion")
    assert [row["input_ids"].tolist() for row in samples] == whole and samples.lengths == [len(ids) for ids in whole]
    answer = samples[1]["labels"]
    assert tokenizer.decode(answer[answer != IGNORE]) == " no</s>"
    short = unpacked(DATA, tokenizer, 5, loss_on="completion")
    assert [row["input_ids"].tolist() for row in short] == [ids[-5:] for ids in whole]


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


def test_documents_longer_than_a_window_are_counted():
    tokenizer = byte_tokenizer()
    lengths = [len(tokenizer(example.text).input_ids) + 1 for example in DATA]
    for length in (max(lengths), max(lengths) - 1, min(lengths) - 1):
        longer = sum(count > length for count in lengths)
        assert pack(DATA, tokenizer, length).longer == unpacked(DATA, tokenizer, length).longer == longer
