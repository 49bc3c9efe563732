"""Every argument of every public function: one of a wrong kind is refused in one sentence that names it."""

import re

import pytest
import torch
from torch import nn

import atp_kernels
from atp_kernels import GroupPlan, KeptFirst, KeptSlice, Projection, QuantizedWeight

WIDTH = 64
X, WEIGHT, FACTOR = torch.ones(3, WIDTH), torch.ones(WIDTH, WIDTH), torch.ones(2, WIDTH)
MASK = torch.arange(WIDTH) % 2 == 0
FACTORS = [FACTOR, FACTOR.t()]
ONE = Projection(WEIGHT, *FACTORS, 0.5)
SLICE = KeptSlice(WEIGHT, out_mask=MASK)
SLICES = (SLICE, SLICE, KeptSlice(WEIGHT, in_mask=MASK))

LINEAR = {
    "x": X, "weight": WEIGHT, "lora_a": FACTOR, "lora_b": FACTOR.t(), "scaling": 0.5, "out_mask": MASK, "in_mask": MASK,
    "mask_lora": False, "bias": X[0], "lora_input": X, "dropout": 0.0, "seed": None, "backend": "auto",
}  # fmt: skip
GROUPED = {
    "factors": [FACTOR.clone()], "groups": [(1, torch.arange(WIDTH))], "removed": MASK, "eps": 1e-8, "backend": "auto",
}  # fmt: skip
BLOCK = {"x": X, "mask_lora": False, "kept": None, "dropout": 0.0, "backend": "auto"}
HEADS, ANGLES = torch.ones(1, 3, 2, WIDTH), torch.ones(1, 3, WIDTH)
GIVEN = {
    "masked_lora_linear": LINEAR,
    "kept_lora_linear": {
        **{name: LINEAR[name] for name in ("x", "lora_a", "lora_b", "scaling", "lora_input", "dropout", "seed")},
        "kept": SLICE, "backend": "auto",
    },
    "masked_lora_qkv": BLOCK | {"q": ONE, "k": ONE, "v": ONE, "masks": (None, MASK, None), "seed": None},
    "masked_lora_swiglu": BLOCK | {
        "gate": ONE, "up": ONE, "down": ONE, "activation": "silu", "mask": MASK, "seeds": None,
        "mask_grad": None,
    },
    "group_lasso": GROUPED,
    "group_lasso_grad_": GROUPED | {"weight": 1.0},
    "group_prox_": {name: value for name, value in GROUPED.items() if name != "eps"} | {"threshold": 0.1},
    "GroupPlan.of": {name: GROUPED[name] for name in ("factors", "groups")} | {"n_groups": WIDTH},
    "compact": {"weight": WEIGHT, "rows": MASK, "cols": torch.arange(3), "pad_to": 2, "backend": "auto"},
    "lora_dropout": {"x": X, "p": 0.5, "seed": 3, "backend": "auto"},
    "mask_gradient": {"y": X, "sums": torch.zeros(len(X), X.shape[-1]), "backend": "auto"},
    "new_seed": {"x": X},
    "add_rms_norm": {
        "x": X, "output": X, "weight": X[0], "eps": 1e-5, "multiplier": 0.5, "dtype": None, "backend": "auto",
    },
    "rms_norm": {"x": X, "weight": X[0], "eps": 1e-5, "dtype": None, "backend": "auto"},
    "rotary_embedding": {
        "q": HEADS, "k": HEADS, "cos": ANGLES, "sin": ANGLES, "index": torch.arange(WIDTH), "width": WIDTH,
        "backend": "auto",
    },
    "cross_entropy_": {"logits": X.clone(), "targets": torch.arange(3), "backend": "auto"},
    "KeptSlice": {"weight": WEIGHT, "bias": X[0], "out_mask": MASK, "in_mask": MASK, "pad_to": 8, "reuse": None},
    "KeptFirst": {"mask": MASK, "pad_to": 8, "device": None, "reuse": None},
    "QuantizedWeight.nf4": {"weight": WEIGHT},
    "QuantizedWeight.fp8": {"weight": WEIGHT, "per": "row"},
    "QuantizedWeight.int8": {"weight": WEIGHT},
    "nn.MaskedLoRALinear": {
        "weight": WEIGHT, "bias": X[0], "r": 2, "alpha": 4.0, "dropout": 0.0, "mask_lora": False,
    },
    "nn.MaskedLoRALinear.from_linear": {"linear": nn.Linear(3, 2), "r": 2, "alpha": 4.0},
    "available_backends": {"device": "cpu"},
    "explain": {"op": "compact", "backend": "auto", "plain": False},
}  # fmt: skip
WRONG = {
    "nothing": None, "list": [True, False], "text": "abc", "number": 1.5, "flag": True, "object": object(),
    "sparse": WEIGHT.to_sparse(), "nested": torch.nested.nested_tensor([X, X[:1]]), "mask": MASK, "slice": SLICE,
    "without B": ONE._replace(lora_b=None), "scaling as text": ONE._replace(scaling="a"), "slices": SLICES,
}  # fmt: skip
# What the wrong kinds above are right for, and options that `explain` and a constructor take as they come.
FITS = {
    "nothing": "lora_input seed out_mask in_mask bias kept mask mask_grad seeds rows cols index width dtype device "
    "reuse",
    "text": "op device activation per backend",
    "number": "scaling dropout eps weight threshold p alpha multiplier",
    "flag": "mask_lora plain",
    "mask": "x weight lora_a lora_b out_mask in_mask bias lora_input mask removed threshold rows cols q k cos sin "
    "index seed",
    "slice": "kept reuse",
    "slices": "kept",
}


