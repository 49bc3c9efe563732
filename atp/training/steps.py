"""What one LoRA step does, in order.

ATP runs `open_step`, `search_step`, `settle_step` and, after the cut, `tune_step`; every baseline runs `tune_step`
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atp.training.data import Batch
    from atp.training.loop import Loop
    from atp.training.pruning import Pruning


def open_step(loop: Loop, pruning: Pruning, batches: list[Batch]) -> None:
    """All structures in place: a plain LoRA step of the uncut model."""
    tokens = loop.scored_tokens(batches)
    for batch in loop.accumulate(batches):
        with pruning.open():
            loss = loop.loss(batch, tokens)
            loop.backward(loss)
    loop.clip()
    loop.skip_if_not_finite()
    loop.optimizer.step()


def search_step(loop: Loop, pruning: Pruning, batches: list[Batch]) -> None:
    """Decisions and adapter both learn: a decision step, then a LoRA step under the new hard mask."""
    beta = loop.config.training.beta
    pruning.decide(loop.step - loop.phases.open)
    tokens = loop.scored_tokens(batches)
    for batch in loop.accumulate(batches):
        with pruning.masked():
            loss = loop.loss(batch, tokens)
            loop.backward(loss)
    loop.clip()
    pruning.regularize(beta)
    skip = loop.skip_if_not_finite(pruning.uncut.regularizer.parameters)
    loop.optimizer.step()
    pruning.after_step(beta, skip)


def settle_step(loop: Loop, pruning: Pruning, batches: list[Batch]) -> None:
    """Decisions are frozen: a LoRA step under their mask, then removed LoRA groups shrink towards zero."""
    beta = loop.config.training.settle_beta
    tokens = loop.scored_tokens(batches)
    for batch in loop.accumulate(batches):
        with pruning.masked():
            loss = loop.loss(batch, tokens)
            loop.backward(loss)
    loop.clip()
    pruning.regularize(beta)
    skip = loop.skip_if_not_finite(pruning.uncut.regularizer.parameters)
    loop.optimizer.step()
    pruning.after_step(beta, skip)
    pruning.shrink(steps_left=loop.phases.cut_step - loop.step)


def tune_step(loop: Loop, batches: list[Batch]) -> None:
    """A plain LoRA step, of the cut model or of a baseline's."""
    tokens = loop.scored_tokens(batches)
    for batch in loop.accumulate(batches):
        loss = loop.loss(batch, tokens)
        loop.backward(loss)
    loop.clip()
    loop.skip_if_not_finite()
    loop.optimizer.step()
