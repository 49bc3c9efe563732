"""Tokens and floating-point operations of each part of a run.

A product of [m, k] and [k, n] counts 2 m k n; what is no product (norms, activations, softmax) is left out. Attention
counts whole squares of tokens, as `torch.utils.flop_counter` does, though causal kernels skip nearly half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from atp.config.config import LoraSection
from atp.decide.scored import ScoredDecisions
from atp.plan.job import Workload
from atp.plan.shapes import Layers, LayerWidths
from atp.removal.certify import WINDOWS
from atp.removal.refit import DAMPINGS

ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass, as a multiple of those of its forward pass: 5 against 2, because fused kernels
compute the scores again."""


@dataclass(frozen=True)
class Flops:
    """Operations by where they happen, because each kind has a speed of its own.

    whole: in the layers of the whole model, in passes over calibration windows that measure saliency. step: there too,
    in LoRA steps, which have batches of their own. cut: in the layers of the cut model. head: in the product with the
    head. fitted: in the refit's passes. moments: in its products of inputs, in float32. solved: in its systems, in
    float64. certified: in the passes of the certificate, in float32 with its head. scored: in the layers of a model
    that is scored.
    """

    whole: float = 0.0
    step: float = 0.0
    cut: float = 0.0
    head: float = 0.0
    fitted: float = 0.0
    moments: float = 0.0
    solved: float = 0.0
    certified: float = 0.0
    scored: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(ours + theirs for ours, theirs in zip(self.by_kind, other.by_kind, strict=True)))

    def __mul__(self, times: float) -> Flops:
        return Flops(*(done * times for done in self.by_kind))

    @property
    def by_kind(self) -> tuple[float, ...]:
        """All kinds, in the order above."""
        layers = self.whole, self.step, self.cut, self.head
        return *layers, self.fitted, self.moments, self.solved, self.certified, self.scored

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.by_kind)


@dataclass(frozen=True)
class PhaseCost:
    """A part of a run: LoRA steps (0 where it has none), tokens that it reads, operations."""

    phase: str
    steps: int
    tokens: int
    flops: Flops


def linear(widths: LayerWidths) -> float:
    """Of the frozen linears of a layer, per token, and of the experts that it takes."""
    return 2.0 * widths.active


def adapter(widths: LayerWidths, lora: LoraSection) -> float:
    """Of LoRA on a layer, per token: r times inputs for S = x A^T, r times outputs for S B^T."""
    return 2.0 * widths.adapter(lora.r, widths.experts.taken if lora.experts and widths.experts else 0)


def attention(widths: LayerWidths, length: float) -> float:
    """Of scores and weighted values of a layer, per token: each of them reads `length` tokens."""
    return 2.0 * length * widths.heads * (widths.qk_dim + widths.v_dim)


def moments(tokens: float, kept: int, outputs: int) -> float:
    """Of the products of a linear's kept inputs with themselves and with what its outputs lack."""
    return 2.0 * tokens * kept * (kept + outputs)


def solution(kept: int, outputs: int) -> float:
    """Of what the refit adds to the weights of the kept inputs at one damping."""
    return 2 / 3 * kept**3 + 2.0 * kept**2 * outputs