def public(name):
    found = atp_kernels
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_table_holds_every_public_function():
    names = {name.partition(".")[0] for name in GIVEN}
    assert names | {"Projection", "layers", "selftest"} == set(atp_kernels.__all__)


@pytest.mark.parametrize("name", GIVEN)
def test_the_arguments_of_the_table_are_right(name):
    given = GIVEN[name]
    if name == "masked_lora_linear":
        assert set(given) == set(atp_kernels.masked_lora_linear.__wrapped__.__kwdefaults__) | {
            "x", "weight", "lora_a", "lora_b", "scaling"
        }  # fmt: skip
    if name == "QuantizedWeight.nf4":
        pytest.importorskip("bitsandbytes")
    public(name)(**given)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", GIVEN)
def test_a_wrong_kind_is_refused_in_one_sentence(name, kind):
    refused = 0
    for argument in GIVEN[name]:
        fits = FITS.get(kind, "").split()
        if argument in fits or (argument == "alpha" and "from_linear" in name):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            public(name)(**GIVEN[name] | {argument: WRONG[kind]})
        said = str(caught.value)
        assert re.match(rf"{argument}(\.lora_b|\.scaling)? (is|are|has|must be) .*\.$", said), said
        assert "\n" not in said
        refused += 1
    assert refused or set(GIVEN[name]) <= set(fits)


def test_gradients_that_would_be_lost_are_refused():
    learns = torch.tensor(0.5, requires_grad=True)
    linear = {name: value for name, value in LINEAR.items() if name != "scaling"}
    with pytest.raises(TypeError, match=r"scaling is a tensor of shape \[\] that requires a gradient: give a number."):
        atp_kernels.masked_lora_linear(**linear, scaling=learns)
    atp_kernels.masked_lora_linear(**linear, scaling=learns.detach())


@pytest.mark.parametrize("call", [
    lambda x: atp_kernels.lora_dropout(x, 0.5, 3),
    lambda x: atp_kernels.masked_lora_linear(x, x, x, x, scaling=1.0),
    lambda x: atp_kernels.rms_norm(x, x[0], eps=0.0),
    lambda x: atp_kernels.cross_entropy_(x, torch.zeros(len(x), dtype=torch.int64)),
])  # fmt: skip
def test_float8_is_stored_and_not_computed_in(call):
    with pytest.raises(ValueError, match="does not compute in float8_e4m3fn: cast the operands"):
        call(torch.ones(4, 4).to(torch.float8_e4m3fn))


