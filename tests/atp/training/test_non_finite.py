"""NaN stops a run at its source, with a sentence that names it, and never gets into a checkpoint."""

import math

import pytest
import torch
from tiny_callbacks import AtStep, Poison, StopAt
from tiny_run import CUT, SEARCH, SIZES, TOTAL, TUNE, LlamaForCausalLM, make, trained_tensors, windows
from transformers import LlamaConfig

from atp.baselines.tuner import LoraTuner
from atp.config import DecisionsConfig
from atp.decide.maker import DecisionMaker
from atp.decide.saliency import fisher_saliency
from atp.ground.errors import InputError, Interrupted, NotReached
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training import pruning
from atp.training.data import refit_batch

NAN = math.nan
SPACE = MaskSpace.from_config(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    ("first", "last", "training", "message", "stops_at"),
    [
        # A phase without any good step fails, however few its steps are.
        (1, TOTAL, {"max_bad_steps": 100, "log_every": 100}, f"{CUT} steps .* non-finite gradient", CUT),
        (CUT + 1, TOTAL, {"max_bad_steps": 100, "log_every": 100}, f"{TUNE} steps", TOTAL),
        # Bad steps in a row are found at the next log, at the next save, or at the end of the phase.
        (2, TOTAL, {"max_bad_steps": 2}, "2 steps in a row .* at step 3", 3),
        (2, 4, {"max_bad_steps": 3, "log_every": 5, "save_every": 100}, "3 steps in a row .* at step 4", 5),
        (2, 3, {"max_bad_steps": 2, "log_every": 100}, "2 steps in a row .* at step 3", 3),
        (2, 3, {"max_bad_steps": 2, "log_every": 100, "save_every": 100}, "2 steps in a row .* at step 3", CUT),
    ],
)
def test_bad_steps_end_the_run_and_the_last_of_them_is_named(tmp_path, first, last, training, message, stops_at):
    trainer = make(tmp_path, callbacks=[Poison(first, last)], training=training)
    with pytest.raises(NotReached, match=message):
        trainer.train()
    assert trainer.step == stops_at
    assert all(bool(t.isfinite().all()) for t in trained_tensors(trainer).values())
    if training.get("save_every", 1) == 1 and stops_at != CUT:
        assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == stops_at - 1


def test_a_good_step_after_bad_ones_at_the_end_of_a_phase_is_enough(tmp_path):
    """The last two steps before the cut and the first of two after it are bad."""
    training = {"max_bad_steps": 4, "tune": 2}
    trainer = make(tmp_path, callbacks=[Poison(CUT - 1, CUT + 1)], training=training)
    trainer.train()
    assert trainer.finite.skipped == 3


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    training = {"max_bad_steps": 3}
    first = make(tmp_path, callbacks=[Poison(2, 3), StopAt(3)], training=training)
    with pytest.raises(Interrupted):
        first.train()
    resumed = make(tmp_path, callbacks=[Poison(4, 4)], training=training)
    with pytest.raises(NotReached, match="3 steps in a row .* the last one at step 4"):
        resumed.train(resume=True)


def test_the_tuner_fails_too(tmp_path):
    config = make(tmp_path, training={"max_bad_steps": 100, "log_every": 100}).config
    trainer = make(tmp_path / "model")
    tuner = LoraTuner(config, trainer.model, windows(20, 1), tmp_path / "tuner", callbacks=[Poison(1, TOTAL)])
    with pytest.raises(NotReached, match=f"{TOTAL} steps"):
        tuner.train()


# Decision steps


def spoil_decisions(trainer, steps):
    """Makes the calibration loss of some decision steps NaN."""
    original = trainer.pruning.calibration_loss

    def spoiled(batch, mask):
        loss = original(batch, mask)
        if trainer.phase == "search" and trainer.step in steps:
            loss = loss * NAN
        return loss

    trainer.pruning.calibration_loss = spoiled


def test_bad_decision_steps_are_counted(tmp_path):
    trainer = make(tmp_path)
    spoil_decisions(trainer, {1})
    trainer.train()
    assert trainer.decisions.finite.skipped == 1 and trainer.finite.skipped == 0


@pytest.mark.parametrize(
    ("spoiled", "training", "decisions", "message", "stops_at"),
    [
        ({1, 2}, {"max_bad_steps": 2}, {}, "2 decision steps in a row .* at step 3", 3),
        (
            {1, 2},
            {"max_bad_steps": 2, "log_every": 100, "save_every": 100},
            {},
            "2 decision steps in a row .* step 3",
            SEARCH,
        ),
        (set(range(SEARCH)), {"max_bad_steps": 100}, {"every": 2}, f"{SEARCH // 2} decision steps", SEARCH),
    ],
)
def test_bad_decision_steps_end_the_run(tmp_path, spoiled, training, decisions, message, stops_at):
    """At a log, or at the freeze."""
    trainer = make(tmp_path, training=training, decisions=decisions)
    spoil_decisions(trainer, spoiled)
    with pytest.raises(NotReached, match=message):
        trainer.train()
    assert not trainer.decisions.frozen and trainer.step == stops_at


def test_decisions_of_logits_that_are_no_numbers_are_refused():
    maker = DecisionMaker(SPACE, DecisionsConfig(), search_steps=1, prior=None, seed=0)
    with torch.no_grad():
        next(maker.generator.parameters()).fill_(NAN)
    with pytest.raises(NotReached, match="logits"):
        maker.freeze()