class Cost:
    """The operations of one token in each kind of pass."""

    def __init__(self, job: Workload) -> None:
        self.job, self.lora = job, job.config.lora
        self.whole, self.cut = job.shapes.whole, job.shapes.kept
        config = job.shapes.config
        self._head = 2.0 * config.hidden_size * config.vocab_size

    def forward(self, layers: Layers, *, lora: bool = True, scored: float = 1.0) -> Flops:
        """A pass without gradients. scored: share of the tokens whose logits are computed."""
        total = sum(
            linear(widths) + attention(widths, self.job.sample) + (adapter(widths, self.lora) if lora else 0)
            for widths in layers
        )
        return self._flops(layers, total, scored * self._head)

    def score(self, layers: Layers, *, lora: bool = True, scored: float = 1.0) -> Flops:
        """The same where models are scored, in batches of their own."""
        found = self.forward(layers, lora=lora, scored=scored)
        return Flops(scored=found.whole + found.cut, head=found.head)

    def step(self, layers: Layers, *, share: float = 1.0) -> Flops:
        """Forward and backward of a LoRA step.

        The frozen linears pass gradients on but have none: twice the forward pass, of the `share` of them that hard
        masks keep. LoRA has three times its forward pass. Of logits and their gradients only those of scored tokens
        exist. The first layer's queries, keys and values pass nothing on. With gradient checkpointing all layers run
        forward twice.
        """
        total = 0.0
        for widths in layers:
            once = share * linear(widths) + adapter(widths, self.lora) + attention(widths, self.job.sample)
            total += once + share * linear(widths) + 2 * adapter(widths, self.lora)
            total += ATTENTION_BACKWARD * attention(widths, self.job.sample)
            if self.job.config.training.gradient_checkpointing:
                total += once
        total, head = total - self._first(layers[0], share), self._passes_of_head * self.job.scored * self._head
        if layers is self.cut:
            return Flops(cut=total, head=head)
        return Flops(step=total, head=head)

    def full_step(self) -> Flops:
        """Of a step that trains all weights of the cut model: two products backward for each forward."""
        total = 0.0
        for widths in self.cut:
            once = linear(widths) + attention(widths, self.job.sample)
            total += once + 2 * linear(widths) + ATTENTION_BACKWARD * attention(widths, self.job.sample)
            if self.job.config.training.gradient_checkpointing:
                total += once
        return Flops(cut=total, head=3 * self.job.scored * self._head)

    @property
    def _passes_of_head(self) -> int:
        """Products with the head in a LoRA step, whose gradient is one more where it is trained with the embeddings."""
        trained = self.job.config.training.embeddings and self.job.shapes.config.tie_word_embeddings
        return 3 if trained else 2

    def decision(self) -> Flops:
        """Forward and backward under a soft mask, through frozen weights and a frozen adapter."""
        total = sum(
            2 * linear(widths)
            + 2 * adapter(widths, self.lora)
            + (1 + ATTENTION_BACKWARD) * attention(widths, self.job.sample)
            for widths in self.whole
        )
        spared = self._first(self.whole[0], 1.0, frozen=True)
        return self._flops(self.whole, total - spared, 2 * self.job.scored * self._head)

    def refit(self, tokens: float) -> Flops:
        """Of the whole refit.

        Both models run once and the cut one's last linears again; moments of the kept inputs with themselves and with
        what is lost; for each damping and for the result a solution of the system, and for each damping its error.
        """
        found = Flops(fitted=2 * tokens * self.forward(self.whole, scored=0.0).whole)
        outputs = self.job.shapes.config.hidden_size
        for structure in self.job.shapes.space.structures:
            if structure.reader is None:
                continue
            reader = self.whole[structure.layer].linears[structure.reader]
            kept = self.cut[structure.layer].linears[structure.reader].in_features
            again = 2.0 * tokens * reader.out_features * reader.in_features
            found += Flops(
                fitted=again,
                moments=moments(tokens, kept, outputs),
                solved=(len(DAMPINGS) + 1) * solution(kept, outputs) + len(DAMPINGS) * 2.0 * kept**2 * outputs,
            )
        return found

    def _flops(self, layers: Layers, total: float, head: float) -> Flops:
        return Flops(cut=total, head=head) if layers is self.cut else Flops(whole=total, head=head)

    def _first(self, widths: LayerWidths, share: float, *, frozen: bool = False) -> float:
        """What the first layer is spared: gradients of the embeddings, through the base and through A.

        frozen: whether LoRA is too, whose B then passes nothing on either. Gradient checkpointing asks for the
        gradients of the embeddings, as their training does, and spares nothing.
        """
        training = self.job.config.training
        if training.gradient_checkpointing or (training.embeddings and not frozen):
            return 0.0
        spared = 0.0
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            rows, columns = widths.linears[name].out_features, widths.linears[name].in_features
            spared += 2.0 * share * rows * columns + 2.0 * self.lora.r * (columns + (rows if frozen else 0))
        return spared


def cost_of(job: Workload) -> list[PhaseCost]:
    """The parts of a run in order, as one process has them; texts that are generated are not counted."""
    return list(_rows(job))


