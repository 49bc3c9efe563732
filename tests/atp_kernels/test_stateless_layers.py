"""Layers for Hugging Face `kernels`: pure, and right when a model's own module is their self."""

import inspect
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import atp_kernels

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
