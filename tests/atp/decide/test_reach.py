"""The nearest share that can be kept, against trying out every count."""

import itertools

import pytest
import torch
from tiny_spaces import HEAD_DIM, INNER, LAYERS, config, decoder_params, larger

from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.decide.reach import nearest_share
from atp.spaces.space import MaskSpace

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
