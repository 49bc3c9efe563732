"""The one-stage job on a tiny model: phases, certificate, resume, interruption, guards."""

import json
import signal

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file
from tiny_callbacks import Poison, StopAt
from tiny_run import CUT, SEARCH, SETTLE, TOTAL, TUNE, make, trained_tensors
from transformers import AutoModelForCausalLM

from atp.decide.budget import Budget
from atp.decide.maker import DecisionMaker
from atp.ground.errors import InputError, Interrupted, NotReached
from atp.lora.regularizers import Lasso
from atp.training import checkpoint as checkpoints


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make(folder)
    trainer.train()
    return trainer, folder, trained_tensors(trainer)


def test_run_meets_budget_and_certificate(unbroken, tmp_path):
    trainer, _, _ = unbroken
    assert abs(Budget(trainer.space).share(trainer.decisions.mask) - 0.6) < 0.02  # one block of a tiny model is coarse
    certificate = trainer.export(tmp_path / "out")
    assert certificate["removed_lora_norm"] == 0.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    assert certificate["frozen_vs_cut"] > 10 * certificate["masked_vs_cut"], "removed LoRA groups had learnt something"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    budget = Budget(trainer.space)
    removed = budget.total - budget.kept(trainer.decisions.mask)
    assert sum(p.numel() for p in reloaded.parameters()) == trainer.params_before - removed
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_metrics_cover_every_step_and_phase(unbroken):
    trainer, folder, _ = unbroken
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, TOTAL + 1))
    assert [r["phase"] for r in records] == ["search"] * SEARCH + ["settle"] * SETTLE + ["tune"] * TUNE
    assert records[0]["keep"] > records[SEARCH]["keep"] and "decision_loss" in records[0]
    assert all(r["loss"] > 0 for r in records)
    assert ["kept_by_layer" in r for r in records] == [True] * CUT + [False] * TUNE
    layers, size = trainer.space.kept_indices(trainer.decisions.mask), {s.name: s.size for s in trainer.space.layer(0)}
    final = {name: [round(len(kept[name]) / n, 4) for kept in layers] for name, n in size.items()}
    assert records[CUT - 1]["kept_by_layer"] == final


