"""Keeps attention sinks where they are: on the first token of a sequence.

In most models the first token gets, whichever it is, the same state of enormous norm in the middle layers, and
attention that looks for nothing else rests on it (attention sinks, arXiv 2309.17453; massive activations, arXiv
2402.17762). Nothing in the loss of a task holds it there. Once LoRA has moved it, other tokens take its place, and
which ones do changes from one step to the next: gradients grow a hundredfold (dev/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from atp.data import collate
from atp.training.loss import causal_of, head_inputs

_SPREAD = 0.05  # squared distance of a first token's state from their mean over its square: below it they are one
_TOKENS = 64  # of the training samples, and of the vocabulary


class Sinks:
    """What the first token's state was when training began, in the layers where it is the same for all tokens.

    weight: of the distance to it in the loss; 0: nothing is looked at or held. A model without sinks has none to hold.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.states: dict[str, Tensor] = {}  # layer -> float32 [hidden]; by name, as checkpoints have them

    def look(self, model: nn.Module, samples: Dataset, autocast: AbstractContextManager[Any]) -> None:
        """Takes the states from a model as it is. samples: of training, whose first tokens count."""
        if not self.weight:
            return
        count = len(samples)  # type: ignore[arg-type]
        places = torch.linspace(0, count - 1, _TOKENS, dtype=torch.float64).long().tolist()
        first = torch.stack([samples[place]["input_ids"][0] for place in places])
        # Samples may all begin alike, and then every layer has one state for them: other tokens tell sinks apart.
        generator = torch.Generator().manual_seed(0)
        base: Any = causal_of(model)
        others = torch.randint(base.config.get_text_config().vocab_size, (_TOKENS,), generator=generator)
        batch = collate([{"input_ids": token, "labels": token} for token in torch.cat([first, others])[:, None]])
        device = next(model.parameters()).device
        on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        with torch.no_grad(), autocast, self._caught(model) as caught:
            head_inputs(model, on_device)
        for name, states in caught.items():
            mean = states.mean(0)
            spread = (states - mean).square().sum(-1).median() / mean.square().sum()
            if float(spread) < _SPREAD:
                self.states[name] = states[:_TOKENS].mean(0)

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Around a forward pass: yields {layer: float32 [rows, hidden], the first token's states}, for `distance`."""
        if not self.states:
            yield {}
            return
        with self._caught(model) as caught:
            yield caught

    def distance(self, caught: dict[str, Tensor]) -> Tensor | float:
        """The weighted mean squared distance of caught states to those of the beginning, over the latter's square."""
        parts = [
            (caught[name] - state).square().sum(-1).mean() / state.square().sum() for name, state in self.states.items()
        ]
        return self.weight * torch.stack(parts).mean() if parts else 0.0

    @contextmanager
    def _caught(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        caught: dict[str, Tensor] = {}

        def catch(name: str) -> Any:
            def hook(layer: Any, arguments: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                caught[name] = states[:, 0].float()

            return hook

        base: Any = causal_of(model)
        wanted = ((str(index), layer) for index, layer in enumerate(base.get_decoder().layers))
        handles = [
            layer.register_forward_hook(catch(name)) for name, layer in wanted if not self.states or name in self.states
        ]
        try:
            yield caught
        finally:
            for handle in handles:
                handle.remove()
