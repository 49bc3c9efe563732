"""The most memory that each part of a run takes, in bytes: what it holds throughout, and its largest moment.

Every formula is a sum of tensors that exist at the same time, by the code that makes them; libraries, buffers of single
operations and what an allocator keeps of freed memory are left out. On a CUDA device the figures are those of the
device, and what lies on the host (reference logits, checkpoints) is left out too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from atp.families import family_of
from atp.plan.activations import Pass, kept_by_saliency, kept_by_training
from atp.plan.job import Job
from atp.plan.shapes import LayerWidths
from atp.removal.certify import WINDOWS
from atp.training.cross_entropy import CHUNK_BYTES

Parts = dict[str, float]
"""Bytes by what they are for."""

_FLOAT, _DOUBLE = 4, 8
_ADAPTER = 4  # PEFT keeps LoRA in float32 whatever the base is
_MOMENTS = 2 * _FLOAT  # of AdamW, for each LoRA parameter
_ROWS = 4096  # tokens that the refit multiplies at once


def memory_of(job: Job) -> list[dict[str, object]]:
    """For each part of the run, in order: its name, its bytes at the peak, and the parts that these consist of."""
    return [
        {
            "phase": name,
            "bytes": round(sum(parts.values())),
            "parts": {part: round(n) for part, n in parts.items() if n},
        }
        for name, parts in _Memory(job).phases()
    ]


class _Memory:
    def __init__(self, job: Job) -> None:
        self.job, self.shapes, self.training = job, job.shapes, job.config.training
        self.weight = job.dtype.itemsize
        self.product = (job.autocast or job.dtype).itemsize
        self.hidden, self.vocab = job.shapes.config.hidden_size, job.shapes.config.vocab_size
        self.rank, self.length = job.config.lora.r, job.config.data.length
        self.batch = self.training.batch_size * self.length
        self.on_host = 0 if job.device == "cuda" else 1
        apart = job.config.data.packing == "separate" or _slides(job, self.length)
        self.how = Pass(
            self.product, self.weight, self.rank, dropout=job.config.lora.dropout > 0, expanded=apart,
            rows=self.training.batch_size,
        )  # fmt: skip

    def phases(self) -> Iterator[tuple[str, Parts]]:
        """The parts of a run that happen, in order."""
        job, steps = self.job, self.job.phases
        whole, kept = job.shapes.whole, job.shapes.kept
        divides = family_of(job.shapes.config).logits_divisor(job.shapes.config) != 1
        yield "score", self._weights(job.before) | self._scoring(divided=divides)
        static = job.config.decisions.source == "static"
        if static:
            yield "saliency", self._held(whole, begun=False) | self._decision(1)
        if steps.open:
            yield "open", self._training(whole, taught=False)
        if job.measures_saliency and not static:
            yield "saliency", self._held(whole) | (self._left_by_open() if steps.open else {}) | self._decision(1)
        if job.teaches:
            # All merged weights exist before the first is cast.
            yield "teacher", self._held(whole) | {"merged": whole.weights * job.shapes.layers * self.weight}
        if steps.search:
            yield "search", self._training(whole, taught=True, slices=1.0)
        if job.config.decisions.refit_windows:
            slices = self._slices(1.0) if steps.search else {}
            yield "refit", self._held(whole, taught=True) | slices | self._refit()
        if steps.settle:
            yield "settle", self._training(whole, taught=True, slices=job.shapes.share)
        yield "cut", self._held(whole, taught=True) | self._cut()
        if steps.tune:
            yield "tune", self._training(kept, taught=True)
        yield "export", self._held(kept, taught=True) | self._export()
        yield (
            "score again",
            self._held(kept, taught=True) | {"reloaded": self._reloaded()} | self._scoring(divided=True),
        )

    # What is held throughout

    def _weights(self, parameters: dict[str, int]) -> Parts:
        return {"weights": parameters["total"] * self.weight}

    def _held(self, widths: LayerWidths, *, taught: bool = False, begun: bool = True) -> Parts:
        """Weights and adapter; optimizer state once training has `begun`; the teacher if `taught` and there is one.

        The teacher copies the linears of the whole model in the dtype of the products and shares the rest. AdamW has
        two moments of each LoRA parameter from the first step on.
        """
        job, cut = self.job, widths is self.shapes.kept
        adapter = widths.adapter(self.rank) * self.shapes.layers
        begun = begun and (cut or job.phases.cut_step > 0)
        held = self._weights(job.after if cut else job.before) | {"adapter": adapter * _ADAPTER}
        held["optimizer"] = adapter * _MOMENTS if begun else 0
        if taught and job.teaches:
            held["teacher"] = self.shapes.whole.weights * self.shapes.layers * self.product
        return held

    def _casts(self, widths: LayerWidths) -> Parts:
        """Under autocast a linear keeps its frozen weight in the narrow dtype too; LoRA factors are cast in a pass."""
        if self.product >= self.weight:
            return {}
        return {"casts": (widths.weights + widths.adapter(self.rank)) * self.shapes.layers * self.product}

    def _slices(self, share: float) -> Parts:
        """What hard masks keep of the frozen linears, gathered in the dtype of the products."""
        return {"slices": share * self.shapes.whole.weights * self.shapes.layers * self.product}

    # Moments

    def _training(self, widths: LayerWidths, *, taught: bool, slices: float = 0.0) -> Parts:
        """A LoRA step with its gradients, or the checkpoint after it: the larger one."""
        job, cut = self.job, widths is self.shapes.kept
        held = self._held(widths, taught=taught)
        held |= self._slices(slices) if slices else self._casts(widths)
        step = {"gradients": widths.adapter(self.rank) * self.shapes.layers * _FLOAT}
        how = replace(self.how, masked=slices > 0)
        each = kept_by_training(self.shapes, widths, how)
        moments = [step | self._pass(each, widths, self.batch, taught and job.teaches)]
        if slices == 1.0 and job.config.decisions.source == "learned":
            moments.append(self._decision(job.config.decisions.batch_size))
        moments.append({"checkpoint": self._checkpoint(widths, taught and job.teaches, refitted=cut)})
        return held | max(moments, key=_total)

    def _pass(self, each: float, widths: LayerWidths, tokens: int, teacher: bool) -> Parts:
        """Activations of a forward pass, and what is largest beside them: the loss or the first layer backward.

        each: bytes per token and layer. With gradient checkpointing a layer keeps its input alone, and one layer at a
        time is computed again.
        """
        layers = self.shapes.layers
        recomputed = 0.0
        if self.training.gradient_checkpointing:
            recomputed, each = each * tokens, self.hidden * self.weight
        inner = widths.linears["mlp.down_proj"].in_features
        backward = recomputed + tokens * (2 * inner * self.product + 3 * self.hidden * self.weight)
        loss = self._loss(tokens, teacher)
        beside = {"logits": loss} if loss >= backward else {"backward": backward}
        return {"activations": each * tokens * layers} | beside

    def _loss(self, tokens: int, teacher: bool) -> float:
        """The chunked cross-entropy: logits of one chunk, states and their gradients, the head in the narrow dtype.

        With a teacher a chunk also has its logits, and log q and q in float32. On a CUDA device the softmax takes twice
        the logits on top.
        """
        scored = max(round(tokens * self.job.scored), 1)
        rows = max(min(CHUNK_BYTES["cpu" if self.on_host else "cuda"] // (self.product * self.vocab), scored), 1)
        chunk = rows * self.vocab
        wide = max(self.product, _FLOAT)
        logits = chunk * self.product * (1 if self.on_host else 3)
        logits += chunk * (self.product + 2 * wide) if teacher else 0
        states = scored * self.hidden * self.weight * (3 if teacher else 2)
        casts = self.vocab * self.hidden * self.product * (3 if teacher else 2) if self.product < self.weight else 0
        return logits + states + casts

    def _left_by_open(self) -> Parts:
        """Narrow weights of the open phase that saliency leaves alone: those of linears without a soft mask."""
        softly = {cut.module for s in self.shapes.space.layer(0) for cut in s.cuts if cut.soft}
        others = [linear for name, linear in self.shapes.whole.linears.items() if name not in softly]
        weights = sum(linear.out_features * linear.in_features for linear in others)
        return {"casts": weights * self.shapes.layers * self.product if self.product < self.weight else 0}

    def _decision(self, windows: int) -> Parts:
        """Forward and backward of calibration windows under a soft mask; LoRA is frozen and has no gradients.

        Under autocast each linear then keeps a narrow weight with the adapter merged in.
        """
        each = kept_by_saliency(self.shapes, replace(self.how, rows=windows, dropout=False))
        whole = self.shapes.whole
        merged = whole.weights * self.shapes.layers * self.product if self.product < self.weight else 0
        return {"merged": merged} | self._pass(each, whole, windows * self.length, teacher=False)

    def _refit(self) -> Parts:
        """All calibration windows at once, on the widest of the two linears that end a block.

        Held are the hidden states of the whole and of the cut model, their difference, and the linear's inputs, the
        latter two once more in one piece. The solver works in float64 on [kept, kept] and [kept, hidden]: sums for most
        windows and for those held out, the damped matrix, its factors, and solutions.
        """
        tokens = self.job.config.decisions.refit_windows * self.length
        readers = [s.reader for s in self.shapes.space.layer(0) if s.reader is not None]
        read = max((self.shapes.whole.linears[name].in_features for name in readers), default=0)
        kept = max((self.shapes.kept.linears[name].in_features for name in readers), default=0)
        stream, inputs = tokens * self.hidden * self.weight, tokens * read * self.product
        products = _FLOAT * (kept * kept + kept * self.hidden + min(_ROWS, tokens) * (kept + self.hidden))
        solving = _DOUBLE * 4 * (kept * kept + kept * self.hidden)
        return {"windows": 3 * stream + inputs, "solve": max(stream + inputs + products, solving)}

    def _cut(self) -> Parts:
        """The cut linears and their adapter beside the whole ones, and the logits that certify that nothing changed."""
        kept, layers = self.shapes.kept, self.shapes.layers
        changed = [name for name, linear in kept.linears.items() if linear != self.shapes.whole.linears[name]]
        weights = sum(kept.linears[name].out_features * kept.linears[name].in_features for name in changed)
        return {
            "cut weights": layers * (weights * self.weight + kept.adapter(self.rank) * (_ADAPTER + _MOMENTS)),
            "certificate": self._reference(),
        }

    def _reference(self) -> float:
        """Reference logits of the certificate's windows on the host, and of one window at a time, with a difference.

        The class of cut models divides its logits, so there are two of them then.
        """
        window = self.length * self.vocab * _FLOAT
        return window * (WINDOWS * self.on_host + 3)

    def _export(self) -> Parts:
        """The linears with the adapter merged in; once they are saved, the reloaded model takes their place."""
        kept = self.shapes.kept
        merged = kept.weights * self.shapes.layers * self.weight + 2 * _DOUBLE * kept.largest()
        reloaded = self.job.after["total"] * self.weight * self.on_host + _DOUBLE * _DOUBLE * kept.largest()
        larger = {"merged": merged} if merged >= reloaded else {"reloaded": reloaded}
        return larger | {"certificate": self._reference()}

    def _reloaded(self) -> float:
        """The exported model is scored in float32 on the CPU."""
        return self.job.after["total"] * _FLOAT * self.on_host

    def _scoring(self, *, divided: bool) -> Parts:
        """Logits of a batch of test windows; then those of one window in float32 with their softmax.

        divided: whether the model divides its logits, as Granite and the class of cut models do, which makes two.
        """
        evaluation = self.job.config.evaluation
        windows = min(evaluation.batch_size, evaluation.windows)
        logits = windows * self.length * self.vocab * self.product
        row = max(2 * self.length * self.vocab * _FLOAT, logits if divided else 0)
        head = self.vocab * self.hidden * self.product if self.product < self.weight else 0
        return {"logits": logits + row + head}

    def _checkpoint(self, widths: LayerWidths, teacher: bool, refitted: bool) -> float:
        """A copy of adapter and moments on the host, of the adapter that made the teacher, and of refitted weights."""
        layers = self.shapes.layers
        copied = widths.adapter(self.rank) * (_ADAPTER + _MOMENTS)
        copied += self.shapes.whole.adapter(self.rank) * _ADAPTER if teacher else 0
        if refitted and self.job.config.decisions.refit_windows:
            for structure in self.shapes.space.layer(0):
                if structure.reader is not None:
                    linear = widths.linears[structure.reader]
                    copied += linear.out_features * linear.in_features * self.weight
        return layers * copied * self.on_host


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _slides(job: Job, length: int) -> bool:
    """Whether a layer's attention sees less than a whole window, which needs a mask."""
    window = family_of(job.shapes.config).sliding_window(job.shapes.config)
    return window is not None and window < length
