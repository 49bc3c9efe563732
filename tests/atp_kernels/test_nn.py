"""The module over the masked LoRA linear, against stock PEFT and the definition, and the layers for `kernels`."""

import inspect
from types import MethodType

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import atp_kernels
from atp_kernels.linear import definition
from atp_kernels.nn import MaskedLoRALinear

N_OUT, N_IN, OPTIONS = 10, 7, {"r": 3, "alpha": 6}


def layer(dtype=torch.float64, *, bias=True, masks=(), seed=0, **options):
    torch.manual_seed(seed)
    linear = nn.Linear(N_IN, N_OUT, bias=bias, dtype=dtype)
    made = MaskedLoRALinear.from_linear(linear, **OPTIONS, **options)
    nn.init.normal_(made.lora_B)
    for name, size in (("out_mask", N_OUT), ("in_mask", N_IN)):
        if name in masks:
            setattr(made, name, torch.rand(size, dtype=made.lora_B.dtype))
    return made


def defined(made, x):
    return definition.masked_lora_linear(
        x, made.weight, made.lora_A, made.lora_B, scaling=2.0, out_mask=made.out_mask, in_mask=made.in_mask,
        mask_lora=made.mask_lora, bias=made.bias,
    )  # fmt: skip


MASKS = [(), ("out_mask",), ("in_mask",), ("out_mask", "in_mask")]


@pytest.mark.parametrize("mask_lora", [False, True])
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_computes_the_definition_and_merges_into_it(masks, mask_lora, bias):
    made = layer(bias=bias, masks=masks, mask_lora=mask_lora)
    for name in masks:
        getattr(made, name).requires_grad_()
    x = torch.randn(2, 5, N_IN, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in made.parameters() if p.requires_grad), *(getattr(made, name) for name in masks)]
    assert len(wanted) == 3 + len(masks), "weight and bias are frozen"
    y, expected = made(x), defined(made, x)
    assert_close(y, expected)
    upstream = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(z, wanted, upstream) for z in (y, expected)))
    merged = made.merge()
    assert type(merged) is nn.Linear and (merged.in_features, merged.out_features) == (N_IN, N_OUT)
    assert_close(merged(x), expected)
    assert merged.weight.data_ptr() != made.weight.data_ptr()


def test_starts_and_trains_as_stock_peft():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(N_IN, N_OUT))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    stock = peft.get_peft_model(base, config).base_model.model[0]
    torch.manual_seed(3)
    stock.reset_lora_parameters("default", True)
    torch.manual_seed(3)
    ours = MaskedLoRALinear.from_linear(stock.base_layer, **OPTIONS)
    for mine, theirs in ((ours.lora_A, stock.lora_A), (ours.lora_B, stock.lora_B)):
        assert torch.equal(mine, theirs["default"].weight)
    x = torch.randn(4, N_IN)
    results = []
    for module in (ours, stock):
        for _ in range(2):  # the first step moves B, the second one A
            module(x).square().sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.01 * parameter.grad
                        parameter.grad = None
        results.append(module(x))
    assert_close(*results)


def test_dropout_falls_in_training_alone_and_follows_the_generator():
    made = layer(dropout=0.5)
    x = torch.randn(64, N_IN, dtype=torch.float64)
    assert_close(made.eval()(x), defined(made, x))
    made.train()
    torch.manual_seed(1)
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    torch.manual_seed(1)
    first = made(x)
    expected = atp_kernels.masked_lora_linear(
        x, made.weight, made.lora_A, made.lora_B, scaling=2.0, bias=made.bias, dropout=0.5, seed=seed
    )
    assert torch.equal(first, expected) and not torch.equal(first, made(x))


