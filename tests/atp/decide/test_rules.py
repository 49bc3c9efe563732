"""The widths that the MLPs of a cut model have by default, and the nearest share that can be kept."""

import itertools
from functools import partial

import pytest
import torch
from tiny_spaces import HEAD_DIM, INNER, LAYERS, config, decoder_params, larger, random_logits

from atp.baselines.uniform import uniform_mask
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.decide.reach import nearest_share
from atp.decide.rules import width_rules as rules_on
from atp.spaces.space import MaskSpace

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64}  # fmt: skip
LLAMA2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 32, "head_dim": 128}  # fmt: skip


width_rules = partial(rules_on, device="cpu")


def budget_of(shapes, space="kv_group"):
    return Budget(MaskSpace.from_config(config(**shapes), space))


# Selections of the hidden state are widths of linears as MLP channels are; heads and their dimensions are not.
SELECTED = ("attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs", "mlp")


@pytest.mark.parametrize(
    ("shapes", "space", "rules"),  # of a machine with CUDA
    [
        (SMOLLM2, "kv_group", {"mlp": 64}),  # 3 groups are no even number, and 128 channels 0.208 % of the decoder
        (LLAMA2, "kv_group", {"kv_group": 2, "mlp": 128}),
        (LLAMA2, "head_dim", {"mlp": 128}),
        (LLAMA2, "disp", dict.fromkeys(SELECTED, 128)),
        (SMOLLM2, "disp", dict.fromkeys(SELECTED, 64)),
        (SMOLLM2 | {"intermediate_size": 1504}, "kv_group", {"mlp": 32}),
    ],
)
def test_widths_fill_the_tiles_of_matrix_products(shapes, space, rules):
    """Where the model's own widths allow it, and only where nothing was set; of a CPU, multiples of 64 do."""
    budget = budget_of(shapes, space)
    assert rules_on(budget, 0.6, None, device="cuda") == rules
    narrow = {name: min(step, 64) for name, step in rules.items() if name != "kv_group"}
    assert width_rules(budget, 0.6, None) == narrow
    for given in ({}, {"mlp": 100, "kv_group": 2}):
        assert rules_on(budget, 0.6, given, device="cuda") == width_rules(budget, 0.6, given) == given


def test_the_machine_decides_where_no_device_is_named(monkeypatch):
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        assert rules_on(budget_of(LLAMA2), 0.6, None) == rules_on(budget_of(LLAMA2), 0.6, None, device=device)


@pytest.mark.parametrize(("inner", "step"), [(1536, 64), (1504, 32), (1520, 16), (1540, 4), (1538, 2), (1539, None)])
def test_a_width_that_64_does_not_divide_has_the_largest_power_of_two_that_does(inner, step):
    rules = {} if step is None else {"mlp": step}
    assert width_rules(budget_of(SMOLLM2 | {"intermediate_size": inner}), 0.6, None) == rules


