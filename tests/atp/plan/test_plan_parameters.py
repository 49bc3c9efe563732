"""Parameters of a plan: exact for models that are really cut, and for four public configs."""

from pathlib import Path

import pytest
from tiny_plans import FAMILIES, job, settings, tiny
from transformers import AutoModelForCausalLM

from atp.decide.budget import Budget
from atp.decide.rules import width_rules
from atp.models.load import read_config
from atp.plan.cost import cost_of
from atp.plan.memory import memory_of
from atp.plan.parameters import counted, parameters_of
from atp.plan.shapes import ModelShapes, equal_counts, mask_of
from atp.removal import cut_model
from atp.spaces.space import MaskSpace

CONFIGS = Path(__file__).parent / "configs"
CASES = [(family, space) for family in FAMILIES for space in ("kv_group", "head_dim", "disp")
         if (family, space) != ("qwen3", "head_dim")]  # fmt: skip


@pytest.mark.parametrize(("family", "space"), CASES)
def test_after_is_what_a_real_cut_leaves(family, space):
    plan = job(f"decisions.space={space}", family=family)
    shapes = plan.shapes
    model = AutoModelForCausalLM.from_config(shapes.config)
    cut = cut_model(model, shapes.space, mask_of(shapes.space, shapes.counts))
    for found, real in ((plan.before, model), (plan.after, cut)):
        assert found == counted(real)
        assert found["total"] == sum(p.numel() for p in real.parameters())
    assert {
        name: tuple(w.weight.shape) for name, w in cut.get_decoder().layers[1].named_modules() if "_proj" in name
    } == {name: (linear.out_features, linear.in_features) for name, linear in shapes.kept[1].linears.items()}
    first = cut.get_decoder().layers[0].self_attn
    widths = (
        first.head_dim,
        getattr(first, "v_head_dim", first.head_dim),
    )  # values of whole heads have no width of their own
    assert widths == (shapes.kept[0].qk_dim, shapes.kept[0].v_dim)
    decoder = [sum(n for part, n in found.items() if part in ("attention", "mlp", "norms")) for found in
               (plan.before, plan.after)]  # fmt: skip
    last_norm = shapes.config.hidden_size
    assert shapes.share == pytest.approx((decoder[1] - last_norm) / (decoder[0] - last_norm))


@pytest.mark.parametrize(
    ("name", "groups", "inner"),
    [("Llama-2-7b", 19, 6_656), ("Llama-3.1-8B", 5, 8_512), ("Qwen3-8B", 5, 7_296), ("Qwen2.5-7B", 2, 11_648)],
)
def test_public_configs_at_40_percent_removed(name, groups, inner):
    """By the textbook; test_plan_command.py has the totals."""
    config = read_config(CONFIGS / name)
    shapes = ModelShapes.of(config, settings("decisions.multiples=null").decisions)
    assert {name: set(kept) for name, kept in shapes.counts.items()} == {"kv_group": {groups}, "mlp": {inner}}
    assert shapes.multiples == {"mlp": 64} and abs(shapes.share - 0.6) < 0.002
    kept = parameters_of(shapes.cut_config)
    # The linears of a layer, with Qwen2's biases and Qwen3's norms of queries and keys.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = groups * config.num_attention_heads // config.num_key_value_heads * head_dim, groups * head_dim
    layer = 2 * config.hidden_size * (queries + keys) + 3 * config.hidden_size * inner + 2 * config.hidden_size
    layer += queries + 2 * keys if config.model_type == "qwen2" else 0
    layer += 2 * head_dim if config.model_type == "qwen3" else 0
    ends = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert kept["total"] == config.num_hidden_layers * layer + ends


def test_shared_embeddings_count_once():
    shared, apart = (parameters_of(tiny("qwen2", tie_word_embeddings=tied)) for tied in (True, False))
    assert (shared["head"], apart["head"]) == (0, apart["embedding"])
    assert apart["total"] - shared["total"] == apart["embedding"] == 64 * 96


@pytest.mark.parametrize("target", [0.2, 0.35, 0.6, 0.85, 0.99])
@pytest.mark.parametrize("multiples", [{}, {"mlp": 32}, {"mlp": 96, "kv_group": 2}])
def test_the_remainder_makes_the_share_nearest_to_the_target(target, multiples):
    space = MaskSpace.from_config(tiny(num_key_value_heads=6), "kv_group")
    budget = Budget(space)
    counts = equal_counts(budget, target, multiples)
    (kept,), (groups,) = set(counts["mlp"]), set(counts["kv_group"])
    step = multiples.get("mlp", 1)
    assert kept % step == 0 or kept == 256
    assert groups % multiples.get("kv_group", 1) == 0

    def missed(inner):
        return abs(budget.share(mask_of(space, counts | {"mlp": [inner] * space.num_layers})) - target)

    every = [*range(step, 256, step), 256]
    assert missed(kept) == min(map(missed, every))


def test_width_rules_are_those_of_a_run():
    config = read_config(CONFIGS / "Llama-2-7b")
    shapes = ModelShapes.of(config, settings("decisions.multiples=null").decisions)
    assert shapes.multiples == width_rules(Budget(shapes.space), 0.6, None)
    asked = ModelShapes.of(config, settings("decisions.multiples={mlp: 256, kv_group: 4}").decisions)
    assert asked.counts["kv_group"][0] % 4 == 0 and asked.counts["mlp"][0] % 256 == 0


def test_the_last_layers_are_left_out_where_the_target_needs_it():
    """And only with decisions.blocks, and no more of them than that; then all other figures are of what is left."""
    options = {"num_key_value_heads": 1, "num_attention_heads": 6, "head_dim": 16, "num_hidden_layers": 6}
    found = job("decisions.blocks=true", "decisions.target_keep=0.1", **options)
    shapes = found.shapes
    cut = cut_model(AutoModelForCausalLM.from_config(shapes.config), shapes.space, mask_of(shapes.space, shapes.counts))
    assert found.after == counted(cut) and abs(shapes.share - 0.1) < 0.01
    kept = [sum(layer.weights for layer in shapes.kept[:count]) for count in range(7)]
    gone = kept.count(kept[-1]) - 1
    assert 0 < gone < 6 and shapes.counts["kv_group"] == [1] * (6 - gone) + [0] * gone
    assert [(w.heads, w.kv_heads, w.adapter(4)) for w in shapes.kept[-gone:]] == [(0, 0, 0)] * gone
    assert sum(w.adapter(4) for w in shapes.kept) == sum(
        4 * (linear.out_features + linear.in_features)
        for layer in cut.get_decoder().layers for linear in layer.modules() if type(linear).__name__ == "Linear"
    )  # fmt: skip
    assert min(row.flops.total for row in cost_of(found)) > 0 and max(row["bytes"] for row in memory_of(found)) > 0
    without = job("decisions.target_keep=0.1", **options).shapes
    assert set(without.counts["kv_group"]) == {1} and without.share > 0.2
    plain, with_blocks = (job(*extra, **options).shapes for extra in ((), ("decisions.blocks=true",)))
    assert plain.counts == with_blocks.counts, "0.6 needs no layer less"
