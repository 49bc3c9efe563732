"""Draw small models and masks, cut, save and load them, and compare with a float64 model whose weights are zeroed.

    python tests/fuzz/fuzz_cuts.py                          cases 0 to 39
    python tests/fuzz/fuzz_cuts.py --cases 250 --seed 3     others
    python tests/fuzz/fuzz_cuts.py --seed 3 --case 17       one case, with its traceback

A case is a function of seed and number. The truth is transformers' own class in float64, with weights zeroed by hand
for each decision (tests/atp/zeroed.py, which does not know the table of the spaces). What holds in each case:

* The model is refused in one sentence, or cut; one that is whole heads and channels may be cut a second time.
* The cut model, saved and loaded again, computes the truth's logits, on texts within and beyond the length from which
  RoPE is scaled, and the truth's tokens with and without a cache.
* What can become a GGUF file, or is refused as one, is said in one sentence.

Exit status 1 when one does not.
"""

from __future__ import annotations

import json
import random

import torch
from fuzz_draws import play
from transformers import AutoConfig, AutoModelForCausalLM
from zeroed import zeroed

from atp.export.gguf import architecture_of
from atp.families import FAMILIES, ExpertFamily
from atp.ground.errors import InputError
from atp.models.load import read_model
from atp.models.stock import save_model
from atp.removal.cut import cut_model
from atp.spaces import space_names
from atp.spaces.space import MaskSpace

WINDOWS = (2, 3, 6, 40)  # with 1 the cache of transformers itself is wrong where a prompt is padded
DENSE = [name for name, family in FAMILIES.items() if not isinstance(family, ExpertFamily)]
TOLERANCE = 2e-4
"""Of the largest logit, in float32, in which weights of bfloat16 are exact."""
ROUNDED, TIMES = 0.03, 8
"""In bfloat16: this share of the largest logit, and so many times what transformers' own class is off in it."""
ODD_ROPE = (
    {"rope_type": "ntk"}, {"factor": 0}, {"factor": "2"}, {"partial_rotary_factor": 0.5}, {"rope_theta": 0},
    {"rope_theta": None}, {"factor": None}, {"short_factor": [1.0]}, {"long_factor": [1.0]}, {"attention_factor": "x"},
    {"original_max_position_embeddings": 0}, {"full_attention": {"rope_type": "default", "rope_theta": 9.0}},
    {"attention_factor": 0.7}, {"factor": 1.0}, {"original_max_position_embeddings": 1}, {"truncate": False},
)  # fmt: skip


