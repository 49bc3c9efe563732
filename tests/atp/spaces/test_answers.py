"""Every answer of every space against what a model does: zeroed weights, other orders, hooks, counted parameters."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from zeroed import random_mask, stock_model, tokens, zeroed

from atp.baselines.uniform import uniform_mask
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.decide.rules import width_rules
from atp.families import BLOCKS
from atp.lora.controller import MaskController
from atp.lora.layer import MaskedMLP, MaskedPeftLinear, add_lora
from atp.models.config import CutConfig
from atp.removal.cut import cut_config, cut_model
from atp.spaces import EXPERT_SPACES, space_names, structure_names
from atp.spaces.space import Cut, MaskSpace, Structure

SPACES = [name for name in space_names() if name not in EXPERT_SPACES]  # Llama has none: see families/test_experts.py
BIASES = {"attention_bias": True, "mlp_bias": True}


def decoder_params(model):
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


def wrapped(space_name, *, filled=True, dtype=torch.float64, **overrides):
    """A model in masked LoRA layers with biases; filled: whose adapter adds something."""
    model = stock_model(dtype=torch.float32, **BIASES | overrides)
    space = MaskSpace.from_config(model.config, space_name)
    model = add_lora(model, space, r=3, alpha=6.0, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if filled and "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype), space, MaskController(model.to(dtype), space)


def test_names_are_those_that_are_built():
    built = []
    for name in SPACES:
        layer = MaskSpace.from_config(stock_model().config, name).layer(0)
        built += [structure.name for structure in layer if structure.name not in built]
    assert built == [name for name in structure_names() if name not in EXPERT_SPACES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("space_name", SPACES)
def test_a_soft_mask_of_zeros_and_ones_is_the_zeroed_model(space_name, seed, dtype):
    """Whatever a soft mask must multiply is multiplied: at 0 and 1 the removed weights might as well not be there."""
    model, space, controller = wrapped(space_name, filled=False, dtype=dtype)
    mask = random_mask(space, seed=seed, keep=(0.3, 0.5, 0.7, 0.9)[seed])
    truth = zeroed(stock_model(dtype=torch.float32, **BIASES).to(dtype), space.kept_indices(mask))
    with torch.no_grad(), controller.masks(mask.to(torch.float64), "soft"):
        found, expected = model(tokens()).logits, truth(tokens()).logits
    tolerance = 1e-10 if dtype == torch.float64 else 0.05 * float(expected.abs().max())
    assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("space_name", SPACES)
def test_every_decision_has_a_gradient_under_a_soft_mask(space_name):
    """Finite differences over single decisions; a side that a soft mask forgot would have none."""
    model, space, controller = wrapped(space_name)
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):  # those of transformers are float32 inside
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.RMSNorm(32).double())
    soft = torch.rand(space.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.8 + 0.1

    def loss(mask):
        controller.set(mask, "soft")
        logits = model(tokens()).logits  # transformers takes the loss of float32 logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())

    leaf = soft.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    for structure in space.structures:
        decision, step = structure.start + structure.size // 2, 1e-5
        ends = []
        for sign in (1, -1):
            moved = soft.clone()
            moved[decision] += sign * step
            with torch.no_grad():
                ends.append(loss(moved))
        assert_close(gradient[decision], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    assert (gradient != 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("space_name", SPACES)
def test_kept_first_order_gives_the_same_outputs_and_gradients(space_name, seed, dtype):
    """Slices in their order against the masks themselves in the order of the model; seeds change single structures."""
    model, space, controller = wrapped(space_name, dtype=dtype)
    for mask in (random_mask(space, seed=seed), random_mask(space, seed=seed)):
        moved = space.structures[seed % len(space.structures)]
        mask[moved.span] = random_mask(space, seed=seed + 9)[moved.span]
        found, expected = [], []
        for form, into in (("hard", found), ("base", expected)):
            model.zero_grad()
            with controller.masks(mask, form):
                if form == "base":
                    activate(model, None)
                loss = model(tokens(), labels=tokens()).loss
                loss.backward()
                activate(model, "silu")
            into += [loss.detach(), *(p.grad for n, p in model.named_parameters() if "lora_" in n)]
        for one, other in zip(found, expected, strict=True):
            # The loss is that of float32 logits; activations in another order would be off by more than their norm.
            tolerance = 1e-5 if dtype == torch.float64 else 0.5
            assert (one - other).norm() <= tolerance * other.norm()


def activate(model, activation):
    """None: apart from the products, so that hooks see the linears of the MLP."""
    for mlp in (m for m in model.modules() if isinstance(m, MaskedMLP)):
        mlp.activation = activation


@pytest.mark.parametrize("space_name", SPACES)
def test_one_structure_may_change_without_the_others(space_name):
    model, space, controller = wrapped(space_name)
    mask = random_mask(space)
    controller.set(mask, "hard")
    for structure in space.layer(1):
        mask = mask.clone()
        mask[structure.span] = random_mask(space, seed=20 + structure.start)[structure.span]
        with torch.no_grad():
            controller.set(mask, "hard")
            found = model(tokens()).logits
            controller.set(mask, "base")
            assert_close(found, model(tokens()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("space_name", SPACES)
def test_the_reader_ends_its_block_and_reads_nothing_else_of_its_structure(space_name):
    """What refit relies on: the block returns what the reader returns, and removed inputs tell nothing of kept ones."""
    model, space, controller = wrapped(space_name)
    activate(model, None)
    mask = random_mask(space)
    layer = model.get_base_model().model.layers[1]
    for block, *_ in BLOCKS:
        structure = space.read_by(1, block)
        if structure is None:
            continue
        reader, outputs, inputs = layer.get_submodule(structure.reader), [], []
        hooks = [
            reader.register_forward_hook(lambda m, args, out, to=inputs: to.append((args[0], out))),
            layer.get_submodule(block).register_forward_hook(
                lambda m, args, out, to=outputs: to.append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
        opened = mask.clone()
        opened[structure.span] = True
        with torch.no_grad():
            for each in (opened, mask):
                with controller.masks(each, "sum"):
                    model(tokens())
        for hook in hooks:
            hook.remove()
        for (_, out), whole in zip(inputs, outputs, strict=True):
            assert torch.equal(out, whole)
        kept = structure.kept_inputs(mask)
        (open_input, _), (masked_input, _) = inputs
        assert_close(masked_input[..., kept], open_input[..., kept], rtol=0, atol=1e-12)
        assert open_input[..., ~kept].abs().max() > 1e-3


@pytest.mark.parametrize("space_name", SPACES)
def test_readers_are_linears_whose_removed_inputs_their_block_computes_and_a_full_mask_changes_no_width(space_name):
    whole = stock_model().config
    space = MaskSpace.from_config(whole, space_name)
    produced = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
    for block, *_ in BLOCKS:
        last = next(name for name in produced if name.startswith(block))
        cut_inside = [
            s for s in space.layer(0)
            if {(last, 1), (produced[last], 0)} <= {(c.module, c.axis) for c in s.cuts}
        ]  # fmt: skip
        found = space.read_by(0, block)
        assert ([] if found is None else [found]) == cut_inside
    cut = cut_config(whole, space, torch.ones(space.size, dtype=torch.bool))
    plain = CutConfig.from_whole(whole)
    assert [cut.layer_shape(layer) for layer in range(2)] == [plain.layer_shape(layer) for layer in range(2)]
    assert "per_layer_config" not in cut.to_dict()


@pytest.mark.parametrize("biases", [{}, {"attention_bias": True}, {"mlp_bias": True}, BIASES], ids=str)
@pytest.mark.parametrize("space_name", SPACES)
def test_budget_and_widths_are_those_of_the_cut_model(space_name, biases):
    model = stock_model(**biases)
    space = MaskSpace.from_config(model.config, space_name)
    budget = Budget(space)
    assert budget.total == decoder_params(model)
    for seed in range(6):
        mask = random_mask(space, seed=seed, keep=0.1 + 0.15 * seed)
        cut = cut_model(model, space, mask)
        assert budget.kept(mask) == decoder_params(cut)
        with torch.no_grad():
            expected = zeroed(model, space.kept_indices(mask))(tokens()).logits
            assert_close(cut(tokens()).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("space_name", SPACES)
def test_width_rules_and_the_remainder_meet_a_budget(space_name):
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
    space = MaskSpace.from_config(stock_model(**wide).config, space_name)
    budget = Budget(space)
    (remainder,) = [s for s in space.layer(0) if s.remainder]
    rules = width_rules(budget, 0.6, None)
    assert rules and set(rules) <= {s.name for s in space.layer(0)}
    scores = torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    counts = space.describe(uniform_mask(scores, 0.6, budget, None))
    for name, values in counts.items():
        assert all(value % rules.get(name, 1) == 0 for value in values)
        assert name == remainder.name or len(set(values)) == 1
    for mask in (uniform_mask(scores, 0.6, budget, None), fit_mask(scores, 0.6, budget, None)):
        assert abs(budget.share(mask) - 0.6) <= 0.002


def linear_space(*structures):
    base = MaskSpace.from_config(stock_model().config)
    return MaskSpace("own", [list(structures)] * base.num_layers, base.linears, base.norms)


def no_widths(structure, kept):
    return {}


def test_a_soft_mask_on_an_input_side_is_applied():
    """A structure whose only side is an input, as the controller once dropped them."""
    owner = torch.arange(32)
    space = linear_space(Structure("gate_inputs", 32, (Cut("mlp.gate_proj", 1, owner),), no_widths, remainder=True))
    model = add_lora(stock_model(dtype=torch.float32), space, r=2, alpha=2.0, dropout=0.0).eval().double()
    controller, soft = MaskController(model, space), torch.full((space.size,), 0.5, dtype=torch.float64)
    gate = model.get_base_model().model.layers[0].mlp.gate_proj
    x = torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad(), controller.masks(soft, "soft"):
        assert_close(gate(x), nn.functional.linear(0.5 * x, gate.get_base_layer().weight))
        assert isinstance(gate, MaskedPeftLinear) and gate.out_mask is None


@pytest.mark.parametrize(
    ("size", "sides", "remainder", "message"),
    [
        (32, [torch.arange(31)], True, "owner must give each of 32 positions"),
        (40, [torch.arange(32)], True, "one of 40 decisions"),
        (32, [torch.arange(32)] * 2, True, "this side is cut twice"),
        (32, [torch.arange(32)], False, "exactly one structure with remainder=True"),
    ],
)
def test_a_table_with_gaps_is_refused(size, sides, remainder, message):
    cuts = tuple(Cut("mlp.gate_proj", 1, owner) for owner in sides)
    with pytest.raises(ValueError, match=message):
        linear_space(Structure("own", size, cuts, no_widths, remainder=remainder))


@pytest.mark.parametrize(
    ("cut", "reader", "message"),
    [
        (Cut("mlp.gate_proj", 1, torch.arange(32), soft=False), None, "a soft mask must multiply one side"),
        (Cut("mlp.gate_proj", 1, torch.arange(32)), "mlp.down_proj", "cut the inputs of its reader mlp.down_proj"),
    ],
)
def test_a_structure_that_contradicts_itself_is_refused(cut, reader, message):
    with pytest.raises(ValueError, match=message):
        linear_space(Structure("own", 32, (cut,), no_widths, reader=reader, remainder=True))
