"""Gradients averaged over processes: the same pieces in every step, sent while the backward pass goes on."""

import pytest
import torch
from torch import nn

from atp.processes import processes
from atp.training import exchange
from atp.training.exchange import Exchange


class Sum:
    """What three processes with the same gradients would get; known once it has been waited for."""

    def __init__(self, tensor):
        self.tensor = tensor

    def wait(self):
        self.tensor *= 3


@pytest.fixture
def sent(monkeypatch):
    """The tensors that are sent, as they were."""
    found = []

    def begin(tensor):
        found.append(tensor.clone())
        return Sum(tensor)

    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "begin_sum", begin)
    monkeypatch.setattr(exchange, "_PIECE_BYTES", 4 * 60)  # two of the layers below
    return found


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(5)))


def backward(layers, averaging=None):
    loss = layers(torch.arange(10.0).view(2, 5)).square().mean()
    if averaging is None:
        loss.backward()
        return
    with averaging.during_backward():
        loss.backward()


def step(layers, averaging):
    layers.zero_grad()
    backward(layers, averaging)


def test_gradients_are_means_in_pieces_from_the_last_layer_on(sent):
    layers, alone, seen = model(), model(), []
    averaging = Exchange(layers.parameters())
    layers[0].weight.register_hook(lambda gradient: seen.append(len(sent)))
    step(layers, averaging)
    assert seen == [2], "pieces leave before the backward pass has ended"
    backward(alone)
    for ours, theirs in zip(layers.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)
    gradients = [p.grad for p in alone.parameters()][::-1]
    assert [piece.numel() for piece in sent] == [60, 60, 30]
    assert torch.equal(torch.cat(sent), torch.cat([g.flatten() for g in gradients]))


def test_pieces_are_the_same_in_every_step_and_after_every_start(sent):
    layers = model()
    averaging = Exchange(layers.parameters())
    for _ in range(3):
        step(layers, averaging)
    again = model()
    step(again, Exchange(again.parameters()))
    for number, piece in enumerate(sent):
        assert len(sent) == 12 and torch.equal(piece, sent[number % 3])


def test_only_the_last_batch_of_a_step_is_sent_with_what_the_others_added(sent):
    layers, alone = model(), model()
    averaging = Exchange(layers.parameters())
    backward(layers)
    assert not sent
    backward(layers, averaging)
    backward(alone), backward(alone)
    for ours, theirs in zip(layers.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


def test_parameters_without_gradients_and_frozen_ones_are_left_out(sent):
    layers = model()
    layers[0].requires_grad_(False)
    unused = nn.Linear(3, 3)
    averaging = Exchange([*layers.parameters(), *unused.parameters()])
    step(layers, averaging)
    assert sum(piece.numel() for piece in sent) == 4 * 30 and unused.weight.grad is None


def test_nothing_is_sent_after_an_error(sent):
    layers = model()
    averaging = Exchange(layers.parameters())
    with pytest.raises(ZeroDivisionError), averaging.during_backward():
        raise ZeroDivisionError
    assert not sent
    backward(layers)
    assert not sent, "and later backward passes are those of no step"


def test_one_process_sends_nothing(sent, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 1)
    layers = model()
    step(layers, Exchange(layers.parameters()))
    assert not sent and layers[0].weight.grad is not None