def rope(draw, head_dim):
    """rope_parameters of any type."""
    kind = draw.choice(("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"))
    factor, original = draw.choice((1.0, 2.0, 4.0, 7.5)), draw.choice((4, 8, 13, 16))
    factors = lambda most: [round(draw.uniform(1, most), 2) for _ in range(head_dim // 2)]  # noqa: E731
    maybe = lambda **keys: {key: value for key, value in keys.items() if draw.random() < 0.4}  # noqa: E731
    longer = {"factor": factor, "original_max_position_embeddings": original}
    own = {
        "default": {}, "linear": {"factor": factor}, "dynamic": {"factor": factor},
        "yarn": longer | maybe(attention_factor=1.3, beta_fast=draw.choice((2.0, 8.0)), beta_slow=0.3, truncate=False)
        | draw.choice(({}, {"mscale": 0.7, "mscale_all_dim": 0.4})),
        "longrope": longer | {"short_factor": factors(1.5), "long_factor": factors(6)} | maybe(attention_factor=0.8),
        "llama3": longer | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "proportional": {"partial_rotary_factor": draw.choice((0.25, 0.5, 1.0))} | maybe(factor=factor),
    }  # fmt: skip
    return {"rope_type": kind, "rope_theta": draw.choice((50.0, 10000.0, 1e6)), **own[kind]}


def settings(draw, family):
    """Values of a config of this family, some of which may make no model."""
    kv_heads = draw.choice((1, 1, 2, 2, 3, 4, 5))
    heads = kv_heads * draw.choice((1, 1, 2, 3, 4))
    head_dim = draw.choice((2, 4, 6, 8, 8, 12, 16, 20))
    hidden = heads * head_dim if draw.random() < 0.5 else draw.choice((1, 2, 3)) * heads * draw.choice((1, 2, 3, 4))
    layers = draw.choice((1, 2, 2, 3, 4))
    values = {
        "vocab_size": draw.randrange(11, 98), "hidden_size": hidden, "intermediate_size": draw.randrange(1, 49),
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "max_position_embeddings": draw.choice((12, 24, 64)), "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": rope(draw, head_dim),
        "tie_word_embeddings": draw.random() < 0.4, "rms_norm_eps": draw.choice((1e-6, 1e-5)),
        "hidden_act": draw.choice(("silu", "silu", "silu", "gelu_pytorch_tanh", "gelu", "relu")),
    }  # fmt: skip
    if family in ("llama", "granite", "seed_oss", "smollm3", "qwen3"):
        values["attention_bias"] = draw.random() < 0.5
    if family in ("llama", "granite", "seed_oss", "smollm3"):
        values["mlp_bias"] = draw.random() < 0.5
    if family == "seed_oss":
        values |= {"attention_out_bias": draw.random() < 0.5, "residual_dropout": draw.choice((0.0, 0.1))}
    if family == "mistral":
        values["sliding_window"] = draw.choice((None, *WINDOWS))
    if family in ("qwen2", "qwen3", "smollm3") and draw.random() < 0.5:
        values |= {"use_sliding_window": True, "sliding_window": draw.choice(WINDOWS)}
        values |= {} if family == "smollm3" else {"max_window_layers": draw.randrange(layers + 1)}
    if family == "smollm3":
        values["no_rope_layers"] = [draw.choice((0, 1)) for _ in range(layers)]
    if family == "granite":
        values |= {"residual_multiplier": 0.3, "attention_multiplier": 0.4}
        values |= {"embedding_multiplier": 3.0, "logits_scaling": 0.5}
    return values


def mask_of(draw, space):
    """A mask: at random, one decision of each structure alone, all of them, or one that leaves a structure nothing."""
    kind = draw.choice(("random", "random", "random", "one", "all", "mixed", "empty"))
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        own = draw.choice(("random", "one", "all")) if kind == "mixed" else kind
        share = {"all": 1.0, "one": 0.0}.get(own, draw.choice((0.1, 0.5, 0.9)))
        kept = [draw.random() < share for _ in range(structure.size)]
        kept[draw.randrange(structure.size)] = True
        mask[structure.span] = torch.tensor(kept)
    if kind == "empty":
        mask[draw.choice(space.structures).span] = False
    return mask


@torch.no_grad()
def model_folder(draw, folder, values, family, dtype):
    """Writes a model with biases and norms of its own; its config.json may be spoiled afterwards."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if draw.random() < 0.15:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["rope_parameters"] |= draw.choice(ODD_ROPE)
        path.write_text(json.dumps(content))


def run_case(seed, number, folder):
    """What became of it: `cut`, `cut twice`, or `refused: ` and why; raises what no case may raise."""
    draw = random.Random(f"cuts {seed} {number}")
    torch.manual_seed(draw.randrange(2**31))
    family, name = draw.choice(DENSE), draw.choice(space_names())
    dtype, attention = draw.choice((torch.float32, torch.bfloat16)), draw.choice(("sdpa", "sdpa", "eager"))
    values = settings(draw, family)
    try:
        model_folder(draw, folder / "whole", values, family, dtype)
    except Exception as error:  # what transformers itself cannot build
        return f"no model: {type(error).__name__}"
    cuts, kept = 0, None
    try:
        cut = read_model(folder / "whole", dtype)
        for again in range(2 if draw.random() < 0.3 else 1):
            space = MaskSpace.from_config(cut.config, name)
            mask = mask_of(draw, space)
            cut, cuts = cut_model(cut, space, mask), again + 1
            kept = composed(kept, space.kept_indices(mask))
    except InputError as error:
        one_sentence(error)
        if cuts == 0:
            return f"refused: {reason(error)}"
    except ValueError as error:
        one_sentence(error)
        if "would keep none of its" not in str(error):
            raise
        if cuts == 0:
            return "refused: a structure would keep nothing"
    truth = zeroed(read_model(folder / "whole", torch.float32).double(), kept)
    save_model(cut, folder / "cut")
    for model in (read_model(folder / "cut", torch.float32), read_model(folder / "cut", dtype), cut):
        model.set_attn_implementation(attention)
        if model.dtype == torch.float32:
            compare(draw, model, truth)
        else:
            compare_rounded(draw, model, truth, zeroed(read_model(folder / "whole", dtype), kept))
    try:
        architecture_of(cut.config, "the model")
    except InputError as error:
        one_sentence(error)
    return "cut twice" if cuts == 2 else "cut"


def composed(first, second):
    """The decisions of the whole model that two cuts keep, each a dictionary per layer."""
    if first is None:
        return second
    layers = zip(first, second, strict=True)
    return [{n: [before[n][i] for i in positions] for n, positions in after.items()} for before, after in layers]


def one_sentence(error):
    assert "\n" not in str(error) and 10 < len(str(error)) <= 1000, str(error)


def reason(error):
    """The kind of a refusal: its words without names, numbers and values."""
    for kind in (
        "then rotates", "not finite", "cannot be computed", "rope_type in rope_parameters", "one for all layers",
        "does not fit model family", "is cut already", "make it a multiple", "head_dim is", "cannot load the model",
    ):  # fmt: skip
        if kind in str(error):
            return kind
    return str(error)


def texts(draw, model):
    """Short, longer than any original length of RoPE, and short again: some types go by the text before."""
    lengths = (draw.randrange(1, 8), draw.randrange(17, 30), 3)
    return [torch.randint(3, model.config.vocab_size, (2, length)) for length in lengths]


@torch.no_grad()
def compare_rounded(draw, model, truth, stock):
    """Logits of a model in bfloat16, whose sums are rounded like those of transformers' own class."""
    if model.config.hidden_size == 1:
        return  # RMSNorm of one value is its sign, which a rounding may turn
    for ids in texts(draw, model):
        right = truth(ids).logits
        allowed = TIMES * (stock(ids).logits.double() - right).abs().max() + ROUNDED * right.abs().max()
        near(model(ids).logits, right, allowed, f"{len(ids[0])} tokens in bfloat16")


@torch.no_grad()
def compare(draw, model, truth):
    """Logits, and tokens with and without a cache; a tie within rounding ends the latter."""
    drawn = texts(draw, model)
    for ids in drawn:
        right = truth(ids).logits
        near(model(ids).logits, right, TOLERANCE * right.abs().max(), f"{len(ids[0])} tokens")
    prompt, options = drawn[0].clone(), {"max_new_tokens": draw.choice((3, 12)), "do_sample": False}
    shown = torch.ones_like(prompt)
    if (padding := draw.randrange(len(prompt[0]))) and draw.random() < 0.5:
        prompt[1, :padding] = shown[1, :padding] = 0
    options |= {"attention_mask": shown, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    for cache in ({}, {"use_cache": False}):
        found, expected = (one.generate(prompt, **options, **cache) for one in (model, truth))
        for step, (logits, right) in enumerate(zip(found.logits, expected.logits, strict=True)):
            allowed = 4 * TOLERANCE * right.abs().max()
            near(logits, right, allowed, f"token {step} of an answer, {cache or 'with a cache'}")
            if not torch.equal(logits.argmax(-1), right.argmax(-1)):
                top = right.topk(2).values
                assert (top[:, 0] - top[:, 1]).min() <= 2 * allowed, "another token"
                break


def near(found, truth, allowed, what):
    error, most = (found.double() - truth.double()).abs().max(), truth.abs().max()
    assert error <= max(allowed, 1e-6), f"logits of {what} are off by {error:.2e} of {most:.2e}"


if __name__ == "__main__":
    play(__doc__, run_case)