def _rows(job: Workload) -> Iterator[PhaseCost]:
    cost, config, steps = Cost(job), job.config, job.phases
    decisions, training, evaluation = config.decisions, config.training, config.evaluation
    per_step = training.batch_size * training.gradient_accumulation * job.sample

    def row(phase: str, count: int, tokens: float, each: Flops) -> PhaseCost:
        return PhaseCost(phase, count, round(tokens), each * tokens)

    yield _scoring(job, "score", cost, cost.whole, lora=False)
    if evaluation.dense_baseline:
        yield row("dense baseline", steps.total, steps.total * per_step, cost.step(cost.whole))
        yield _scoring(job, "score dense", cost, cost.whole, lora=True)
    measured = job.share_of(decisions.saliency_windows) if job.measures_saliency else 0
    refitted, rounds = job.share_of(decisions.refit_windows), decisions.rounds or 1
    saliency = row("saliency", 0, (measured + (rounds - 1) * refitted) * job.calibrated, cost.decision())
    if decisions.source == "static" and decisions.path is None:
        yield saliency
    if steps.open:
        yield row("open", steps.open, steps.open * per_step, cost.step(cost.whole))
    if saliency.tokens and decisions.source != "static":
        yield saliency
    if steps.search:
        tokens = steps.search * per_step
        flops = cost.step(cost.whole, share=_share_in_search(job)) * tokens
        if decisions.source == "learned":
            flops += cost.decision() * (-(-steps.search // decisions.every) * decisions.batch_size * job.calibrated)
        yield PhaseCost("search", steps.search, round(tokens), flops)
    if refitted and job.refits:
        tokens = refitted * job.calibrated
        yield PhaseCost("refit", 0, round(rounds * tokens), cost.refit(tokens) * rounds)
    if steps.settle:
        masked = cost.step(cost.whole, share=job.shapes.share)
        yield row("settle", steps.settle, steps.settle * per_step, masked)
    if steps.tune:
        each = cost.full_step() if training.after_cut == "full" else cost.step(cost.cut)
        yield row("tune", steps.tune, steps.tune * per_step, each)
    if evaluation.every is not None:
        yield _validation(job, cost)
    # Logits of the masked model twice at the freeze and once at the cut; of the cut one then and four times at export.
    tokens = WINDOWS * job.calibrated
    passes = cost.forward(cost.whole) * 3 + cost.forward(cost.cut) * 5
    yield row("certificate", 0, tokens, Flops(certified=passes.total))
    yield _scoring(job, "score again", cost, cost.cut, lora=False)


def _scoring(job: Workload, phase: str, cost: Cost, layers: Layers, *, lora: bool) -> PhaseCost:
    """Windows, whose logits are all computed, and questions, of which only those of the answers are."""
    windows, questions = job.config.evaluation.windows * job.config.data.length, job.questions.tokens
    of_windows, of_questions = (cost.score(layers, lora=lora, scored=share) for share in (1.0, 0.0))
    return PhaseCost(phase, 0, windows + questions, of_windows * windows + of_questions * questions)


def _validation(job: Workload, cost: Cost) -> PhaseCost:
    """All scores on the validation split: each `every` steps, at the freeze, after the refit and at the cut."""
    steps, each = job.phases, job.config.evaluation.every or 1
    before = steps.cut_step // each + (2 if job.config.decisions.refit_windows else 1)
    if job.config.evaluation.dense_baseline:
        before += -(-steps.total // each)
    after = -(-steps.total // each) - steps.cut_step // each + 1
    tokens = (job.config.evaluation.validation_windows or 0) * job.sample
    flops = cost.score(cost.whole) * (before * tokens) + cost.score(cost.cut) * (after * tokens)
    return PhaseCost("validation", 0, round((before + after) * tokens), flops)


def _share_in_search(job: Workload) -> float:
    """The mean share of the frozen linears that the LoRA steps of the search compute with."""
    decisions, steps = job.config.decisions, job.phases.search
    if decisions.budget == "penalty" and decisions.source == "learned":
        return decisions.target_keep
    path = ScoredDecisions(job.shapes.space, decisions, search_steps=steps)
    masked = sum(path.target_at(step + 1) for step in range(steps)) / steps
    # A running saliency reads the gradient of a soft mask in every such step, which takes the whole linears.
    watched = 1 / decisions.every if decisions.source == "running" else 0.0
    return watched + (1 - watched) * masked
