"""Hard concrete gates: an L0 penalty on the LoRA part of removed decisions, in place of the group lasso.

Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312. A gate is z = min(1, max(0, s (zeta - gamma) + gamma)) with
s = sigmoid((log u - log(1 - u) + log_alpha) / temperature) and u uniform: it is exactly 0 and exactly 1 with positive
probability, and differentiable between. The penalty is the expected number of gates that are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from atp.decide.sampling import logistic_noise
from atp.ground.devices import upload
from atp.lora.layer import ADAPTER, MaskedPeftLinear
from atp.lora.regularizers.regularizer import Regularizer
from atp.processes import processes
from atp.spaces.space import MaskSpace

_GAMMA, _ZETA = -0.1, 1.1  # the ends of the stretched interval ...
_TEMPERATURE = 2 / 3  # ... and the temperature of the paper, section 4
_OPEN = 2.0  # log_alpha at first: P(z > 0) = 0.97 and a test-time gate of 0.96
# The test-time gate closes at log_alpha = -2.4. AdamW brings it there in about 20 steps, so short a search may be.
_LR = 0.2


def hard_concrete(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """Gates in [0, 1], like log_alpha and differentiable in it where they are neither 0 nor 1.

    noise: standard logistic noise log u - log(1 - u) like log_alpha (equations 10 and 11 of the paper). Without it the
    gates of test time, in which s is sigmoid(log_alpha) (equation 13).
    """
    s = torch.sigmoid(log_alpha if noise is None else (log_alpha + noise) / _TEMPERATURE)
    return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log_alpha - temperature * log(-gamma / zeta)), like log_alpha (equation 12 of the paper)."""
    return torch.sigmoid(log_alpha - _TEMPERATURE * math.log(-_GAMMA / _ZETA))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class L0Gates(Regularizer):
    """A gate for every cut of every decision, its noise, and the optimizer of `log_alpha`, float32 [gates].

    A cut of a decision owns what it owns in the group lasso: rows of B for an output cut, columns of A for an input
    cut. Only cuts of removed decisions are gated, and only in LoRA steps. A kept decision has no gate (1), and one
    that is removed again starts with an open gate. Decision steps and evaluations see no gates: they ask what a
    decision would contribute if it were kept. Build it on the device where the model trains.
    """

    def __init__(self, model: nn.Module, space: MaskSpace, *, seed: int) -> None:
        layers = {n.split(".layers.")[-1]: m for n, m in model.named_modules() if isinstance(m, MaskedPeftLinear)}
        device = next(model.parameters()).device
        self._cuts: list[tuple[MaskedPeftLinear, int, Tensor]] = []
        decisions = []
        for structure in space.to(device).structures:
            for cut in structure.cuts if structure.size else ():
                if cut.module not in space.adapted:
                    continue
                layer = layers[f"{structure.layer}.{cut.module}"]
                self._cuts.append((layer, cut.axis, cut.owner))
                decisions.append(torch.arange(structure.start, structure.start + structure.size, device=device))
        self._sizes = [len(part) for part in decisions]
        self._decision_of_gate = torch.cat(decisions)
        self.log_alpha = nn.Parameter(torch.full((len(self._decision_of_gate),), _OPEN, device=device))
        self.parameters = [self.log_alpha]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=_LR, weight_decay=0.0, fused=True)
        self.noise = torch.Generator().manual_seed(seed)

    @contextmanager
    def applied(self, mask: Tensor, *, sample: bool) -> Iterator[None]:
        """Multiplies LoRA rows and columns of removed decisions by their gates inside a with block.

        mask bool [space.size], True keeps. sample draws the gates of a LoRA step; the backward pass belongs inside the
        block and adds to the gradient of log_alpha. Without sample the gates are those of test time.
        """
        removed = self._removed(mask)
        noise = None
        if sample:
            with torch.no_grad():
                self.log_alpha.masked_fill_(~removed, _OPEN)
            noise = upload(logistic_noise(len(removed), self.noise), removed.device)
        gates = torch.where(removed, hard_concrete(self.log_alpha, noise), 1.0)
        for layer, axis, gate in self._by_cut(gates):
            layer.set_gate(axis, gate)
        try:
            yield
        finally:
            for layer, axis, _ in self._cuts:
                layer.set_gate(axis, None)

    def penalty(self, mask: Tensor) -> Tensor:
        """The expected number of open gates of removed decisions, scalar float32. mask bool [space.size]."""
        return torch.where(self._removed(mask), open_probability(self.log_alpha), 0.0).sum()

    def after_step(self, mask: Tensor, weight: float, skip: Tensor) -> dict[str, Tensor]:
        """One optimizer step of log_alpha on the LoRA loss + weight * penalty; returns the penalty before it as `l0`.

        The penalty is no function of the model, so its gradient is added here and not to the loss of a batch. Nothing
        changes in a skipped step or if a gradient is not finite.
        """
        processes.average_(self.log_alpha.grad)
        penalty = self.penalty(mask)
        (weight * penalty).backward()
        bad = ~torch.isfinite(_gradient(self.log_alpha)).all()
        self.optimizer.found_inf = torch.maximum(skip, bad.float())  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"l0": penalty.detach()}

    @torch.no_grad()
    def fold(self, mask: Tensor) -> None:
        """Folds gates that are closed at test time into the factors: rows and columns of removed cuts become zero.

        A partly open gate stays a gate: folded in, it would count twice in the next step.
        """
        closed = self._removed(mask) & (hard_concrete(self.log_alpha) == 0)
        for layer, axis, gate in self._by_cut(closed):
            factor = layer.get_parameter(f"lora_{'A' if axis else 'B'}.{ADAPTER}.weight")
            factor.masked_fill_(gate if axis else gate[:, None], 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """log_alpha, its moments and the state of the noise."""
        moments = self.optimizer.state_dict()["state"].get(0, {})
        return {"log_alpha": self.log_alpha.detach(), "noise": self.noise.get_state(), **moments}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        moments = {name: value for name, value in state.items() if name not in ("log_alpha", "noise")}
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.noise.set_state(state["noise"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: moments}, "param_groups": groups})

    def _removed(self, mask: Tensor) -> Tensor:
        """bool [gates] on the device: whose decision the mask removes."""
        return ~upload(mask, self.log_alpha.device)[self._decision_of_gate]

    def _by_cut(self, values: Tensor) -> Iterator[tuple[MaskedPeftLinear, int, Tensor]]:
        """(layer, axis, values of its rows or columns) of every cut, from values [gates]."""
        for (layer, axis, owner), part in zip(self._cuts, values.split(self._sizes), strict=True):
            yield layer, axis, part[owner]