def test_a_block_is_never_more_than_the_budget_may_miss_and_a_low_target_stays_in_reach():
    """One channel of the smaller model is 0.3 % of its decoder and one of the larger 0.03 %: 4 of them are 0.12 %."""
    small = budget_of({"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 8})
    assert width_rules(small, 0.6, None) == {}
    assert width_rules(Budget(MaskSpace.from_config(larger(), "kv_group")), 0.6, None) == {"mlp": 4}
    budget = budget_of(SMOLLM2)
    assert width_rules(budget, 0.2, None) == {"mlp": 64}
    rules = width_rules(budget, 0.09, None)
    assert 1 < rules["mlp"] < 64
    assert abs(budget.share(fit_mask(random_logits(budget, 0), 0.09, budget, None)) - 0.09) < 0.002


@pytest.mark.parametrize("target", [0.2, 0.5, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("space", ["kv_group", "head_dim", "disp"])
def test_the_default_keeps_the_budget(space, target):
    budget = budget_of(SMOLLM2, space)
    for make, seed in ((fit_mask, 1), (uniform_mask, 2)):
        mask = make(random_logits(budget, seed), target, budget, None)
        assert abs(budget.share(mask) - target) <= 0.001, "half a block of 0.1 %, and a little for attention"
        assert {count % 64 for count in budget.space.describe(mask)["mlp"]} == {0}


def test_the_config_leaves_the_rule_to_the_model_and_the_paper_has_none():
    values = {"model": {"path": "m"}, "output_dir": "o"}
    default = ATPConfig.parse(values)
    assert default.decisions.multiples is None
    assert ATPConfig.parse(values | {"preset": "paper"}).decisions.multiples == {}
    # A config that was written down, in which null stands, takes overrides like any other.
    again = ATPConfig.parse(default.model_dump(mode="json"), ["decisions.multiples.mlp=8"])
    assert again.decisions.multiples == {"mlp": 8}


RULES = [{}, {"mlp": 3}, {"mlp": 5}, {"mlp": 7}, {"mlp": 100}, {"vo": 3, "qk": 2, "mlp": 10}, {"kv_group": 2, "mlp": 4}]


def every_share(budget, multiples, **biases):
    """Shares of all masks that obey the rules; counts decide, and the textbook formula tells what they leave."""
    structures = budget.space.structures
    choices = []
    for structure in structures:
        step = multiples.get(structure.name, 1)
        choices.append(sorted({*range(step, structure.size + 1, step), structure.size}))
    shares = set()
    for counts in itertools.product(*choices):
        layers = [{} for _ in range(LAYERS)]
        for structure, count in zip(structures, counts, strict=True):
            layers[structure.layer][structure.name] = count
        shares.add(decoder_params(layers, **biases) / budget.total)
    return sorted(shares)


@pytest.mark.parametrize("biases", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biased"])
@pytest.mark.parametrize("space", ["head_dim", "kv_group"])
@pytest.mark.parametrize("multiples", RULES, ids=str)
def test_it_is_the_nearest_of_all_masks(space, multiples, biases):
    budget = Budget(MaskSpace.from_config(config(intermediate_size=INNER, **biases), space))
    assert budget.space.num_layers == LAYERS
    shares = every_share(budget, multiples, **biases)
    for target in (0.01, 0.2, 0.35, 0.5, 0.6, 0.77, 0.9, 0.999):
        nearest = min(shares, key=lambda share: abs(share - target))
        assert abs(nearest_share(budget, target, multiples) - target) == pytest.approx(abs(nearest - target), abs=1e-5)


@pytest.mark.parametrize("multiples", [{}, {"mlp": 2}, {"attention_inputs": 2, "mlp_inputs": 3}], ids=str)
@pytest.mark.parametrize(("layers", "hidden", "inner"), [(1, 4, 3), (1, 6, 5), (2, 3, 2)])
def test_where_sides_interact_it_is_a_share_of_some_mask_and_near_the_nearest(layers, hidden, inner, multiples):
    """A channel of a narrow MLP saves fewer parameters than one of a wide MLP, so costs do not add up."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 1}
    budget = Budget(MaskSpace.from_config(config(**sizes, num_key_value_heads=1), "disp"))
    own = {name: {*range(step, size + 1, step), size} for name, step, size in (
        (name, multiples.get(name, 1), inner if name == "mlp" else hidden)
        for name in ("attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs", "mlp")
    )}  # fmt: skip
    layer = {
        3 * HEAD_DIM * q + HEAD_DIM * o + (2 * read + written) * channels + 2 * hidden
        for q, o, read, written, channels in itertools.product(*own.values())
    }
    shares = {sum(kept) / budget.total for kept in itertools.product(layer, repeat=layers)}
    for target in (0.35, 0.6, 0.9):
        found = nearest_share(budget, target, multiples)
        assert min(abs(share - found) for share in shares) < 1e-9
        assert abs(found - target) <= min(abs(share - target) for share in shares) + 0.01


@pytest.mark.parametrize("space", ["head_dim", "kv_group"])
def test_a_target_in_reach_is_met_by_the_fit_and_one_out_of_reach_is_not(space):
    budget = Budget(MaskSpace.from_config(larger(), space))
    logits = torch.randn(budget.space.size, generator=torch.Generator().manual_seed(0))
    for target, multiples, reached in [
        (0.6, {}, True), (0.6, {"mlp": 8}, True), (0.001, {}, False), (0.3, {"mlp": 512}, False),
        (0.6, {"mlp": 100_000}, False),
    ]:  # fmt: skip
        assert (abs(nearest_share(budget, target, multiples) - target) <= 0.002) is reached, target
        assert (abs(budget.share(fit_mask(logits, target, budget, multiples)) - target) <= 0.002) is reached, target


@pytest.mark.timeout(20)
@pytest.mark.parametrize("multiples", [{}, {"mlp": 64}, {"mlp": 10**6}, {"mlp": 3, "qk": 3, "vo": 7}], ids=str)
def test_a_large_model_takes_no_time(multiples):
    shapes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
              "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    for space in ("head_dim", "disp"):
        budget = Budget(MaskSpace.from_config(config(**shapes), space))
        assert nearest_share(budget, 0.9, multiples) == pytest.approx(0.9, abs=0.1)
