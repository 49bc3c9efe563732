"""The widths that the MLPs of a cut model have by default."""

from functools import partial

import pytest
import torch
from tiny_spaces import config, larger, random_logits

from atp.baselines.uniform import uniform_mask
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
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


def test_a_block_is_never_more_than_the_budget_may_miss():
    """One channel of the smaller model is 0.3 % of its decoder and one of the larger 0.03 %: 4 of them are 0.12 %."""
    small = budget_of({"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 8})
    assert width_rules(small, 0.6, None) == {}
    assert width_rules(Budget(MaskSpace.from_config(larger(), "kv_group")), 0.6, None) == {"mlp": 4}


def test_a_low_target_stays_in_reach():
    budget = budget_of(SMOLLM2)
    assert width_rules(budget, 0.2, None) == {"mlp": 64}
    rules = width_rules(budget, 0.09, None)
    assert 1 < rules["mlp"] < 64
    assert abs(budget.share(fit_mask(random_logits(budget, 0), 0.09, budget, None)) - 0.09) < 0.002


@pytest.mark.parametrize("target", [0.2, 0.5, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("space", ["kv_group", "head_dim", "disp"])
def test_the_default_keeps_the_budget(space, target):
    budget = budget_of(SMOLLM2, space)
    for mask in (
        fit_mask(random_logits(budget, 1), target, budget, None),
        uniform_mask(random_logits(budget, 2), target, budget, None),
    ):
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
