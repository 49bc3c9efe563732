"""The mask tables: how decisions expand to the sides of linears, and what is refused."""

from dataclasses import replace

import pytest
import torch
from tiny_spaces import HEAD_DIM, INNER, config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GemmaConfig, GPT2Config

from atp.ground.errors import InputError
from atp.spaces import EXPERT_SPACES, space_names
from atp.spaces.space import Cut, MaskSpace, UnsupportedModel


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", [name for name in space_names() if name not in EXPERT_SPACES])
def test_no_gradient_of_a_soft_mask_takes_an_index(name, batch):
    """CUDA would sort each index to sum by it. Values and gradients are those of indexing."""
    space = MaskSpace.from_config(config(), name)
    mask = torch.rand(*batch, space.size, dtype=torch.float64, requires_grad=True)
    for structure in space.structures:
        with Recorded() as recorded:
            sides = list(structure.sides(mask))
            weights = [torch.rand_like(side) for _, side in sides]
            total = sum((weight * side).sum() for weight, (_, side) in zip(weights, sides, strict=True))
            (grad,) = torch.autograd.grad(total, mask)
        assert not [operator for operator in recorded.names if "index" in operator]
        indexed = [mask[..., structure.span][..., cut.owner] for cut in structure.cuts]
        expected = sum((weight * side).sum() for weight, side in zip(weights, indexed, strict=True))
        torch.testing.assert_close(grad, torch.autograd.grad(expected, mask)[0])
        shared = {}
        for (cut, side), by_index in zip(sides, indexed, strict=True):
            assert torch.equal(side, by_index) and side.is_contiguous()
            assert shared.setdefault(id(cut.owner), side) is side
            assert side.data_ptr() != mask[..., structure.span].data_ptr(), "a view would follow the mask"


ORDERS = "012 11, 000 31, 0101 12, 00110011 22, 10 no, 011 no, 010 no, 001110 no, 001 no"


@pytest.mark.parametrize(("decisions", "found"), [order.split() for order in ORDERS.split(", ")])
def test_any_order_of_decisions_expands_as_its_index_does(decisions, found):
    owner, repeats = [int(digit) for digit in decisions], None if found == "no" else (int(found[0]), int(found[1]))
    cut = Cut("mlp.gate_proj", 1, torch.tensor(owner))
    values = torch.rand(2, max(owner) + 1)
    assert cut.repeats == repeats and torch.equal(cut.expand(values), values[:, owner])
    moved = replace(cut, owner=cut.owner.to("meta"))
    assert moved.repeats == repeats, "found on the host and kept"


def test_head_dim_is_derived_where_the_config_gives_none_and_an_unknown_space_refused():
    space = MaskSpace.from_config(config("mistral", head_dim=None, hidden_size=16))
    assert [s.size for s in space.layer(0)] == [2, 4, INNER]
    with pytest.raises(UnsupportedModel, match="unknown mask space 'heads': use one of disp, experts, expert_channels"):
        MaskSpace.from_config(config(), "heads")


def test_descriptions_and_indices_round_trip():
    space = MaskSpace.from_config(config())
    mask = torch.rand(space.size, generator=torch.Generator().manual_seed(0)) < 0.6
    layers = space.kept_indices(mask)
    assert torch.equal(space.mask_from_indices(layers), mask)
    assert space.describe(mask) == {name: [len(layer[name]) for layer in layers] for name in ("qk", "vo", "mlp")}
    start = space.layer(1)[1].start
    assert layers[1]["vo"] == [i for i in range(HEAD_DIM) if mask[start + i]]


@pytest.mark.parametrize("unsupported", [GPT2Config(), GemmaConfig()], ids=["gpt2", "gemma"])
def test_other_families_are_refused_in_a_sentence(unsupported):
    with pytest.raises(UnsupportedModel, match=f"'{unsupported.model_type}' is not supported: use one of llama, mis"):
        MaskSpace.from_config(unsupported)
    assert issubclass(UnsupportedModel, InputError)