@pytest.mark.parametrize("step", [2, SEARCH, SEARCH + 1, CUT, CUT + 2])
def test_resume_is_bit_exact(unbroken, tmp_path, step):
    """k steps + resume + (N - k) steps equal N steps, from any checkpoint: search, settle, the cut, tune."""
    trainer, folder, expected = unbroken
    saved = folder / "checkpoints" / f"checkpoint-{step:08d}"
    loaded = checkpoints.load(saved)
    loaded.meta["config"]["output_dir"] = str(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", loaded, keep=1)
    resumed = make(tmp_path, model_seed=0)
    torch.manual_seed(999)  # what the process did before must not matter
    resumed.train(resume=True)
    assert torch.equal(resumed.decisions.mask, trainer.decisions.mask)
    for name, tensor in trained_tensors(resumed).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("step", [2, CUT + 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_checkpoint_and_resume_ends_the_same(unbroken, tmp_path, step, signum):
    trainer, _, expected = unbroken
    with pytest.raises(Interrupted) as caught:
        make(tmp_path, callbacks=[StopAt(step, signum)]).train()
    assert caught.value.signum == signum
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == step
    resumed = make(tmp_path)
    resumed.train(resume=True)
    assert torch.equal(resumed.decisions.mask, trainer.decisions.mask)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(resumed).items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, TOTAL + 1))


def base_weights(trainer):
    return {n: p for n, p in trainer.model.get_base_model().model.named_parameters() if "base_layer" in n}


def test_ends_of_blocks_are_refitted_at_the_freeze(tmp_path):
    """From the first block that loses something on, after the decisions, only if the config asks, and nothing else."""
    # Of one window nothing is held out, so no linear is left as it was.
    trainer = make(tmp_path / "one", decisions={"refit_windows": 1})
    other = make(tmp_path / "other", decisions={"refit_windows": 0})
    trainer.train()
    other.train()
    assert torch.equal(trainer.decisions.mask, other.decisions.mask)
    losing = {
        (layer, module.split(".")[0])
        for layer, module, *sides in trainer.space.module_masks(trainer.decisions.mask)
        if any(side is not None and not side.all() for side in sides)
    }
    ends = [
        (layer, block, end) for layer in range(trainer.space.num_layers)
        for block, end in (("self_attn", "o_proj"), ("mlp", "down_proj"))
    ]  # fmt: skip
    first = next(i for i, (layer, block, _) in enumerate(ends) if (layer, block) in losing)
    expected = {f"layers.{layer}.{block}.{end}.base_layer.weight" for layer, block, end in ends[first:]}
    weights = base_weights(other)
    assert {n for n, p in base_weights(trainer).items() if not torch.equal(p, weights[n])} == expected
    assert set(trainer.pruning.refitted) == expected
    assert "refit" in trainer.clock.seconds and "refit" not in other.clock.seconds


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharded_weights_are_refused_whatever_shards_them(tmp_path, monkeypatch, kind):
    """The refit, the lasso's gradient and the cut need whole weights in every process."""
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(InputError, match=f"^{kind.value} is not supported: start the run with"):
        make(tmp_path)


def test_resume_refuses_a_changed_config(unbroken, tmp_path):
    _, folder, _ = unbroken
    loaded = checkpoints.load(folder / "checkpoints" / "checkpoint-00000002")
    loaded.meta["config"]["output_dir"] = str(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", loaded, keep=1)
    with pytest.raises(InputError, match=r"lora\.r: 8 -> 4"):
        make(tmp_path, lora={"r": 4}).train(resume=True)


def test_resume_refuses_another_model(unbroken, tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, callbacks=[StopAt(2)]).train()
    with pytest.raises(InputError, match="^cannot resume: base weights is not what the run was started with"):
        make(tmp_path, model_seed=1).train(resume=True)


def test_resume_after_the_last_step_has_the_trained_adapter(unbroken, tmp_path):
    _, folder, expected = unbroken
    last = checkpoints.load(folder / "checkpoints" / f"checkpoint-{TOTAL:08d}")
    last.meta["config"]["output_dir"] = str(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", last, keep=1)
    resumed = make(tmp_path)
    resumed.train(resume=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(resumed).items())


def test_a_signal_in_the_last_step_before_the_cut_is_answered_after_it(unbroken, tmp_path):
    """There is no checkpoint between settle and cut: without one this far the whole search would be lost."""
    _, _, expected = unbroken
    with pytest.raises(Interrupted):
        make(tmp_path, callbacks=[StopAt(CUT)], training={"save_every": 50}).train()
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == CUT
    resumed = make(tmp_path, training={"save_every": 50})
    resumed.train(resume=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(resumed).items())


def test_resume_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        make(tmp_path).train(resume=True)


def test_checkpoints_hold_no_pickle_and_few_bytes(unbroken):
    _, folder, _ = unbroken
    names = {path.name for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert names == {"LATEST", "state.safetensors", "state.json"}
    after = load_file(folder / "checkpoints" / f"checkpoint-{TOTAL:08d}" / "state.safetensors")
    before = load_file(folder / "checkpoints" / "checkpoint-00000002" / "state.safetensors")
    lora_bytes = [
        sum(t.numel() for n, t in state.items() if n.startswith(("model.", "lora_optimizer.")))
        for state in (before, after)
    ]
    assert lora_bytes[1] < lora_bytes[0]  # rows and moments of removed structures are gone


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    trainer = make(tmp_path, callbacks=[Poison(CUT + 1, CUT + 2)])
    trainer.train()
    assert trainer.finite.skipped == 2
    assert all(torch.isfinite(t).all() for t in trained_tensors(trainer).values())


def test_bad_steps_between_two_logs_end_the_run_at_the_next(tmp_path):
    """The log comes at step 5; three of the steps before it were bad, the last of them step 4."""
    trainer = make(tmp_path, callbacks=[Poison(2, 4)], training={"max_bad_steps": 3, "log_every": 5})
    with pytest.raises(NotReached, match="3 steps in a row .* the last one at step 4"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in trained_tensors(trainer).values())


def test_run_stops_after_k_non_finite_steps_and_names_the_step(tmp_path):
    trainer = make(tmp_path, callbacks=[Poison(2, TOTAL)], training={"max_bad_steps": 2})
    with pytest.raises(NotReached, match="step 3"):
        trainer.train()
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == 2


def test_paper_preset_keeps_its_budget_at_the_freeze(tmp_path):
    """The penalty form is far from its budget after a few steps; the freeze fits it all the same."""
    trainer = make(tmp_path, decisions={"init": "paper", "budget": "penalty"})
    trainer.train()
    assert abs(Budget(trainer.space).share(trainer.decisions.mask) - 0.6) < 0.02


def test_kv_group_space_and_gradient_checkpointing(tmp_path):
    plain = make(tmp_path / "a", decisions={"space": "kv_group"})
    saving = make(tmp_path / "b", decisions={"space": "kv_group"}, training={"gradient_checkpointing": True})
    for trainer in (plain, saving):
        trainer.train()
    expected = trained_tensors(plain)
    for name, tensor in trained_tensors(saving).items():
        torch.testing.assert_close(tensor, expected[name])


def test_adapter_is_frozen_where_masks_alone_need_gradients(tmp_path):
    trainer, seen = make(tmp_path), []
    original = trainer.pruning.calibration_loss

    def watched(*arguments):
        seen.append(any(p.requires_grad for p in trainer.model.parameters()))
        return original(*arguments)

    trainer.pruning.calibration_loss = watched
    trainer.train()
    assert seen == [False] * (6 + SEARCH)  # windows of the saliency, decision steps
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if ".lora_" in n)


def test_gradient_accumulation_runs_one_decision_step_per_lora_step(tmp_path, monkeypatch):
    trainer = make(tmp_path, training={"gradient_accumulation": 2, "batch_size": 1})
    calls = []
    original = DecisionMaker.update
    monkeypatch.setattr(
        DecisionMaker, "update", lambda maker, step, loss_of: (calls.append(step), original(maker, step, loss_of))[1]
    )
    trainer.train()
    assert calls == list(range(SEARCH))


def watch_steps(trainer, look):
    """What `look` sees of the model before every step of the optimizer."""
    seen, check = [], trainer.skip_if_not_finite

    def watched(*arguments):
        seen.append(look(trainer.model))
        return check(*arguments)

    trainer.skip_if_not_finite = watched
    return seen


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class LassoByAutograd(Lasso):
    """The same regularizer, its gradient from autograd's graph."""

    def add_gradient(self, mask, weight):
        value = self.groups.lasso(mask)
        (weight * value).backward()
        return {"lasso": value.detach()}


@pytest.mark.parametrize("space", ["head_dim", "kv_group", "disp"])
@pytest.mark.parametrize("batches", [1, 2])
def test_lasso_added_to_gradients_is_the_lasso_in_the_loss(tmp_path, space, batches):
    """Gradients and records of every step, outside autograd's graph and in it, where nothing is clipped."""
    training = {"gradient_accumulation": batches, "batch_size": 1, "settle_beta": 2.0, "clip": 1e6}
    watched, records = {}, {}
    for kind in (Lasso, LassoByAutograd):
        folder = tmp_path / kind.__name__
        trainer = make(folder, decisions={"space": space}, training=training)
        trainer.pruning.uncut.regularizer = kind(trainer.pruning.uncut.groups)
        watched[kind] = watch_steps(trainer, gradients)
        trainer.train()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records[kind] = [(r["loss"], r.get("lasso", 0.0)) for r in map(json.loads, lines)]
    assert [lasso > 0 for _, lasso in records[Lasso]] == [True] * CUT + [False] * TUNE
    torch.testing.assert_close(records[Lasso], records[LassoByAutograd], rtol=1e-4, atol=0)
    torch.testing.assert_close(watched[Lasso], watched[LassoByAutograd], rtol=1e-4, atol=1e-6)


def test_clipping_is_of_the_gradient_of_the_loss_alone(tmp_path):
    """However large the lasso's gradient is, that of the loss keeps the norm it is clipped to."""
    clip, betas = 1e-3, {"search": 30.0, "settle": 100.0}
    trainer = make(tmp_path, training={"clip": clip, "beta": betas["search"], "settle_beta": betas["settle"]})

    def norms(model):
        parts = gradients(model)
        lasso = [torch.zeros(())]
        if trainer.phase in betas:
            groups = trainer.pruning.uncut.groups
            value = betas[trainer.phase] * groups.lasso(trainer.decisions.mask)
            for factor, grad in zip(groups.factors, torch.autograd.grad(value, groups.factors), strict=True):
                name = next(name for name, p in model.named_parameters() if p is factor)
                parts[name] -= grad
                lasso.append(grad)
        return [float(torch.cat([part.flatten() for part in some]).norm()) for some in (parts.values(), lasso)]

    seen = watch_steps(trainer, norms)
    trainer.train()
    of_the_loss, of_the_lasso = zip(*seen, strict=True)
    assert of_the_loss == pytest.approx([clip] * len(of_the_loss), rel=0.05)
    assert min(of_the_lasso[:CUT]) > 10 and not any(of_the_lasso[CUT:])


@pytest.mark.parametrize("packing", ["separate", "padded"])
def test_other_packings_resume_bit_exact_and_hold_the_certificate(tmp_path, packing):
    data = {"data": {"packing": packing}}
    whole = make(tmp_path / "whole", **data)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", callbacks=[StopAt(3)], **data).train()
    parts = make(tmp_path / "parts", **data)
    parts.train(resume=True)
    expected = trained_tensors(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(parts).items())
    assert parts.clock.tokens == whole.clock.tokens
    certificate = whole.export(tmp_path / "out")
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