# Saliency


@pytest.mark.parametrize("bad", [NAN, math.inf, 1e30])  # whose square overflows
def test_saliency_names_the_window_whose_gradient_is_not_finite(bad):
    factors = iter([1.0, 1.0, bad, 1.0])
    with pytest.raises(NotReached, match="calibration window 3 "):
        fisher_saliency(SPACE, [{}] * 4, lambda batch, mask: next(factors) * mask.sum())


def test_a_run_stops_before_its_first_step_where_saliency_is_not_finite(tmp_path):
    trainer = make(tmp_path)
    calls = iter(range(100))
    original = trainer.pruning.calibration_loss
    trainer.pruning.calibration_loss = lambda batch, mask: original(batch, mask) * (NAN if next(calls) == 4 else 1.0)
    with pytest.raises(NotReached, match="calibration window 5 "):
        trainer.train()
    assert trainer.step == 0 and not (tmp_path / "checkpoints").exists()


# Weights and checkpoints


@pytest.mark.parametrize(
    ("name", "bad"), [("embed_tokens", NAN), ("layers.1.mlp.down_proj", math.inf), ("norm", -math.inf)]
)
def test_base_weights_are_checked_at_the_start(tmp_path, monkeypatch, name, bad):
    """The embedding's row is of a token that no text holds."""

    def poisoned(config):
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.model.get_submodule(name).weight.view(-1)[-1] = bad
        return model

    monkeypatch.setattr("tiny_run.LlamaForCausalLM", poisoned)
    with pytest.raises(InputError, match=f"{name}.*weight.* holds NaN or infinity"):
        make(tmp_path)


@pytest.mark.parametrize("part", ["model", "optimizer", "generator", "moments", "refit", "gates", "mask logits"])
def test_no_checkpoint_is_written_that_holds_nan(tmp_path, part):
    """Whatever is spoiled behind the guards' backs, the checkpoint before it stays the newest."""
    training = {"regularizer": "l0"} if part == "gates" else {}
    at = SEARCH + 1 if part == "refit" else 2
    trainer = make(tmp_path, training=training)

    class Spoil(AtStep):
        def after(self, loop, step):
            if step != at:
                return
            with torch.no_grad():
                tensor = {
                    "model": lambda: next(p for p in trainer.model.parameters() if p.requires_grad),
                    "optimizer": lambda: next(iter(trainer.adamw.state.values()))["exp_avg"],
                    "generator": lambda: next(trainer.decisions.generator.parameters()),
                    "moments": lambda: next(iter(trainer.decisions.optimizer.state.values()))["exp_avg_sq"],
                    "refit": lambda: dict(trainer.pruning.decoder.named_parameters())[trainer.pruning.refitted[0]],
                    "gates": lambda: trainer.pruning.uncut.regularizer.log_alpha,
                    "mask logits": lambda: trainer.decisions.generator.prior,
                }[part]()
                tensor.view(-1)[0] = NAN

    trainer.callbacks.append(Spoil())
    with pytest.raises(NotReached, match=f"step {at}.* holds NaN or infinity"):
        trainer.train()
    newest = checkpoints.load(checkpoints.newest(tmp_path / "checkpoints"))
    assert newest.step == at - 1
    assert all(bool(t.isfinite().all()) for t in newest.tensors.values() if t.is_floating_point())


def test_refit_on_inputs_that_are_not_finite_is_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path)

    def spoiled(*arguments):
        trainer.pruning.decoder.layers[0].self_attn.v_proj.base_layer.weight.data[0, 0] = NAN
        return refit_batch(*arguments)

    monkeypatch.setattr(pruning, "refit_batch", spoiled)
    with pytest.raises(NotReached, match=r"layers\.0\.\S+ reads NaN"):
        trainer.train()
    assert all(bool(t.isfinite().all()) for t in trained_tensors(trainer).values())


def test_a_cut_that_gives_no_numbers_ends_the_run_there(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    original = trainer.pruning.become_cut

    def spoiled():
        cut = original()
        cut.get_base_model().model.norm.weight.data[0] = NAN
        return cut

    monkeypatch.setattr(trainer.pruning, "become_cut", spoiled)
    with pytest.raises(NotReached, match="masked_vs_cut is nan"):
        trainer.train()
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == CUT - 1


def test_a_model_that_is_not_finite_is_not_exported(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight.data[3, 1] = NAN
    with pytest.raises(NotReached, match=r"layers\.1\.mlp\.up_proj\.weight.* holds NaN or infinity"):
        trainer.export(tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_a_bad_gradient_of_a_gate_is_a_bad_step(tmp_path):
    """The adapter's own gradients are finite: the step is skipped and counted all the same."""
    trainer = make(tmp_path, training={"regularizer": "l0"})

    class SpoilGate(AtStep):
        def before(self, loop, step):
            if step == 2:
                log_alpha = trainer.pruning.uncut.regularizer.log_alpha
                self.hook = log_alpha.register_hook(lambda gradient: gradient * NAN)

        def after(self, loop, step):
            if step == 2:
                self.hook.remove()

    trainer.callbacks.append(SpoilGate())
    trainer.train()
    assert trainer.finite.skipped == 1
