"""First tokens whose state is the same for all tokens keep it, in runs that ask for it, and only there."""

from contextlib import nullcontext

import pytest
import torch
from tiny_run import make, place, ragged, records
from torch import nn

from atp.training.sinks import Sinks

HOLD = {"hold_sinks": 100.0, "open": 3, "search": 0, "settle": 0, "tune": 4}
AT_ONCE = {"source": "running"}


def alike(model, share=1.0):
    """Gives all embeddings one large part in common, so that a first token's state is nearly the same for all."""
    with torch.no_grad():
        model.get_input_embeddings().weight += share * torch.ones(32) / 32**0.5


def run(folder, hold=100.0, share=1.0, resume=False, **overrides):
    """A trainer of a model whose first tokens have one state. hold: the weight."""
    settings = {"decisions": AT_ONCE, "training": HOLD | {"hold_sinks": hold}}
    for key, value in overrides.items():
        settings[key] = settings.get(key, {}) | value
    trainer = make(folder, **settings)
    alike(trainer.model.get_base_model(), share)
    trainer.train(resume)
    return trainer


def away(trainer, states):
    """How far a trained model has moved what its first tokens have in common."""
    sinks = Sinks(1.0)
    sinks.states = states
    rows = torch.stack([trainer.train_dataset[row]["input_ids"] for row in range(len(trainer.train_dataset))])
    with torch.no_grad(), sinks.watched(trainer.model) as first:
        trainer.model.get_base_model()(input_ids=rows)
    return float(sinks.distance({name: state.mean(0, keepdim=True) for name, state in first.items()}))


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    return run(folder), folder


def test_the_first_token_moves_less_where_it_is_held(held, tmp_path):
    """And records have the loss alone: the first step's gradient is another one, its recorded loss is not."""
    free, (trainer, folder) = run(tmp_path, hold=0.0), held
    states = trainer.sinks.states
    assert set(states) == {"0", "1"} and free.sinks.states == {}
    assert all(state.shape == (32,) and state.dtype == torch.float32 for state in states.values())
    assert 0 < away(trainer, states) < 0.5 * away(free, states)
    losses, others = ([record["loss"] for record in records(path)] for path in (folder, tmp_path))
    assert losses[0] == others[0] and losses[3] != others[3]


def test_a_model_without_sinks_has_none_to_hold(tmp_path):
    asked = run(tmp_path / "asked", share=0.0)
    assert asked.sinks.states == {}
    plain = run(tmp_path / "plain", hold=0.0, share=0.0)
    for one, other in zip(asked.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_holds_what_the_unbroken_one_held(held, tmp_path, step):
    """Before the cut, and after it: the base is another one by then, what is held is not."""
    whole, folder = held
    place(folder, step, tmp_path)
    again = run(tmp_path, resume=True)
    assert again.sinks.states.keys() == whole.sinks.states.keys()
    assert all(torch.equal(again.sinks.states[name], state) for name, state in whole.sinks.states.items())
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


PLAIN = {"lora": {"dropout": 0.0}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), **PLAIN)


@pytest.mark.parametrize(
    "other",
    [{"gradient_checkpointing": True}, {"batch_size": 1, "gradient_accumulation": 2}, {"offload": True}],
    ids=["recomputed", "accumulated", "offloaded"],
)
def test_other_ways_through_a_step_hold_the_same(plain, tmp_path, other):
    """The distance weighs so much that a wrong share of it would show."""
    two = run(tmp_path, **PLAIN, training=other)
    for first, second in zip(plain.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_padded_rows_are_held_by_their_first_token(tmp_path):
    trainer = run(tmp_path, data={"packing": "padded"})
    assert isinstance(trainer.train_dataset, type(ragged(2, 0)))
    assert set(trainer.sinks.states) == {"0", "1"}


def test_more_samples_than_float32_can_count_are_looked_at(tmp_path):
    trainer = make(tmp_path)
    alike(trainer.model.get_base_model())

    class Many(torch.utils.data.Dataset):
        last = 0

        def __len__(self):
            return 2**25 + 4  # minus 1 rounds up in float32

        def __getitem__(self, index):
            assert 0 <= index < len(self)
            self.last = index
            return trainer.train_dataset[index % len(trainer.train_dataset)]

    samples, sinks = Many(), Sinks(1.0)
    sinks.look(trainer.model, samples, nullcontext())
    assert samples.last == len(samples) - 1 and set(sinks.states) == {"0", "1"}


def test_the_distance_is_that_of_the_formula():
    sinks = Sinks(0.5)
    sinks.states = {"2": torch.tensor([3.0, 4.0]), "5": torch.tensor([0.0, 2.0])}
    caught = {"2": torch.tensor([[3.0, 9.0], [3.0, 4.0]]), "5": torch.tensor([[2.0, 2.0], [0.0, 2.0]])}
    # Layer 2: (25 + 0) / 2 / 25; layer 5: (4 + 0) / 2 / 4.
    assert float(sinks.distance(caught)) == pytest.approx(0.5 * (0.5 + 0.5) / 2)
    assert Sinks(0.5).distance({}) == 0.0


def test_hooks_are_gone_after_a_pass_that_fails(tmp_path):
    trainer = make(tmp_path, decisions=AT_ONCE, training=HOLD)
    sinks = Sinks(1.0)
    sinks.states = {"0": torch.ones(32)}
    with pytest.raises(ZeroDivisionError), sinks.watched(trainer.model):
        raise ZeroDivisionError
    layers: nn.ModuleList = trainer.model.get_base_model().model.layers
    assert not any(layer._forward_hooks for layer in layers)
