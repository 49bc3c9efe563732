"""Runs that remove whole blocks: budget, certificate, what is left of the adapter, and bit-exact resume."""

import json

import pytest
import torch
from tiny_run import assert_same_end, make, records, resumed
from transformers import AutoModelForCausalLM

from atp.decide.budget import Budget
from atp.training import checkpoint as checkpoints

AT_ONCE = {"open": 3, "search": 0, "settle": 0, "tune": 3, "beta2": 0.9, "update_clipping": True}
SLOWLY = AT_ONCE | {"search": 2, "settle": 2}
DECISIONS = {"space": "kv_group", "blocks": True, "target_keep": 0.2, "multiples": {"mlp": 4}, "refit_windows": 6}
DEEP = {"num_hidden_layers": 4}
BIASED = DEEP | {"attention_bias": True, "mlp_bias": True}
# The settings of training, decisions and others, and the steps from which runs are resumed.
CASES = {
    "tuned": (AT_ONCE, {"source": "tuned"}, {"sizes": DEEP}, [2, 3, 5]),
    "in rounds": (AT_ONCE, {"source": "running", "rounds": 3}, {"sizes": DEEP}, [2, 3, 4]),
    "slowly": (SLOWLY, {"source": "running"}, {"sizes": BIASED}, [2, 4, 6, 7]),
    "l0": (SLOWLY | {"regularizer": "l0", "beta": 0.01}, {"source": "static"}, {"sizes": BIASED}, [5]),
    "mlp": (AT_ONCE, {"source": "tuned", "space": "mlp", "target_keep": 0.5}, {"sizes": BIASED}, [3]),
    "dora": (AT_ONCE, {"source": "tuned"}, {"sizes": DEEP, "lora": {"variant": "dora"}}, [2, 5]),
    "bfloat16": (AT_ONCE, {"source": "running"}, {"sizes": DEEP, "dtype": torch.bfloat16}, [3]),
    "8bit": (
        AT_ONCE,
        {"source": "tuned"},
        {"sizes": DEEP, "model": {"path": "tiny", "load_in": "8bit"}},
        [3],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    training, decisions, others, steps = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    options = {"training": training, "decisions": DECISIONS | decisions, **others}
    trainer = make(folder, **options)
    assert trainer.config.decisions.blocks
    trainer.train()
    return trainer, folder, options, steps


def skips(config):
    return [config.layer_shape(layer).skip for layer in range(config.num_hidden_layers)]


def test_a_run_meets_budget_and_certificate_without_some_blocks(finished, tmp_path):
    trainer, folder, options, _ = finished
    space, mask = trainer.space, trainer.decisions.mask
    budget, target = Budget(space), options["decisions"]["target_keep"]
    assert abs(budget.share(mask) - target) < 0.02
    gone = {(structure.layer, structure.block) for structure in space.emptied(mask)}
    assert gone and len(gone) < len(space.structures)
    certificate = trainer.export(tmp_path)
    assert certificate["removed_lora_norm"] == 0.0 and certificate["merge_error"] <= 1.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in reloaded.parameters()) == trainer.params_before - budget.total + budget.kept(mask)
    named = {"self_attn": "attention", "mlp": "mlp"}
    found = {(layer, block) for layer, skip in enumerate(skips(reloaded.config)) for block in skip}
    assert found == {(layer, named[block]) for layer, block in gone}
    parts = [name for name, _ in trainer.model.named_parameters()]
    assert not [name for layer, block in gone for name in parts if f".layers.{layer}.{block}." in name]
    state = checkpoints.load(folder / "checkpoints" / f"checkpoint-{trainer.step:08d}")
    held = {*state.part("model"), *state.part("lora_optimizer")}
    assert held and not [name for layer, block in gone for name in held if f"layers.{layer}.{block}." in name]
    last = [record["kept_by_layer"] for record in records(folder) if "kept_by_layer" in record]
    assert not last or all(len(shares) == 4 for shares in last[-1].values())


def test_the_decisions_are_read_back_as_they_were(finished, tmp_path):
    trainer = finished[0]
    trainer.export(tmp_path)
    written = json.loads((tmp_path / "decisions.json").read_text())
    assert torch.equal(trainer.space.mask_from_indices(written["layers"]), trainer.decisions.mask)
    assert [] in [kept for layer in written["layers"] for kept in layer.values()]
    card = (tmp_path / "model" / "README.md").read_text()
    for block, layers in trainer.model.get_base_model().config.gone().items():
        assert f"* Without {block}: layers {', '.join(map(str, layers))}.\n" in card


def test_resume_is_bit_exact_before_and_after_the_cut(finished, tmp_path):
    trainer, folder, options, steps = finished
    for step in steps:
        again = resumed(folder, step, tmp_path / str(step), **options)
        assert_same_end(again, trainer)
        assert skips(again.model.get_base_model().config) == skips(trainer.model.get_base_model().config)


def test_without_the_setting_every_block_keeps_something(tmp_path):
    decisions = DECISIONS | {"source": "tuned", "blocks": False, "target_keep": 0.5}
    trainer = make(tmp_path, training=AT_ONCE, decisions=decisions, sizes=DEEP)
    trainer.train()
    assert not trainer.space.emptied(trainer.decisions.mask)
    assert len(trainer.pruning.decisions.saliency) == trainer.space.size
