"""What decisions are in a checkpoint: generator, its optimizer, its noise, the mask."""

from __future__ import annotations

from torch import Tensor

from atp.decide.maker import DecisionMaker
from atp.training.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `prefix.name`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def decision_tensors(decisions: DecisionMaker) -> dict[str, Tensor]:
    """The tensors from which `restore_decisions` goes on with the same decisions."""
    moments = optimizer_tensors(decisions.optimizer, _names(decisions))
    return {
        **prefixed("generator", decisions.generator.state_dict()),
        **prefixed("decision_optimizer", moments),
        "mask": decisions.mask,
        "rng.decision": decisions.noise.get_state(),
    }


def restore_decisions(decisions: DecisionMaker, state: Checkpoint) -> None:
    """The inverse of `decision_tensors`, on a `DecisionMaker` with the same settings and prior."""
    decisions.generator.load_state_dict(state.part("generator"))
    load_optimizer_tensors(decisions.optimizer, _names(decisions), state.part("decision_optimizer"))
    decisions.noise.set_state(state.tensors["rng.decision"])
    decisions.mask = state.tensors["mask"].bool()
    decisions.frozen = state.meta["frozen"]
    decisions.finite.restore(state.meta["finite_decisions"])


def _names(decisions: DecisionMaker) -> list[str]:
    return [name for name, _ in decisions.generator.named_parameters()]
