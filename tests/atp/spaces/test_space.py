"""The mask tables against index lists written by hand."""

import pytest
import torch
from tiny_spaces import HEAD_DIM, HIDDEN, INNER, LAYERS, config
from transformers import GemmaConfig, GPT2Config

from atp.ground.errors import InputError
from atp.spaces.space import MaskSpace, UnsupportedModel

# Two kv heads of 4 dimensions, four query heads. RoPE pairs are (0, 2) and (1, 3).
HEAD_DIM_TABLE = {
    "qk": {
        ("self_attn.q_proj", 0): [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        ("self_attn.k_proj", 0): [0, 1, 0, 1, 0, 1, 0, 1],
    },
    "vo": {
        ("self_attn.v_proj", 0): [0, 1, 2, 3, 0, 1, 2, 3],
        ("self_attn.o_proj", 1): [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3],
    },
    "mlp": {("mlp.gate_proj", 0): list(range(10)), ("mlp.up_proj", 0): list(range(10)),
            ("mlp.down_proj", 1): list(range(10))},
}  # fmt: skip
KV_GROUP_TABLE = {
    "kv_group": {
        ("self_attn.q_proj", 0): [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        ("self_attn.k_proj", 0): [0, 0, 0, 0, 1, 1, 1, 1],
        ("self_attn.v_proj", 0): [0, 0, 0, 0, 1, 1, 1, 1],
        ("self_attn.o_proj", 1): [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
    },
    "mlp": HEAD_DIM_TABLE["mlp"],
}
# Twelve positions of the hidden state, selected five times.
DISP_TABLE = {
    "attention_inputs": {(f"self_attn.{name}_proj", 1): list(range(12)) for name in "qkv"},
    "attention_outputs": {("self_attn.o_proj", 0): list(range(12))},
    "mlp_inputs": {("mlp.gate_proj", 1): list(range(12)), ("mlp.up_proj", 1): list(range(12))},
    "mlp_outputs": {("mlp.down_proj", 0): list(range(12))},
    "mlp": HEAD_DIM_TABLE["mlp"],
}
TABLES = {"head_dim": HEAD_DIM_TABLE, "kv_group": KV_GROUP_TABLE, "disp": DISP_TABLE}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", TABLES)
def test_tables(name, family):
    space = MaskSpace.from_config(config(family), name)
    for layer in range(LAYERS):
        found = {s.name: {(c.module, c.axis): c.owner.tolist() for c in s.cuts} for s in space.layer(layer)}
        assert found == TABLES[name]


@pytest.mark.parametrize(("name", "sizes"), [("head_dim", [2, 4, 10]), ("kv_group", [2, 10]),
                                              ("disp", [12, 12, 12, 12, 10])])  # fmt: skip
def test_decisions_form_one_flat_vector(name, sizes):
    space = MaskSpace.from_config(config(), name)
    assert [s.size for s in space.structures] == sizes * LAYERS
    assert space.size == sum(sizes) * LAYERS and space.num_layers == LAYERS
    covered = [i for s in space.structures for i in range(s.span.start, s.span.stop)]
    assert covered == list(range(space.size))


def test_every_row_and_column_belongs_to_one_structure():
    for name in TABLES:
        space = MaskSpace.from_config(config(), name)
        for structure in space.structures:
            for cut in structure.cuts:
                linear = space.linears[structure.layer][cut.module]
                assert len(cut.owner) == (linear.in_features if cut.axis else linear.out_features)
                assert set(cut.owner.tolist()) == set(range(structure.size))


def test_head_dim_is_derived_where_the_config_gives_none():
    space = MaskSpace.from_config(config("mistral", head_dim=None, hidden_size=16))
    assert [s.size for s in space.layer(0)] == [2, 4, INNER]


def test_linears_and_norms():
    space = MaskSpace.from_config(config(attention_bias=True))
    shapes = {name: (m.out_features, m.in_features, m.bias) for name, m in space.linears[0].items()}
    assert shapes == {
        "self_attn.q_proj": (16, HIDDEN, True),
        "self_attn.k_proj": (8, HIDDEN, True),
        "self_attn.v_proj": (8, HIDDEN, True),
        "self_attn.o_proj": (HIDDEN, 16, True),
        "mlp.gate_proj": (INNER, HIDDEN, False),
        "mlp.up_proj": (INNER, HIDDEN, False),
        "mlp.down_proj": (HIDDEN, INNER, False),
    }
    assert space.norm_params == 2 * HIDDEN


def test_module_masks_expand_a_decision_everywhere_it_acts():
    space = MaskSpace.from_config(config())
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[1] = False  # layer 0, qk pair 1: dimensions 1 and 3
    mask[16 + 2 + 3] = False  # layer 1, vo dimension 3
    masks = {(layer, module): (out, inside) for layer, module, out, inside in space.module_masks(mask)}
    assert len(masks) == LAYERS * 7
    assert masks[0, "self_attn.q_proj"][0].tolist() == [True, False] * 8
    assert masks[0, "self_attn.k_proj"][0].tolist() == [True, False] * 4
    assert masks[1, "self_attn.v_proj"][0].tolist() == [True, True, True, False] * 2
    assert masks[1, "self_attn.o_proj"][1].tolist() == [True, True, True, False] * 4
    assert masks[1, "self_attn.o_proj"][0] is None and masks[1, "self_attn.v_proj"][1] is None
    assert masks[0, "self_attn.v_proj"][0].all() and masks[1, "self_attn.q_proj"][0].all()


def test_gradients_of_module_masks_are_summed_onto_their_decision():
    space = MaskSpace.from_config(config())
    mask = torch.ones(space.size, requires_grad=True)
    sum((side.sum() for _, _, *sides in space.module_masks(mask) for side in sides if side is not None)).backward()
    # A qk decision owns 2 rows in each of 4 + 2 heads, a vo decision 2 rows and 4 columns, an mlp decision 3 sides.
    assert mask.grad.tolist() == ([12.0] * 2 + [6.0] * HEAD_DIM + [3.0] * INNER) * LAYERS


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


def test_unknown_space_is_refused():
    with pytest.raises(UnsupportedModel, match="unknown mask space 'heads': use one of disp, head_dim, kv_group"):
        MaskSpace.from_config(config(), "heads")
