"""Decisions in rounds: what each is judged on, and that nothing but the decisions comes of it."""

from contextlib import nullcontext

import pytest
import torch
from tiny_run import make

from atp.decide.budget import Budget
from atp.decide.maker import frozen
from atp.decide.saliency import fisher_saliency
from atp.ground.errors import InputError
from atp.training.rounds import round_targets
from atp_kernels.quantized import dense

DECISIONS = {"source": "tuned", "refit_windows": 6, "saliency_windows": 4}
AT_ONCE = {"open": 2, "search": 0, "settle": 0, "tune": 1, "warmup": 0}


def open_model(folder, rounds, **options):
    """The trainer of a model with an adapter that does something, whose saliency is known."""
    trainer = make(folder, training=AT_ONCE, decisions=DECISIONS | {"rounds": rounds}, lora={"dropout": 0.0}, **options)
    generator = torch.Generator().manual_seed(5)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) / 10
    trainer.pruning.start()
    return trainer


def judge(trainer):
    """Goes through the rounds; returns the masks that were refitted, and the parts that were timed."""
    pruning, masks, parts = trainer.pruning, [], []
    refit = pruning._refit
    pruning._refit = lambda mask: (masks.append(mask), refit(mask))[1]
    pruning.judge_in_rounds(lambda part: (parts.append(part), nullcontext())[1])
    pruning._refit = refit
    return masks, parts


def base_weights(trainer):
    named = trainer.model.named_parameters()
    return {name: dense(weight.data).clone() for name, weight in named if "base_layer" in name}


def test_shares_fall_by_the_same_factor():
    assert round_targets(0.4, 1) == []
    assert round_targets(0.25, 2) == [0.5]
    first, second = round_targets(0.4, 3)
    assert first == pytest.approx(second / first) == pytest.approx(0.4 / second)


@pytest.mark.parametrize("load_in", [None, "8bit", "4bit"])
def test_weights_are_afterwards_what_they_were(tmp_path, load_in):
    sizes = {"hidden_size": 64, "intermediate_size": 128} if load_in else None
    trainer = open_model(tmp_path, 3, model={"path": "tiny", "load_in": load_in}, sizes=sizes)
    before, kinds = base_weights(trainer), [type(w.data) for w in trainer.model.parameters()]
    masks, _ = judge(trainer)
    assert len(masks) == 2
    after = base_weights(trainer)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert [type(w.data) for w in trainer.model.parameters()] == kinds
    assert not any(weight.grad is not None and weight.grad.any() for weight in trainer.model.parameters())


def test_each_round_cuts_further_and_never_takes_back(tmp_path):
    trainer = open_model(tmp_path, 3)
    masks, parts = judge(trainer)
    assert parts == ["refit", "saliency"] * 2
    masks.append(trainer.pruning.decisions.freeze())
    budget = Budget(trainer.space)
    for mask, share in zip(masks, [*round_targets(0.6, 3), 0.6], strict=True):
        assert abs(budget.share(mask) - share) < 0.02
    assert all((smaller <= larger).all() for larger, smaller in zip(masks, masks[1:], strict=False))


def test_what_is_left_is_judged_on_the_refitted_cut(tmp_path):
    """By hand: cut, refit, take the gradient of the mask there; removed decisions have none."""
    trainer, other = open_model(tmp_path / "one", 2), open_model(tmp_path / "two", 1)
    (mask,), _ = judge(trainer)
    pruning = other.pruning
    at_one = pruning.decisions.saliency
    assert torch.equal(mask, pruning.decisions.at(0.6**0.5))
    pruning._refit(mask)
    with frozen(other.model):
        expected = fisher_saliency(other.space, pruning._windows(6), pruning.calibration_loss, at=mask)
    found = trainer.pruning.decisions.saliency
    torch.testing.assert_close(found, expected.to(found.dtype))
    assert not found[~mask].any() and found[mask].all() and not torch.equal(found[mask], at_one[mask])


def test_one_round_and_learned_decisions_are_left_alone(tmp_path):
    trainer = open_model(tmp_path / "one", 1)
    before = trainer.pruning.decisions.saliency.clone()
    assert judge(trainer) == ([], []) and torch.equal(trainer.pruning.decisions.saliency, before)
    learned = make(tmp_path / "learned", training=AT_ONCE | {"search": 1, "settle": 1})
    assert judge(learned) == ([], [])


def test_a_run_takes_as_many_rounds_as_its_target_wants(tmp_path):
    def rounds(training=AT_ONCE, **decisions):
        return make(tmp_path, training=training, decisions=decisions).config.decisions.rounds

    shares_kept = (0.9, 0.6, 0.59, 0.4, 0.36, 0.2)
    assert [rounds(source="running", target_keep=share) for share in shares_kept] == [1, 1, 2, 2, 2, 4]
    assert rounds(source="running", target_keep=0.4, refit_windows=0) == 1
    assert rounds(source="running", target_keep=0.4, training=AT_ONCE | {"search": 1}) == 1
    assert [rounds(source=source, target_keep=0.4) for source in ("static", "tuned", "learned")] == [1, 1, 1]
    assert rounds(source="tuned", rounds=4) == 4
    padded = make(
        tmp_path, training=AT_ONCE, decisions={"source": "running", "target_keep": 0.4}, data={"packing": "padded"}
    )
    assert padded.config.decisions.rounds == 1


@pytest.mark.parametrize(("training", "decisions"), [
    (AT_ONCE, {"source": "learned"}), (AT_ONCE | {"search": 1}, {"source": "tuned"}),
    (AT_ONCE, {"source": "tuned", "refit_windows": 0}),
])  # fmt: skip
def test_rounds_that_cannot_be_are_refused(tmp_path, training, decisions):
    with pytest.raises(InputError, match="decisions.rounds judges refitted cuts by their saliency: with it set a"):
        make(tmp_path, training=training, decisions=decisions | {"rounds": 2})
