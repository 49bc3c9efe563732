"""The most memory that each part of a run takes, in bytes: what it holds throughout, and its largest moment.

Every formula is a sum of tensors that exist at the same time, by the code that makes them. A process on a CPU also
holds the tokenizer, and files of weights while it reads them, because their pages count as resident. Buffers of single
operations and what an allocator keeps of freed memory within a part are left out. On a CUDA device the figures are
those of the device, and what lies on the host (reference logits, checkpoints) is left out too. Those of DoRA are
approximate: its parts before the cut count a magnitude per row whether it is merged already or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from atp.families import Linear, family_of
from atp.models.attention import GROUPED_ON
from atp.models.base import FORMS
from atp.models.short_attention import LONGEST
from atp.plan.activations import Pass, kept_by_full, kept_by_loss, kept_by_saliency, kept_by_training
from atp.plan.compiled import compiled_bytes
from atp.plan.job import Workload
from atp.plan.shapes import Layers, LayerWidths, adapter_params, weights_of
from atp.removal.certify import WINDOWS
from atp.removal.refit import TOKENS_AT_ONCE

Parts = dict[str, float]
"""Bytes by what they are for."""

_FLOAT, _DOUBLE = 4, 8
_ADAPTER = 4  # PEFT keeps LoRA in float32 whatever the base is
_MOMENTS = 2 * _FLOAT  # of AdamW, for each LoRA parameter
_SHARED = ("weights", "originals", "cut weights", "merged", "reloaded")  # what lies in shards, where weights do
_COPIES = ("slices", "casts", "file")  # what then does not exist
# Of its inputs, in the widest linear that a cut leaves: 0.86 to 0.99 in three cuts, which kept 0.2 to 0.47 in all.
_WIDEST = 0.9
_WORD = 2048  # of the tokenizer and all else in the process, per word: 120 MiB for SmolLM2's 49,152 words, as measured


def memory_of(job: Workload) -> list[dict[str, object]]:
    """For each part of the run, in order: its name, its bytes at the peak, and the parts that these consist of."""
    memory = _Memory(job)
    return [
        {
            "phase": name,
            "bytes": round(sum(parts.values())),
            "parts": {part: round(n) for part, n in parts.items() if n},
        }
        for name, parts in ((name, memory.in_shards(parts)) for name, parts in memory.phases())
    ]


class _Memory:
    def __init__(self, job: Workload) -> None:
        self.job, self.shapes, self.training = job, job.shapes, job.config.training
        self.ranks = job.count if job.shared else 1  # processes that share the frozen weights
        self.weight = job.dtype.itemsize
        self.product = (job.autocast or job.dtype).itemsize
        self.hidden, self.vocab = job.shapes.config.hidden_size, job.shapes.config.vocab_size
        self.rank, self.length = job.config.lora.r, job.config.data.length
        self.dora = job.config.lora.variant == "dora"
        self.full = self.training.after_cut == "full"
        self.tied = bool(job.shapes.config.tie_word_embeddings)
        self.table = self.vocab * self.hidden if self.training.embeddings else 0  # what is trained beside the adapter
        self.batch = self.training.batch_size * self.length
        self.on_host = 0 if job.device == "cuda" else 1
        apart = job.keeps_apart or _slides(job, self.length)
        load_in = job.config.model.load_in
        self.form = None if load_in is None else FORMS[load_in]
        # A model that divides or caps its logits, as Granite and Gemma 2 do, has them twice then.
        self.family = family_of(job.shapes.config)
        self.caps = self.family.logits_cap(job.shapes.config) is not None
        self.divides = self.caps or self.family.logits_divisor(job.shapes.config) != 1
        self._widest = 0.0 if job.config.decisions.uniform else _WIDEST
        self.readers = {(s.layer, s.reader) for s in job.shapes.space.structures if s.reader is not None}
        capped = self.length if self.family.caps_scores(job.shapes.config) else 0
        brief = self.on_host and self.product == 2 and self.length <= LONGEST and not capped
        self.how = Pass(
            self.product, self.weight, self.rank, apart=apart, dora=self.dora,
            expanded=apart and job.device not in GROUPED_ON, rows=self.training.batch_size,
            short=self.length if brief else 0, capped=capped, by_expert=job.config.lora.experts,
        )  # fmt: skip

    def in_shards(self, parts: Parts) -> Parts:
        """What each of several processes has that share the frozen weights; else all of it.

        Nothing made of whole weights outlives a pass.
        """
        if self.ranks == 1:
            return parts
        return {
            part: size / self.ranks if part in _SHARED else size for part, size in parts.items() if part not in _COPIES
        }

    def _gathered(self) -> Parts:
        """What lies beside the shards at once in a pass.

        The largest of a layer, the embeddings and the head, once as it arrives and once in its place, and what this
        process sends of it.
        """
        if self.ranks == 1:
            return {}
        config = self.shapes.config
        largest = max(*(weights_of((widths,)) for widths in self.shapes.whole), config.vocab_size * config.hidden_size)
        return {"gathered": (2 + 1 / self.ranks) * largest * self.weight}

    def _largest(self, *moments: Parts) -> Parts:
        return max(moments, key=lambda parts: sum(self.in_shards(parts).values()))

    def phases(self) -> Iterator[tuple[str, Parts]]:
        """The parts of a run that happen, in order."""
        job, steps = self.job, self.job.phases
        whole, kept = job.shapes.whole, job.shapes.kept
        if self.form is not None and self.on_host:
            # The floating weights in their file and in their tensors, before these are quantized.
            read = job.before["total"] * self.weight
            yield "load", {"process": self.vocab * _WORD, "weights": read, "file": read}
        scoring = {"casts": self._narrow(self._floats(whole))} | self._scoring(whole)
        yield "score", self._weights(whole) | scoring | self._dequantized(whole)
        static, rounds = job.config.decisions.source == "static", job.config.decisions.rounds or 1
        if job.measures_saliency and static and rounds == 1:
            yield "saliency", self._held(whole, begun=False) | self._decision(1)
        watched = job.config.decisions.source == "running"
        if steps.open:
            yield "open", self._training(whole, watched=watched)
        left = self._left_by_saliency() if steps.open else {}
        moments = [self._held(whole) | left | self._decision(1)] if job.measures_saliency and not static else []
        if rounds > 1:
            moments.append(self._held(whole, refitted=True) | self._originals() | left | self._decision(1))
        if moments:
            yield "saliency", self._largest(*moments)
        if steps.search:
            yield "search", self._training(whole, slices=1.0, watched=watched)
        if job.refits:
            left = left if moments else self._casts(whole) if steps.open else {}
            slices = self._slices(1.0) if steps.search else left
            originals = self._originals() if rounds > 1 else {}
            yield "refit", self._held(whole, refitted=True) | originals | slices | self._refit()
        if steps.settle:
            yield "settle", self._training(whole, slices=job.shapes.share, refitted=True)
        yield "cut", self._largest(*self._cut())
        compiled = self._compiled(batches=0)
        if self.full:
            masters = self._masters()
            done = masters._held_full()
            if steps.tune:
                yield "tune", masters._full_step() | compiled
        else:
            done = self._held(kept) | (self._casts(kept) if steps.tune else {})
            if steps.tune:
                yield "tune", self._training(kept) | compiled
        yield "export", done | compiled | self._export()
        scoring = {"scoring casts": self._narrow(weights_of(kept))} | self._scoring(kept)
        batches = 1 + -(-job.questions.sequences // job.config.evaluation.batch_size)
        reloaded = {"process": self.vocab * _WORD * self.on_host, "reloaded": self._exported()}
        reloaded |= self._compiled(batches)
        yield "score again", reloaded | scoring
        yield "speed", reloaded | self._weights(whole) | self._dequantized(whole) | self._gathered()

    # What is held throughout

    def _weights(self, layers: Layers, refitted: bool = False) -> Parts:
        parameters = self.job.after if layers is self.shapes.kept else self.job.before
        others = (parameters["total"] - weights_of(layers)) * self.weight
        others += self.table * max(_FLOAT - self.weight, 0)
        floating = self._floating(layers, refitted)
        linears = sum(self._base(linear, whole, at in floating) for at, linear, whole in self._linears(layers))
        return {"process": self.vocab * _WORD * self.on_host, "weights": others + linears}

    def _linears(self, layers: Layers) -> Iterator[tuple[tuple[int, str], Linear, Linear]]:
        """(layer and name, a linear of these layers, the same in the whole model)."""
        for index, (widths, whole) in enumerate(zip(layers, self.shapes.whole, strict=True)):
            for name, linear in widths.linears.items():
                yield (index, name), linear, whole.linears[name]

    def _floating(self, layers: Layers, refitted: bool) -> set[tuple[int, str]]:
        """Linears that are held in floating point: all, or with `load_in` those that the refit has changed."""
        if self.form is None:
            return {at for at, _, _ in self._linears(layers)}
        refitted = refitted or layers is self.shapes.kept
        return self.readers if refitted and self.job.config.decisions.refit_windows else set()

    def _base(self, linear: Linear, whole: Linear, floating: bool) -> int:
        """Bytes of a frozen weight. Where scales run along rows, a quantized one keeps the codes of lost columns."""
        if floating or self.form is None:
            return linear.out_features * linear.in_features * self.weight
        columns = linear.in_features if self.form.block is None else whole.in_features
        return self.form.bytes_of(Linear(linear.out_features, columns, linear.bias))

    def _dequantized(self, layers: Layers) -> Parts:
        """The largest weight in floating point, in the dtype of the weights and in that of the products."""
        if self.form is None:
            return {}
        wide = self.weight if self.form.block else max(self.weight, _FLOAT)
        narrow = min(self.weight, self.product)
        largest = max(widths.largest() for widths in layers)
        return {"dequantized": largest * (wide + (narrow if narrow < wide else 0))}

    def _held(self, layers: Layers, *, begun: bool = True, refitted: bool = False) -> Parts:
        """Weights and adapter; optimizer state once training has `begun`.

        AdamW has two moments of each trained parameter from the first step on.
        """
        job, cut = self.job, layers is self.shapes.kept
        adapter = self._adapter(layers)
        trained = adapter + self.table
        begun = begun and (cut or job.phases.cut_step > 0)
        held = self._weights(layers, refitted) | {"adapter": adapter * _ADAPTER} | self._dequantized(layers)
        held["optimizer"] = trained * _MOMENTS if begun else 0
        return held | self._kept_aside(trained if cut else 0)

    def _kept_aside(self, trained: int) -> Parts:
        """The best of so many trained parameters since the cut."""
        return {"best": trained * _FLOAT} if trained and self.training.keep_best else {}

    # All weights after the cut

    def _masters(self) -> _Memory:
        """The same run with weights in float32, which all of those that are trained are."""
        model = self.job.config.model.model_copy(update={"dtype": "float32"})
        return _Memory(replace(self.job, config=self.job.config.model_copy(update={"model": model})))

    def _held_full(self, *, begun: bool = True) -> Parts:
        """Weights in float32 with their gradients, whose memory stays, and moments once training has `begun`."""
        trained = self.job.after["total"]
        held: Parts = {"process": self.vocab * _WORD * self.on_host, "weights": trained * _FLOAT}
        held |= {"gradients": trained * _FLOAT, "optimizer": trained * _MOMENTS if begun else 0}
        return held | self._kept_aside(trained)

    def _full_step(self) -> Parts:
        """A step of all weights, or the checkpoint after it. Autocast keeps the weights that it casts for the pass."""
        trained, kept = self.job.after["total"], self.shapes.kept
        exchanged = trained * _FLOAT if self.job.count > 1 else 0
        casts = self._narrow(weights_of(kept))
        in_pass = self._pass(lambda widths: kept_by_full(self.shapes, widths, self.how), kept, self.batch)
        clipped = trained * _FLOAT if self.training.update_clipping else 0
        step = {"exchanged": exchanged, "casts": casts, "clipped": clipped} | self._tables(head=True) | in_pass
        saved = trained * (_FLOAT + _MOMENTS) * self.on_host
        return self._held_full() | self._largest(step, {"checkpoint": saved})

    def _tables(self, *, head: bool) -> Parts:
        """Gradients that a backward pass makes of the embeddings, and of a head that is trained, one beside the other.

        They are added to those of the step.
        """
        return {"tables": (2 if head else 1) * self.vocab * self.hidden * _FLOAT}

    def _adapter(self, layers: Layers) -> int:
        return adapter_params(layers, self.job.config.lora)

    def _row_norms(self, layers: Layers) -> Parts:
        """What DoRA's norms of the rows of W + s B A have at once, of one linear, in float32.

        The unit matrix that makes B A, this product, s times it, and the sum; and W, where that is narrower.
        """
        if not self.dora:
            return {}
        copies = 3 + (self.weight < _FLOAT)
        linears = [linear for widths in layers for linear in widths.linears.values()]
        sizes = (linear.in_features * (linear.in_features + copies * linear.out_features) for linear in linears)
        return {"row norms": max(sizes) * _FLOAT}

    def _casts(self, layers: Layers) -> Parts:
        """Under autocast a linear keeps its frozen weight in the narrow dtype too; LoRA factors are cast in a pass."""
        if self.product >= self.weight:
            return {}
        return {"casts": (self._floats(layers) + self._adapter(layers)) * self.product}

    def _floats(self, layers: Layers, refitted: bool = False) -> int:
        """Entries of the weights that are held in floating point."""
        floating = self._floating(layers, refitted)
        return sum(m.out_features * m.in_features for at, m, _ in self._linears(layers) if at in floating)

    def _slices(self, share: float, refitted: bool = False) -> Parts:
        """What hard masks keep of the floating linears, gathered in the dtype of the products."""
        return {"slices": share * self._floats(self.shapes.whole, refitted) * self.product}

    def _originals(self) -> Parts:
        """The linears that end a block, as they were before a round refitted them."""
        linears = (linear for at, linear, _ in self._linears(self.shapes.whole) if at in self.readers)
        return {"originals": sum(self._base(linear, linear, self.form is None) for linear in linears)}

    # Moments

    def _training(self, layers: Layers, *, slices: float = 0.0, watched: bool = False, refitted: bool = False) -> Parts:
        """A LoRA step with its gradients, or the checkpoint after it: the larger one.

        Gradients that processes exchange are copied into one piece for it.
        """
        job, cut = self.job, layers is self.shapes.kept
        held = self._held(layers, refitted=refitted)
        held |= self._slices(slices, refitted) if slices else self._casts(layers)
        gradients = (self._adapter(layers) + self.table) * _FLOAT
        step: Parts = {"gradients": gradients, "exchanged": gradients if job.count > 1 else 0}
        if self.table:
            step |= self._tables(head=self.tied)
        how = replace(self.how, watched=watched)
        in_pass = self._pass(lambda widths: kept_by_training(self.shapes, widths, how), layers, self.batch)
        moments = [step | in_pass | self._row_norms(layers)]
        if slices == 1.0 and job.config.decisions.source == "learned":
            moments.append(self._decision(job.config.decisions.batch_size))
        head = self._narrow(self.vocab * self.hidden) if self.ranks == 1 else 0  # steps keep it
        moments.append({"checkpoint": self._checkpoint(layers, refitted=cut), "head": head})
        return held | self._largest(*moments)

    def _pass(self, keeps: Callable[[LayerWidths], float], layers: Layers, tokens: int) -> Parts:
        """Activations of a forward pass, and what is largest beside them: the loss or one layer backward.

        keeps: bytes per token of a layer. With gradient checkpointing a layer keeps its input alone, and one layer at a
        time is computed again. With offloading layers keep nothing, and one at a time is read again. Of layers that
        differ the widest counts.
        """
        each = [keeps(widths) for widths in layers]
        recomputed = 0.0
        if self.training.gradient_checkpointing or self.training.offload:
            recomputed = max(each) * tokens
            each = [0.0 if self.training.offload else self.hidden * self.weight] * len(layers)
        inner = max(widths.inner for widths in layers)
        backward = recomputed + tokens * (2 * inner * self.product + 3 * self.hidden * self.weight)
        loss = self._loss(tokens)
        beside = {"logits": loss} if loss >= backward else {"backward": backward}
        return {"activations": sum(each) * tokens} | beside | self._gathered()

    def _loss(self, tokens: int) -> float:
        return kept_by_loss(
            max(round(tokens * self.job.scored), 1), self.hidden, self.vocab, weight=self.weight, product=self.product,
            on_host=bool(self.on_host), capped=self.caps,
        )  # fmt: skip

    def _left_by_saliency(self) -> Parts:
        """Narrow weights of the open phase that measuring leaves alone: those of linears without a soft mask."""
        softly = {cut.module for s in self.shapes.space.layer(0) for cut in s.cuts if cut.soft}
        others = [m for widths in self.shapes.whole for name, m in widths.linears.items() if name not in softly]
        weights = sum(linear.out_features * linear.in_features for linear in others)
        return {"casts": weights * self.product if self.product < self.weight and self.form is None else 0}

    def _decision(self, windows: int) -> Parts:
        """Forward and backward of calibration windows under a soft mask; LoRA is frozen and has no gradients.

        Under autocast each linear then keeps a narrow weight with the adapter merged in, unless checkpointing makes it
        anew or offloading moves it.
        """
        whole, how = self.shapes.whole, replace(self.how, rows=windows)
        stays = not (self.training.gradient_checkpointing or self.training.offload)
        merged = self._floats(whole) * self.product if stays and self.product < self.weight else 0
        return {"merged": merged} | self._pass(
            lambda widths: kept_by_saliency(self.shapes, widths, how), whole, windows * self.length
        )

    def _refit(self) -> Parts:
        """All calibration windows of a process at once, on the widest of the two linears that end a block.

        Held are the hidden states of the whole and of the cut model, their difference, and the linear's inputs; where a
        norm reads what a block gives, also the outputs of the whole model. Offloading leaves those of one window. The
        solver holds [kept, kept] and [kept, hidden]: float32 sums over most windows and over those held out, the damped
        matrix, which its factor replaces, and solutions; in the end the sums of all windows and a float64 matrix.
        """
        tokens = self.job.share_of(self.job.config.decisions.refit_windows) * self.length
        held = min(self.length, tokens) if self.training.offload else tokens
        read = max((self.shapes.whole[layer].linears[name].in_features for layer, name in self.readers), default=0)
        equal = max((self.shapes.kept[layer].linears[name].in_features for layer, name in self.readers), default=0)
        kept = max(equal, self._widest * read)
        stream, inputs = held * self.hidden * self.weight, held * read * self.product
        sums = kept * kept + kept * self.hidden
        products = _FLOAT * (2 * sums + min(TOKENS_AT_ONCE, tokens) * (kept + self.hidden))
        solve = max(products, _FLOAT * (3 * sums + kept * self.hidden))
        layer = max(weights_of((widths,)) for widths in self.shapes.whole) * self.weight
        outputs = any(block.after is not None for block in self.family.blocks)
        return {
            "windows": (4 if outputs else 3) * stream + inputs,
            "solve": solve,
            "gathered": layer if self.ranks > 1 else 0,
        }

    def _cut(self) -> Iterator[Parts]:
        """Three moments: the reference logits are taken, weights are cut, and logits of the cut model are compared.

        A weight that is cut exists twice for a moment. On a CPU the weights are their file, which stays mapped until no
        weight of the whole model is left. That is gone by the last, but for its adapter in the checkpoint of this step.
        The cut adapter has no moments until that is loaded.
        """
        whole, kept, window = self.shapes.whole, self.shapes.kept, self.length * self.vocab * _FLOAT
        held, logits = self._held(whole, refitted=True), window * WINDOWS * self.on_host
        yield held | {"certificate": logits + window} | self._gathered()
        floating = self._floating(kept, True)
        cut = sum(self._base(m, uncut, at in floating) for at, m, uncut in self._linears(kept) if m != uncut)
        cut += sum(widths.stacked for widths in kept) * self.weight + self._adapter(kept) * _ADAPTER
        weight = max(widths.largest() for widths in whole) * self.weight
        if self.ranks == 1:
            largest = max(weight, max(widths.stacked for widths in whole) * self.weight)
            mapped = max(cut - largest, 0) if self.on_host and self.form is None else 0
            yield held | {"certificate": logits, "cut weights": largest, "mapped": mapped}
        else:  # shards stay until all are cut; one weight at a time, as it arrives and in one piece
            yield held | {"certificate": logits, "cut weights": cut, "gathered": 2 * weight}
        uncut = self._saved(whole, refitted=False)
        after = self._held(kept, begun=False, refitted=True)
        yield after | {"checkpoint": uncut, "certificate": self._reference(models=1)} | self._gathered()
        if self.full:
            # Merged weights move to where they are trained; then they are written to the checkpoint, and read again.
            trained = self.job.after["total"] * _FLOAT
            held = self._masters()._held_full(begun=False)
            yield held | {"merged": trained, "checkpoint": uncut}
            yield held | {"checkpoint": uncut + 2 * trained * self.on_host}

    def _reference(self, models: int) -> float:
        """Reference logits of the certificate's windows on the host, and of one window of each model at a time.

        Beside those of models is their difference, or what a model that divides its logits has twice.
        """
        window = self.length * self.vocab * _FLOAT
        return window * (WINDOWS * self.on_host + (models + 1 if models else 0))

    def _export(self) -> Parts:
        """Four moments. The adapter is merged into the linears, one after the other in float64; their logits are taken.

        Once they are saved, the reloaded model takes their place: its logits are compared, and on the host its weights,
        in eight float64 copies of one.
        """
        kept = self.shapes.kept
        largest = max(*(w.largest() for w in kept), self._widest * max(w.largest() for w in self.shapes.whole))
        merged, reloaded = float(weights_of(kept) * self.weight), self._exported()
        judged = 8 * _DOUBLE * largest * self.on_host
        if self.weight < _FLOAT:
            merged += self.table * self.weight
        if self.full:  # weights of float32 are shared with what is trained
            merged = self._exported() if self.weight < _FLOAT else 0
            return self._largest(
                {"merged": merged, "certificate": self._reference(models=1)},
                {"reloaded": reloaded, "certificate": self._reference(models=2)},
            )
        return self._largest(
            {"merged": merged, "float64": 2 * _DOUBLE * largest},
            {"merged": merged, "certificate": self._reference(models=1)},
            {"reloaded": reloaded, "certificate": self._reference(models=0), "float64": judged},
            {"reloaded": reloaded, "certificate": self._reference(models=2)} | self._gathered(),
        )

    def _exported(self) -> float:
        """The exported model, which is scored in its own dtype; on a CPU its file is its memory."""
        return self.job.after["total"] * self.weight

    def _scoring(self, layers: Layers) -> Parts:
        """Logits of a batch of test windows, then those of one window in float32 with their softmax; or one layer's
        pass over a batch of questions, of which only the logits of the answers are computed.
        """
        evaluation, questions = self.job.config.evaluation, self.job.questions
        windows = min(evaluation.batch_size, evaluation.windows)
        logits = windows * self.length * self.vocab * self.product
        row = max(2 * self.length * self.vocab * _FLOAT, logits if self.divides else 0)
        asked = min(evaluation.batch_size, questions.sequences) * questions.longest
        inner = max(widths.inner for widths in layers)
        passed = asked * (3 * inner * self.product + 3 * self.hidden * self.weight)
        larger = {"logits": logits + row} if logits + row >= passed else {"questions": passed}
        return larger | {"head": self._narrow(self.vocab * self.hidden)} | self._gathered()

    def _compiled(self, batches: int) -> Parts:
        in_16_bits = self.on_host and self.product < _FLOAT
        return {"compiled": compiled_bytes(self.job, batches) if in_16_bits else 0}

    def _narrow(self, entries: float) -> float:
        """Bytes of weights in the narrow dtype, which autocast keeps for all passes of a scoring."""
        return entries * self.product if self.product < self.weight else 0

    def _checkpoint(self, layers: Layers, refitted: bool) -> float:
        """The copy on the host of what a checkpoint holds."""
        return self._saved(layers, refitted) * self.on_host

    def _saved(self, layers: Layers, refitted: bool) -> float:
        """Adapter and moments, and refitted weights, or this process's shard."""
        saved: float = (self._adapter(layers) + self.table) * (_ADAPTER + _MOMENTS)
        if refitted and self.job.config.decisions.refit_windows:
            for structure in self.shapes.space.structures:
                if structure.reader is not None:
                    linear = layers[structure.layer].linears[structure.reader]
                    saved += linear.out_features * linear.in_features * self.weight / self.ranks
        return saved


def _slides(job: Workload, length: int) -> bool:
    """Whether a layer's attention sees less than a whole window, which needs a mask."""
    window = family_of(job.shapes.config).sliding_window(job.shapes.config)
    return window is not None and window < length