def test_dropout_is_drawn_again_under_checkpointing():
    made = layer(dropout=0.5)
    x = torch.randn(6, N_IN, dtype=torch.float64)
    torch.manual_seed(1)
    plain = torch.autograd.grad(made(x).square().sum(), made.lora_A)
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(made, x, use_reentrant=False)
    assert torch.equal(plain[0], torch.autograd.grad(y.square().sum(), made.lora_A)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_a_16_bit_weight_are_float32(dtype):
    made = layer(dtype, masks=("out_mask",))
    x = torch.randn(5, N_IN, dtype=dtype)
    y = made(x)
    assert made.lora_A.dtype == made.lora_B.dtype == torch.float32 and y.dtype == made.merge().weight.dtype == dtype
    assert_close(made.merge()(x), y, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_state_dict_round_trip(masks):
    made = layer(masks=masks)
    other = layer(masks=("out_mask",), seed=1)
    other.load_state_dict(made.state_dict())
    x = torch.randn(4, N_IN, dtype=torch.float64)
    assert torch.equal(other(x), made(x))
    assert [name for name in ("out_mask", "in_mask") if getattr(other, name) is not None] == list(masks)


def test_shares_the_weight_leaves_the_linear_alone_and_says_what_it_is():
    linear = nn.Linear(N_IN, N_OUT)
    made = MaskedLoRALinear.from_linear(linear, **OPTIONS)
    assert made.weight.data_ptr() == linear.weight.data_ptr() and linear.weight.requires_grad
    made.in_mask = torch.ones(N_IN, dtype=torch.bool)
    assert repr(made) == (
        "MaskedLoRALinear(in_features=7, out_features=10, bias=True, r=3, alpha=6, dropout=0.0, mask_lora=False, "
        "in_mask)"
    )


def test_compiles_whole():
    torch._dynamo.reset()
    made = layer(torch.float32, masks=("out_mask",))
    x = torch.randn(4, N_IN)
    assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"weight": torch.ones(3)}, r"^weight must be a 2-D floating tensor, not torch.float32 of shape \[3\]\.$"),
        ({"weight": torch.ones(2, 3).long()}, "^weight must be a 2-D floating tensor, not torch.int64"),
        ({"bias": torch.ones(3)}, r"^bias is of shape \[3\] on cpu, but the weight needs \[2\] on cpu\.$"),
        ({"bias": torch.ones(2, device="meta")}, r"^bias is of shape \[2\] on meta, but the weight needs"),
    ],
)
def test_what_is_wrong_is_one_clear_sentence(changed, message):
    with pytest.raises(ValueError, match=message):
        MaskedLoRALinear(**{"weight": torch.ones(2, 3), **OPTIONS, **changed})


# Layers without a state of their own, whose self is a model's module

LAYERS = [layer for _, layer in inspect.getmembers(atp_kernels.layers, inspect.isclass) if issubclass(layer, nn.Module)]


def test_layers_are_pure():
    """What `kernelize` refuses: a constructor, and members besides forward and the two marks."""
    assert [layer.__name__ for layer in LAYERS] == ["MaskedLoRALinear", "RMSNorm"]
    for layer in LAYERS:
        assert layer.__init__ is nn.Module.__init__
        assert {name for name, _ in inspect.getmembers(layer)} - set(dir(nn.Module)) == {"can_torch_compile"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_lends_its_forward_to_that_of_transformers(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(24, eps=1e-5).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    theirs = norm(x)
    norm.forward = MethodType(atp_kernels.layers.RMSNorm.forward, norm)
    ours = norm(x)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert ours.dtype == dtype and (ours - exact).abs().max() <= (theirs - exact).abs().max() + 1e-6
    for own, other in zip(*(torch.autograd.grad(y.sum(), (x, norm.weight)) for y in (ours, exact)), strict=True):
        torch.testing.assert_close(
            own.double(), other.double(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2
        )


def test_masked_linear_lends_its_forward_to_any_module_with_its_attributes():
    torch.manual_seed(0)

    class Own(nn.Module):
        scaling, dropout, mask_lora, in_mask = 2.0, 0.5, False, None

        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.lora_A, self.lora_B = (
                nn.Parameter(torch.randn(size)) for size in ((16, 24), (16,), (4, 24), (16, 4))
            )
            self.out_mask = torch.arange(16) % 2 > 0

    module, x = Own().eval(), torch.randn(3, 24)
    module.forward = MethodType(atp_kernels.layers.MaskedLoRALinear.forward, module)
    parts = [part.detach().double() for part in (x, module.weight, module.bias, module.lora_A, module.lora_B)]
    exact = (parts[0] @ parts[1].T + parts[2]) * module.out_mask + 2 * parts[0] @ parts[3].T @ parts[4].T
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-5, atol=1e-4)
    module.train()
    assert not torch.equal(module(x), module(x)), "dropout of the adapter"
