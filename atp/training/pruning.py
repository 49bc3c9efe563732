"""What ATP adds to LoRA training until the cut: decisions, masks, the regularizer, the freeze and the shrinking.

`search_step` and `settle_step` of `atp.training.steps` call these parts in order; `atp.integrations` calls them from
the hooks of somebody else's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.config import DecisionsConfig, TrainingConfig
from atp.data import collate
from atp.decide.budget import Budget
from atp.decide.decisions import Decisions
from atp.decide.given import GivenDecisions, given_mask
from atp.decide.maker import DecisionMaker, frozen
from atp.decide.saliency import fisher_saliency, saliency_logits, squares
from atp.decide.scored import ScoredDecisions
from atp.evaluation.inference import CausalLM, inference
from atp.ground.devices import for_float64, upload
from atp.lora.controller import MaskController
from atp.lora.regularizers import Regularizer, make_regularizer
from atp.lora.regularizers.lasso import LoraGroups
from atp.processes import processes
from atp.removal import cut_model
from atp.removal.certify import certificate_tokens
from atp.removal.refit import refit
from atp.sharding.shards import local, rows_of, store
from atp.spaces.space import MaskSpace
from atp.training.certificate import at_cut, at_freeze, masked_logits
from atp.training.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors, prefixed
from atp.training.cross_entropy import held_heads
from atp.training.data import Batch, batch_at, refit_batch, refit_orders, run_order, sized, to_device
from atp.training.loss import causal_lm_loss, causal_of
from atp.training.offload import Offload
from atp.training.profiling import scope
from atp.training.rounds import round_targets, undone


@dataclass
class Uncut:
    """What belongs to the uncut model: who puts masks on it, its LoRA groups, and their regularizer."""

    controller: MaskController
    groups: LoraGroups
    regularizer: Regularizer


class Pruning:
    """Decisions over a LoRA model, and what they change in its training steps.

    model: from `add_lora`, on the device where it trains. calibration: what decisions are judged on. autocast: the
    dtype of calibration passes, None for that of the weights. Of `training` it takes the length of the search, the
    regularizer and `max_bad_steps`. Steps are counted from the first one of the search.
    """

    def __init__(
        self,
        model: PeftModel,
        space: MaskSpace,
        calibration: Dataset,
        settings: DecisionsConfig,
        training: TrainingConfig,
        *,
        seed: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.space, self.calibration = space, calibration
        self.settings, self.training, self.seed = settings, training, seed
        self.device = next(model.parameters()).device
        self.autocast, self.offload = autocast, Offload(None)
        self.decisions = self._make_decisions()
        self._watching = False  # whether the running saliency looks at this step
        self.scored = False  # whether the decisions know the saliency that they start from
        # As many per process as the settings say, and as many in all when the run goes on in another number of them.
        self.decision_windows = settings.batch_size * processes.count()
        self.certificate: dict[str, Any] = {}
        self.refitted: list[str] = []  # base weights, by their names in the decoder, that the refit changed
        self.figures: dict[str, Tensor] = {}  # what steps have to say since the last record
        self.take(model)

    def take(self, model: PeftModel) -> None:
        """Makes an uncut model, on the device, the one that decisions are about; before any of them is under masks."""
        self.model: CausalLM = model
        groups = LoraGroups(model, self.space)
        regularizer = make_regularizer(self.training.regularizer, model, self.space, groups, seed=self.seed + 2)
        self._uncut: Uncut | None = Uncut(MaskController(model, self.space), groups, regularizer)

    @property
    def is_cut(self) -> bool:
        """Whether the model was cut; nothing is left to decide then."""
        return self._uncut is None

    @property
    def uncut(self) -> Uncut:
        """Masks, groups and regularizer, until the cut."""
        assert self._uncut is not None, "the model is cut"
        return self._uncut

    @held_heads()
    def start(self) -> None:
        """Gives the decisions what they start from: another run's mask, or the saliency of the calibration data.

        Those that collect their own saliency start from nothing.
        """
        self.scored = True
        if isinstance(self.decisions, GivenDecisions):
            self.decisions.give(processes.from_main(given_mask(self.settings, self.space), "decisions"))
            return
        if self.settings.source == "running" or (self.settings.source == "learned" and self.settings.init == "paper"):
            return
        self.decisions = self._make_decisions(self._saliency(self.settings.saliency_windows))

    def _saliency(self, windows: int, at: Tensor | None = None) -> Tensor:
        count = min(windows, sized(self.calibration))
        with frozen(self.model):
            saliency = fisher_saliency(
                self.space, self._windows(count), self.calibration_loss, at=at, among=count, blocks=self.settings.blocks
            )
        self.uncut.controller.clear()
        return processes.from_main(saliency, "saliency")

    def _make_decisions(self, saliency: Tensor | None = None) -> Decisions:
        if self.settings.path is not None:
            return GivenDecisions(self.space, self.settings, search_steps=0, device=for_float64(self.device))
        if self.settings.source != "learned":
            place = for_float64(self.device)
            scored = ScoredDecisions(self.space, self.settings, search_steps=self.training.search, device=place)
            if saliency is not None:
                scored.rescore(saliency)
            return scored
        prior = None if saliency is None else saliency_logits(saliency, Budget(self.space), self.settings)
        return self._make_learned(prior)

    def _make_learned(self, prior: Tensor | None) -> DecisionMaker:
        return DecisionMaker(
            self.space, self.settings, search_steps=self.training.search, prior=prior, seed=self.seed,
            max_bad_steps=self.training.max_bad_steps, device=for_float64(self.device),
        )  # fmt: skip

    # Parts of a step

    def decide(self, step: int) -> None:
        """A decision step, if decisions are learned, and a new hard mask, in every `decisions.every`-th search step."""
        self._watching = self.settings.source == "running" and step % self.settings.every == 0
        if step % self.settings.every:
            return
        self.figures |= self.decisions.learn(step, self._judged(step // self.settings.every))
        with scope("masks"):
            self.decisions.refresh(step)

    @contextmanager
    def _judged(self, index: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """The loss of a soft mask on the calibration samples of a decision step, while nothing else is trained."""
        batch, weight = self._decision_batch(index)
        try:
            with frozen(self.model), scope("masks"):
                yield lambda mask: weight * self.calibration_loss(batch, mask)
        finally:
            self.uncut.controller.clear()

    @contextmanager
    def open(self) -> Iterator[None]:
        """No mask, around forward and backward of one batch; a running saliency sees what each decision is worth."""
        with self._observed() if self.settings.source == "running" else nullcontext():
            yield

    @contextmanager
    def masked(self) -> Iterator[None]:
        """The hard mask and the regularizer's part of the forward pass, around forward and backward of one batch."""
        with (
            self._watched() if self._watching and not self.decisions.frozen else self._hard(),
            self.uncut.regularizer.applied(self._mask_on_device(), sample=True),
        ):
            yield

    @contextmanager
    def still(self) -> Iterator[None]:
        """The hard mask and the regularizer as they are, with nothing drawn, around passes that train nothing."""
        with self._hard(), self.uncut.regularizer.applied(self._mask_on_device(), sample=False):
            yield

    @contextmanager
    def _hard(self) -> Iterator[None]:
        with scope("masks"):
            # Slices are copies that outlive a pass; of gathered weights nothing may.
            self.uncut.controller.set(self.decisions.mask, "base" if processes.sharded() else "hard")
        try:
            yield
        finally:
            self.uncut.controller.clear()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The hard mask on the sums, around which the running saliency sees what each kept decision is worth."""
        with scope("masks"):
            self.uncut.controller.set(self._mask_on_device(), "sum")
        try:
            with self._observed():
                yield
        finally:
            self.uncut.controller.clear()

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Gradients of a mask of ones for each sample, whose squares the running saliency takes after the backward."""
        observer, samples = self.uncut.controller.observer, self.training.batch_size
        with observer.observing(samples) as sums:
            yield
        with scope("masks"):
            # One process sees the batches of all one after another, each with its share of the loss.
            gradients = observer.gradients(sums) / processes.count()
            square = squares(gradients, self.space, blocks=self.settings.blocks).sum(0) * samples
            for of_one in processes.gather(square):
                self.decisions.observe(of_one)

    def regularize(self, weight: float) -> None:
        """Adds the regularizer's gradient to clipped gradients."""
        with scope("loss"):
            self.figures |= self.uncut.regularizer.add_gradient(self._mask_on_device(), weight)

    def after_step(self, weight: float, skip: Tensor) -> None:
        """Trains what the regularizer has to train, after the optimizer step. skip: 1 for a step that was skipped."""
        with scope("optimizer"):
            self.figures |= self.uncut.regularizer.after_step(self._mask_on_device(), weight, skip)

    def shrink(self, steps_left: int) -> None:
        """Shrinks removed LoRA groups after an optimizer step, to exact zero when no step is left but this one."""
        with scope("optimizer"):
            mask = self._mask_on_device()
            self.uncut.regularizer.fold(mask)
            largest = self.uncut.groups.largest_removed_norm(mask)
            # The last threshold is doubled: rounding in the norm must not leave a remainder.
            self.uncut.groups.prox_(mask, largest / steps_left if steps_left > 1 else 2 * largest)

    def record(self, step: int) -> dict[str, Any]:
        """Figures of the steps since the last record, the first of `step` finished ones, and what is kept."""
        found = {name: float(value) for name, value in self.figures.items()} | self.decisions.record(step)
        self.figures = {}
        return found | {"kept_by_layer": self.space.kept_by_layer(self.decisions.mask)}

    def _mask_on_device(self) -> Tensor:
        return upload(self.decisions.placed, self.device)

    # Between phases

    @held_heads()
    def judge_in_rounds(self, timed: Callable[[str], AbstractContextManager[None]]) -> None:
        """All rounds but the last: each cuts to a share, refits, and takes the saliency of what is left.

        timed: counts the seconds of a with block towards a part of the run.
        """
        for share in round_targets(self.settings.target_keep, self.settings.rounds or 1):
            mask = self.decisions.at(share)
            with undone(self.decoder, self.space):
                with timed("refit"):
                    self._refit(mask)
                with timed("saliency"):
                    self.decisions.rescore(self._saliency(self.settings.refit_windows, mask))
            self.uncut.controller.forget()

    def freeze(self) -> None:
        """Fixes the decisions, exactly on budget, and measures what the cut would change before settling."""
        mask, tokens = self.decisions.freeze(), self.certificate_tokens()
        with self.uncut.regularizer.applied(mask, sample=False):
            reference = masked_logits(self.model, self.uncut.controller, mask, tokens)
        self.certificate |= at_freeze(reference, self.model, self.uncut.controller, mask, tokens)

    def refit(self) -> None:
        """Fits the ends of blocks to what the cut loses, now that no decision moves any more."""
        self.refitted = list(self._refit(self.decisions.mask))

    def _refit(self, mask: Tensor) -> dict[str, Tensor]:
        count = min(self.settings.refit_windows, sized(self.calibration))
        orders = refit_orders(self.calibration, count, self.seed + 1)
        mine = (orders[number] for number in processes.shares(len(orders))[0])
        batches = (refit_batch(self.calibration, rows, self.device) for rows in mine)
        with inference(self.model, self.autocast):
            fitted = refit(
                self.decoder, self.uncut.controller, self.space, mask, batches,
                among=len(orders), aside=self.offload.aside,
            )  # fmt: skip
        self.uncut.controller.forget()
        return fitted

    def cut(self, swap: Callable[[PeftModel], None]) -> PeftModel:
        """Cuts the settled model and measures that nothing changed; returns the smaller one, adapter included.

        swap: called with it before the measurement, so that the caller lets go of the uncut model. Raises `NotReached`
        if the cut changes the logits.
        """
        mask, tokens = self.decisions.mask, self.certificate_tokens()
        left = float(self.uncut.groups.largest_removed_norm(self._mask_on_device()))
        reference = masked_logits(self.model, self.uncut.controller, mask, tokens)
        smaller = self.become_cut()
        swap(smaller)
        self.certificate |= at_cut(reference, smaller, tokens, left)
        return smaller

    def become_cut(self) -> PeftModel:
        """Takes the smaller model and drops all that belongs to the uncut one."""
        cut = cut_model(self.model, self.space, self.decisions.mask, spend=True)
        assert isinstance(cut, PeftModel), "an adapter stays around the cut model"
        self.model = cut
        self._uncut = None
        return cut

    # Calibration data

    @property
    def decoder(self) -> PreTrainedModel:
        """The decoder inside causal LM and adapter."""
        decoder: PreTrainedModel = causal_of(self.model).get_decoder()
        return decoder

    def certificate_tokens(self) -> Tensor:
        """The windows that certificates are measured on, int64 [windows, tokens], on the device."""
        return certificate_tokens(self.calibration).to(self.device)

    def calibration_batch(self, index: int, size: int) -> Batch:
        """The calibration batch with this number, of `size` samples."""
        with scope("data"):
            return batch_at(self.calibration, index, size, self.seed + 1, self.device)

    def calibration_loss(self, batch: Batch, mask: Tensor) -> Tensor:
        """CE under a soft mask. The mask stays on the layers until the backward pass is over: checkpointing reruns."""
        self.uncut.controller.set(mask, "soft")
        precision = torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with precision, self.offload.saving(self.model):
            return causal_lm_loss(self.model, batch)

    def _windows(self, count: int) -> Iterator[Batch]:
        """This process's share of the first `count` calibration samples."""
        return (self.calibration_batch(index, 1) for index in processes.shares(count)[0])

    def _decision_batch(self, index: int) -> tuple[Batch, Tensor]:
        """This process's share of the calibration samples of a decision step, and the weight of their mean loss.

        The mean over processes of the weighted losses is the mean loss per scored token of all `decision_windows`.
        """
        size = self.decision_windows
        mine, spare = processes.shares(size)
        counted = mine[: len(mine) - spare]
        with scope("data"):
            numbers = run_order(self.calibration, size, 0, self.seed + 1).at(index * size, size)
            batch = to_device(collate([self.calibration[numbers[row]] for row in counted or mine]), self.device)
        tokens = torch.full((), float(len(batch["targets"]) if counted else 0), device=self.device)
        return batch, tokens * processes.count() / processes.sum_(tokens.clone())

    # Checkpoints

    def add_to(self, state: Checkpoint) -> None:
        """Adds decisions with what produces them, certificate and regularizer to a checkpoint."""
        decisions = self.decisions
        state.tensors["mask"] = decisions.mask
        self.add_refit(state)
        state.tensors |= decisions.state()
        for optimizer, names in decisions.optimizers():
            state.tensors |= prefixed("decision_optimizer", optimizer_tensors(optimizer, names))
        if not self.is_cut:
            state.tensors |= prefixed("regularizer", self.uncut.regularizer.state_dict())
        state.meta |= {
            "scored": self.scored,
            "decision_windows": self.decision_windows,
            "frozen": decisions.frozen,
            "certificate": self.certificate,
            "cut": self.is_cut,
            "finite_decisions": decisions.finite.state(),
        }

    def add_refit(self, state: Checkpoint) -> None:
        """Adds the base weights that the refit changed to a checkpoint, or this process's rows of them."""
        weights = dict(self.decoder.named_parameters())
        refitted = prefixed("refit", {name: weights[name] for name in self.refitted})
        if processes.sharded():
            state.shards = {name: local(weight) for name, weight in refitted.items()}
        else:
            state.tensors |= refitted

    def _load_refit(self, state: Checkpoint) -> None:
        weights = dict(self.decoder.named_parameters())
        names = [*state.part("refit"), *(name.removeprefix("refit.") for name in state.files.names())]
        if processes.sharded():
            for name in names:
                store(weights[name], state.rows(f"refit.{name}", rows_of(weights[name])))
        else:
            # In their place rather than into it: a quantized weight cannot hold what the refit made of it.
            every = slice(0, None)
            found = {name: state.rows(f"refit.{name}", every).to(self.device) for name in names}
            self.decoder.load_state_dict(found, strict=False, assign=True)
        self.refitted = names

    def load(self, state: Checkpoint) -> None:
        """The inverse of `add_to`, on the uncut model; cuts it if it was cut."""
        learned = self.settings.source == "learned"
        self.decisions = self._make_learned(state.tensors["generator.prior"]) if learned else self._make_decisions()
        self.decisions.load_state(state.tensors)
        for optimizer, names in self.decisions.optimizers():
            load_optimizer_tensors(optimizer, names, state.part("decision_optimizer"))
        self.scored = state.meta["scored"]
        self.decision_windows = state.meta["decision_windows"]
        self.decisions.mask = state.tensors["mask"].bool()
        self.decisions.frozen = state.meta["frozen"]
        self.decisions.finite.restore(state.meta["finite_decisions"])
        self.certificate = state.meta["certificate"]
        if state.meta["cut"]:
            self.become_cut()
        else:
            self.uncut.regularizer.load_state_dict(state.part("regularizer"))
        self._load_refit(state)
