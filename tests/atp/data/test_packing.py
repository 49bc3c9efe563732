"""Packing: the windows are the documents, in order, with EOS between them and losses where asked."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, default_data_collator

from atp.data.packing import IGNORE, pack
from atp.data.splits import Example
from atp.errors import InputError


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


def test_batches_with_the_default_collator():
    packed = pack(DATA, byte_tokenizer(), 8)
    batch = default_data_collator([packed[0], packed[2]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert torch.equal(batch["input_ids"][1], packed.input_ids[2])


def test_refusals():
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="no examples"):
        pack([], tokenizer, 8)
    with pytest.raises(InputError, match="at least 2"):
        pack(DATA, tokenizer, 1)
    with pytest.raises(InputError, match="no token bears a loss"):
        # The completion falls into the partial window at the end, which is dropped.
        pack(examples(("the cat sat on the mat" * 4, " no")), tokenizer, 16, loss_on="completion")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        pack(DATA, tokenizer, 8)
