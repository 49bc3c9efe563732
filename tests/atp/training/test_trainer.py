"""The one-stage job on a tiny model: records, resume, interruption, refit, what is added to gradients and when."""

import signal
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file
from tiny_callbacks import StopAt
from tiny_run import (
    CUT,
    SEARCH,
    SETTLE,
    TOTAL,
    TUNE,
    assert_same_end,
    make,
    place,
    records,
    resumed,
)  # fmt: skip

from atp.decide.maker import DecisionMaker
from atp.ground import heap
from atp.ground.errors import InputError, Interrupted
from atp.lora.regularizers import Lasso
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import Callback


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make(folder)
    trainer.train()
    return trainer, folder


def test_metrics_cover_every_step_and_phase(unbroken):
    trainer, folder = unbroken
    found = records(folder)
    assert [r["step"] for r in found] == list(range(1, TOTAL + 1))
    assert [r["phase"] for r in found] == ["search"] * SEARCH + ["settle"] * SETTLE + ["tune"] * TUNE
    assert found[0]["keep"] > found[SEARCH]["keep"] and "decision_loss" in found[0]
    assert all(r["loss"] > 0 for r in found)
    assert ["kept_by_layer" in r for r in found] == [True] * CUT + [False] * TUNE
    layers, size = trainer.space.kept_indices(trainer.decisions.mask), {s.name: s.size for s in trainer.space.layer(0)}
    final = {name: [round(len(kept[name]) / n, 4) for kept in layers] for name, n in size.items()}
    assert found[CUT - 1]["kept_by_layer"] == final


@pytest.mark.parametrize("step", [SEARCH, TOTAL])
def test_resume_is_bit_exact(unbroken, tmp_path, step):
    """k steps + resume + (N - k) steps equal N steps (test_kinds_of_run.py resumes from the other phases)."""
    trainer, folder = unbroken
    assert_same_end(resumed(folder, step, tmp_path), trainer)


@pytest.mark.parametrize(
    ("step", "signum", "training"),
    [
        (2, signal.SIGINT, {}),
        (CUT + 2, signal.SIGTERM, {}),
        # There is no checkpoint between settle and cut: without one this far the whole search would be lost.
        (CUT, signal.SIGINT, {"save_every": 50}),
    ],
)
def test_signal_writes_checkpoint_and_resume_ends_the_same(unbroken, tmp_path, step, signum, training):
    with pytest.raises(Interrupted) as caught:
        make(tmp_path, callbacks=[StopAt(step, signum)], training=training).train()
    assert caught.value.signum == signum
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == step
    again = make(tmp_path, training=training)
    again.train(resume=True)
    assert_same_end(again, unbroken[0])
    assert [record["step"] for record in records(tmp_path)] == list(range(1, TOTAL + 1))


def base_weights(trainer):
    return {n: p for n, p in trainer.model.get_base_model().model.named_parameters() if "base_layer" in n}


def test_each_step_trains_the_adapter_wherever_memory_comes_from(tmp_path, monkeypatch):
    """What is allocated for the cut model may lie where weights of the model before it lay."""
    monkeypatch.setattr(heap, "address", lambda tensor: 1)
    seen = []

    class Adapters(Callback):
        def on_step(self, loop, record):
            seen.append(torch.cat([p.detach().flatten() for p in loop.model.parameters() if p.requires_grad]))

    make(tmp_path, callbacks=[Adapters()]).train()
    assert len(seen) == TOTAL
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))


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


@pytest.mark.parametrize(
    ("step", "changed", "message"),
    [
        (2, {"lora": {"r": 4}}, r"lora\.r: 8 -> 4"),
        (2, {"model_seed": 1}, "^cannot resume: base weights is not what the run was started with"),
        (None, {}, "nothing to resume"),
    ],
)
def test_resume_refuses_another_run_or_none(unbroken, tmp_path, step, changed, message):
    if step:
        place(unbroken[1], step, tmp_path)
    with pytest.raises(InputError, match=message):
        make(tmp_path, **changed).train(resume=True)


def test_checkpoints_hold_no_pickle_and_few_bytes(unbroken):
    _, folder = unbroken
    names = {path.name for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert names == {"LATEST", "state.safetensors", "state.json"}
    after = load_file(folder / "checkpoints" / f"checkpoint-{TOTAL:08d}" / "state.safetensors")
    before = load_file(folder / "checkpoints" / "checkpoint-00000002" / "state.safetensors")
    lora_bytes = [
        sum(t.numel() for n, t in state.items() if n.startswith(("model.", "lora_optimizer.")))
        for state in (before, after)
    ]
    assert lora_bytes[1] < lora_bytes[0]  # rows and moments of removed structures are gone


def test_a_step_of_two_batches_decides_once_with_a_frozen_adapter(tmp_path, monkeypatch):
    trainer = make(tmp_path, training={"gradient_accumulation": 2, "batch_size": 1})
    trained, decided = [], []
    original, update = trainer.pruning.calibration_loss, DecisionMaker.update

    def watched(*arguments):
        trained.append(any(p.requires_grad for p in trainer.model.parameters()))
        return original(*arguments)

    trainer.pruning.calibration_loss = watched
    monkeypatch.setattr(
        DecisionMaker, "update", lambda maker, step, loss_of: (decided.append(step), update(maker, step, loss_of))[1]
    )
    trainer.train()
    assert decided == list(range(SEARCH))
    assert trained == [False] * (6 + SEARCH)  # windows of the saliency, decision steps
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if ".lora_" in n)


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


@pytest.mark.parametrize(("space", "batches"), [("head_dim", 2), ("disp", 1)])
def test_lasso_added_to_gradients_is_the_lasso_in_the_loss(tmp_path, space, batches):
    """Gradients and records of every step, outside autograd's graph and in it, where nothing is clipped."""
    training = {"gradient_accumulation": batches, "batch_size": 1, "settle_beta": 2.0, "clip": 1e6}
    watched, logged = {}, {}
    for kind in (Lasso, LassoByAutograd):
        folder = tmp_path / kind.__name__
        trainer = make(folder, decisions={"space": space}, training=training)
        trainer.pruning.uncut.regularizer = kind(trainer.pruning.uncut.groups)
        watched[kind] = watch_steps(trainer, gradients)
        trainer.train()
        logged[kind] = [(r["loss"], r.get("lasso", 0.0)) for r in records(folder)]
    assert [lasso > 0 for _, lasso in logged[Lasso]] == [True] * CUT + [False] * TUNE
    torch.testing.assert_close(logged[Lasso], logged[LassoByAutograd], rtol=1e-4, atol=0)
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