def test_entries_of_a_list_are_looked_at():
    for factors in ([FACTOR, None], [[1.0]], FACTOR, [FACTOR.tolist()]):
        with pytest.raises(TypeError, match=r"^factors is a .*: give a list of tensors\.$"):
            GroupPlan.of(factors, GROUPED["groups"], WIDTH)
    for groups in ([(0,)], [()], [0], [("a", torch.arange(WIDTH))], {}):
        with pytest.raises((TypeError, ValueError), match=r"^groups(\[0\])? (is|must) .*\.$"):
            GroupPlan.of(GROUPED["factors"], groups, WIDTH)
    for masks in ((None, MASK), [MASK] * 4):
        with pytest.raises(ValueError, match="masks has . of three"):
            atp_kernels.masked_lora_qkv(**GIVEN["masked_lora_qkv"] | {"masks": masks})
    with pytest.raises(ValueError, match="kept has 2 of three"):
        atp_kernels.masked_lora_qkv(**GIVEN["masked_lora_qkv"] | {"masks": (None,) * 3, "kept": SLICES[:2]})


def test_masks_without_values_are_refused():
    mask = MASK.to("meta")
    for made in (lambda: KeptFirst(mask), lambda: KeptSlice(WEIGHT.to("meta"), out_mask=mask)):
        with pytest.raises(ValueError, match="mask is on meta, where it has no values to count: make it on the host."):
            made()
    with pytest.raises(ValueError, match="rows is a mask"):
        atp_kernels.compact(WEIGHT.to("meta"), mask)


def test_compact_takes_masks():
    weight = torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH)
    assert torch.equal(atp_kernels.compact(weight, MASK), weight[MASK])
    assert torch.equal(atp_kernels.compact(weight, cols=~MASK, pad_to=5)[:, :32], weight[:, ~MASK])
    assert torch.equal(atp_kernels.compact(weight, MASK, torch.tensor([3, 1])), weight[MASK][:, [3, 1]])
    assert atp_kernels.compact(weight, MASK & ~MASK, MASK, 4).shape == (0, 32)
    assert isinstance(QuantizedWeight.int8(WEIGHT), torch.Tensor)


DIFFERENTIABLE = [name for name in GIVEN if name[0] in "mkglr" and name not in ("group_lasso_grad_", "group_prox_")]
TRANSFORMS = {
    "vmap": lambda call, value: torch.func.vmap(call)(torch.stack([value, value])),
    "grad": lambda call, value: torch.func.grad(lambda values: call(values).sum())(value),
    "jvp": lambda call, value: torch.func.jvp(call, (value,), (torch.ones_like(value),)),
}


def of_first(name):
    """(call of a function by its first operand alone, that operand)."""
    given = GIVEN[name]
    first = (
        "factors" if name.startswith("group") else "q" if name == "rotary_embedding" else "x" if "x" in given else None
    )
    first = first or next(iter(given))

    def call(value):
        result = public(name)(**given | {first: [value] if first == "factors" else value})
        return value if result is None else result[0] if isinstance(result, tuple) else result

    return call, given[first][0].clone() if first == "factors" else given[first].clone()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "group_prox_"])
def test_transforms_of_torch_func_are_refused(name, transform):
    with pytest.raises(
        RuntimeError, match=r"^\w+ takes no part in torch.func \(vmap, grad, jvp\): use autograd, .*\.$"
    ):
        TRANSFORMS[transform](*of_first(name))


def test_what_records_nothing_is_a_constant_to_transforms():
    for name in ("compact", "group_lasso_grad_"):
        assert TRANSFORMS["grad"](*of_first(name)).count_nonzero() == 0
    for name in ("compact", "group_lasso_grad_", "cross_entropy_"):
        assert TRANSFORMS["jvp"](*of_first(name))[1].count_nonzero() == 0
    with pytest.raises(ValueError, match="these require a gradient: detach them first"):
        TRANSFORMS["grad"](*of_first("cross_entropy_"))
    for name in ("cross_entropy_", "group_lasso_grad_"):
        with pytest.raises(RuntimeError, match="takes no part in torch.func"):
            TRANSFORMS["vmap"](*of_first(name))
