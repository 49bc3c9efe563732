"""Runs over a frozen base in 4 or 8 bits: they train, cut exactly, resume, and hold what they should."""

import pytest
import torch
from tiny_run import CUT, SEARCH, TOTAL, assert_same_end, make, place, records, trained_tensors
from torch import nn

from atp.models.base import FORMS
from atp.models.load import read_model
from atp.training.callbacks import Callback
from atp_kernels import QuantizedWeight
from atp_kernels.quantized import dense

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "intermediate_size": 128}
LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
ENDS = ("o_proj", "down_proj")  # whose weights the refit changes


def based(folder, load_in="4bit", **overrides):
    overrides["model"] = {"load_in": load_in}
    overrides["decisions"] = {"target_keep": 0.6} | overrides.get("decisions", {})
    return make(folder, sizes=SIZES, **overrides)


def base_weights(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("_proj.base_layer.weight")}


def held(model):
    """Bytes of the base weights of a model."""
    return sum(weight.nbytes for weight in base_weights(model).values())


@pytest.fixture(scope="module", params=FORMS)
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = based(folder, request.param)
    trainer.train()
    return request.param, folder, trainer


def losses(folder):
    return [record["loss"] for record in records(folder)]


def test_every_step_is_that_over_the_floating_weights_it_stands_for(unbroken, tmp_path):
    load_in, folder, _ = unbroken
    floating = based(tmp_path, load_in)
    for module in floating.model.modules():
        if type(module) is nn.Linear and isinstance(module.weight, QuantizedWeight):
            module.weight = nn.Parameter(dense(module.weight), requires_grad=False)
    floating.train()
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=1e-5) and len(losses(folder)) == TOTAL


def test_the_exported_model_is_floating(unbroken, tmp_path):
    _, _, trainer = unbroken
    trainer.export(tmp_path)
    model = read_model(tmp_path / "model", dtype="auto")
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in model.parameters())
    state = dict(model.named_parameters())
    for name, layer in trainer.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            adapter = layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r is 1
            expected = dense(layer.get_base_layer().weight) + adapter
            torch.testing.assert_close(state[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_refit_leaves_floating_ends_and_the_cut_the_entries_of_the_rest(unbroken):
    load_in, _, trainer = unbroken
    whole = base_weights(based(trainer.checkpoint_root.parent / "again", load_in).model)
    kept = {(layer, module): sides for layer, module, *sides in trainer.space.module_masks(trainer.decisions.mask)}
    refitted = 0
    for name, weight in base_weights(trainer.model).items():
        local = name.split(".layers.")[1]
        layer, module = local.removesuffix(".base_layer.weight").split(".", 1)
        rows, columns = kept[int(layer), module]
        if f"layers.{local}" in trainer.pruning.refitted:
            assert type(weight) is nn.Parameter and module.endswith(ENDS)
            refitted += 1
            continue
        expected = dense(whole[name])
        expected = expected if rows is None else expected[rows]
        expected = expected if columns is None else expected[:, columns]
        assert isinstance(weight, QuantizedWeight) and torch.equal(dense(weight), expected), name
    assert refitted > 0


class Bytes(Callback):
    """What base weights and slices take at the first step of each phase."""

    def __init__(self):
        self.held = {}

    def on_step(self, loop, record):
        controller = getattr(loop.pruning, "controller", None)
        slices = [] if controller is None else controller._slices.values()
        found = held(loop.model), sum(kept._held.nbytes for kept in slices if kept._held is not None)
        self.held.setdefault(loop.phase, found)


@pytest.mark.parametrize(("load_in", "share"), [("4bit", 4.5 / 32), ("8bit", (8 + 32 / 64) / 32)])
def test_bytes_of_weights_in_every_phase(tmp_path, load_in, share):
    watched = Bytes()
    based(tmp_path, load_in, callbacks=[watched]).train()
    assert watched.held.keys() == {"search", "settle", "tune"}
    whole = 4 * LINEARS
    assert held(based(tmp_path / "again", load_in).model) / whole == pytest.approx(share, abs=0.005)
    assert watched.held["search"] == (held(based(tmp_path / "again", load_in).model), 0), "no slice is kept"
    ends = 4 * 2 * (64 * 64 + 64 * 128)
    assert watched.held["settle"][0] <= share * (whole - ends) + ends + 4096
    assert watched.held["settle"][1] < ends, "slices of what the refit made floating"
    assert watched.held["tune"][0] < watched.held["settle"][0]


@pytest.mark.parametrize("step", [1, SEARCH, CUT, CUT + 1, TOTAL - 1])
def test_resume_is_bit_exact(unbroken, tmp_path, step):
    load_in, folder, trainer = unbroken
    place(folder, step, tmp_path)
    again = based(tmp_path, load_in)
    again.train(resume=True)
    assert_same_end(again, trainer)
    expected = base_weights(trainer.model)
    for name, tensor in base_weights(again.model).items():
        assert type(tensor) is type(expected[name]) and torch.equal(dense(tensor), dense(expected[name])), name


def test_gradient_checkpointing_gives_the_same_run(unbroken, tmp_path):
    load_in, _, trainer = unbroken
    other = based(tmp_path, load_in, training={"gradient_checkpointing": True})
    other.train()
    expected = trained_tensors(trainer)
    for name, tensor in trained_tensors(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("space", ["kv_group", "head_dim", "disp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_space_and_dtype(tmp_path, space, dtype):
    trainer = based(tmp_path, dtype=dtype, decisions={"space": space, "source": "tuned", "refit_windows": 4})
    trainer.train()
    certificate = trainer.export(tmp_path / "out")
    assert certificate["masked_vs_cut"] < 1e-4 and certificate["merge_error"] <= 1
    assert read_model(tmp_path / "out" / "model", dtype="auto").dtype == dtype


def test_autocast(tmp_path):
    trainer = based(tmp_path, training={"precision": "bfloat16"})
    trainer.train()
    assert trainer.export(tmp_path / "out")["masked_vs_cut"] < 1e-4
