"""The GGUF file in llama.cpp itself, for who has it installed."""

import pytest
import torch
from llama_cpp import LlamaCpp
from test_gguf import CASES, VOCAB, tiny, tokens, write
from tiny_tokenizers import PRE_TOKENIZERS, TEXTS, byte_level, sentencepiece

pytestmark = pytest.mark.slow


@torch.no_grad()
@pytest.mark.parametrize(("name", "widths"), [case[:2] for case in CASES if case[2]])
def test_llama_cpp_computes_the_models_probabilities(tmp_path, name, widths):
    model = tiny(name, widths)
    write(model, tmp_path / "model.gguf")
    runtime = LlamaCpp(tmp_path / "model.gguf")
    for ids in tokens():
        for length in (1, 7, len(ids)):
            expected = model(ids[None, :length]).logits[0, -1].log_softmax(-1)
            found = runtime.log_probabilities(ids[:length], VOCAB)
            actual = torch.tensor([found[token] for token in range(VOCAB)])
            assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


TOKENIZERS = {
    **{name: lambda name=name: byte_level(name) for name in PRE_TOKENIZERS},
    "bos": lambda: byte_level("llama-bpe", bos=True),
    "sentencepiece": sentencepiece,
    "metaspace": lambda: sentencepiece(metaspace=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_finds_the_same_tokens(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    write(tiny("llama-tied", vocab_size=len(tokenizer)), tmp_path / "model.gguf", tokenizer=tokenizer)
    runtime = LlamaCpp(tmp_path / "model.gguf")
    for text in [*TEXTS, "  two spaces", "a", "\n", "<tool> and <tool>"]:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert runtime.tokenize(text, special=False) == plain, text
        assert runtime.tokenize(text, special=True) == tokenizer(text)["input_ids"], text
