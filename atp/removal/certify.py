"""The certificate: how far the logits of the masked, the cut and the reloaded model differ on real tokens.

All logits are computed in float32, with narrower weights widened, so that the comparison is of the models and not of
the rounding of their activations. The masked model no longer exists after the cut, so its logits are taken before it:
`reference_logits`, cut, `compare`. `certify_export` compares the saved model with the one in memory. Besides the
reference only the logits of one batch exist at a time, by default of one window, because the logits at the cut would
otherwise be the largest tensors of a run (docs/method.md section 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.data import collate
from atp.ground.errors import NotReached
from atp.lora.experts import expert_factors
from atp.models.attention import fused_attention
from atp.models.fused import split_projections
from atp.models.load import read_model
from atp.removal.cut import adapted, plain_name
from atp.removal.masters import stored_dtype
from atp.removal.widen import ieee_products, widened
from atp.sharding.read import read_sharded
from atp.sharding.shards import is_sharded, whole
from atp_kernels.quantized import dense

MEANING = {
    "removed_lora_norm": "largest LoRA norm left on a removed group",
    "masked_vs_cut": "masked model = cut model, largest logit difference as a share of the logit scale",
    "cut_vs_reloaded": "cut and merged model = saved and reloaded model, same measure",
    "merge_error": "weights with the adapter merged in, error as a share of that of rounding once",
    "vocabulary_gap": "model with all words = model with the words kept, largest difference of their logits",
}
LIMITS = {"removed_lora_norm": 0.0, "masked_vs_cut": 1e-3, "cut_vs_reloaded": 1e-3, "merge_error": 1.0}
"""The largest value of each figure in a correct run, whatever the dtype of its weights. That of `WORDS_CUT` is 0."""
WORDS_CUT = "vocabulary_gap"
"""The figure of a run that keeps a part of the vocabulary (`vocabulary.keep`)."""
AT_CUT, AT_EXPORT = ("removed_lora_norm", "masked_vs_cut"), ("cut_vs_reloaded", "merge_error")
USUAL_ROUNDING = {"float64": 1e-4, "float32": 1e-4, "float16": 0.01, "bfloat16": 0.1}
"""What `rounding_gap` of a tuned model usually stays below, by the dtype of its weights.

It is how far rounding the merged weights moves the logits. It has no limit, because models differ in sensitivity.
"""


WINDOWS = 4


@dataclass(frozen=True)
class LogitGap:
    """Largest absolute difference of two models' logits; scale: the largest |logit| of the reference."""

    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference as a share of the logit scale."""
        return self.absolute / self.scale if self.scale else self.absolute


def certificate_tokens(calibration: Dataset) -> Tensor:
    """The first calibration samples, int64 [windows, length], on which models are compared."""
    count = min(WINDOWS, len(cast(Sized, calibration)))
    return collate([calibration[row] for row in range(count)])["input_ids"]


def reference_logits(model: nn.Module, input_ids: Tensor, batch_size: int = 1) -> Tensor:
    """Logits of a causal LM in evaluation mode and float32 arithmetic, on the CPU: float32 [windows, tokens, vocab].

    input_ids: int64 [windows, tokens], without padding. The result takes 4 bytes x windows x tokens x vocab.
    """
    config: Any = model.config
    reference = torch.empty(*input_ids.shape, config.vocab_size)
    for rows, logits in zip(reference.split(batch_size), _logits(model, input_ids, batch_size), strict=True):
        rows.copy_(logits)
    return reference


def compare(reference: Tensor, model: nn.Module, input_ids: Tensor, batch_size: int = 1) -> LogitGap:
    """The gap between `reference_logits` [windows, tokens, vocab] and a model on the same input_ids [windows, tokens].

    Raises ValueError when the reference was made for other tokens.
    """
    if reference.shape[:2] != input_ids.shape:
        raise ValueError(
            f"reference logits are for tokens {list(reference.shape[:2])} and the comparison is on "
            f"{list(input_ids.shape)}: pass the same input_ids to both"
        )
    return _gap(reference.split(batch_size), _logits(model, input_ids, batch_size))


def logit_gap(reference: nn.Module, model: nn.Module, input_ids: Tensor, batch_size: int = 1) -> LogitGap:
    """The gap between two models in memory. input_ids: int64 [windows, tokens], without padding."""
    return _gap(_logits(reference, input_ids, batch_size), _logits(model, input_ids, batch_size))


@torch.no_grad()
def merge_error(model: PeftModel | PreTrainedModel, exported: nn.Module) -> float:
    """The largest error of a weight of `exported` against what `as_stored` says of a trained model, in allowed errors.

    A weight with an adapter is allowed half a unit in the last place of W's dtype, so the result is at most 1 for sums
    that were formed in float64 and rounded once. Weights without an adapter must be equal bit for bit, to the rounded
    one if they were trained; the result is infinite where they are not, and where names or shapes differ. NaN where a
    weight is NaN.
    """
    dtype = stored_dtype(model)
    source = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter = model.active_adapter if isinstance(model, PeftModel) else ""
    layers = adapted(source)
    expected = {plain_name(n): p for n, p in source.named_parameters() if ".lora_" not in n}
    actual = dict(exported.named_parameters())
    if actual.keys() != expected.keys():
        return math.inf
    worst = 0.0
    for name, weight in expected.items():
        found, base = whole(actual[name]).cpu(), whole(weight)
        if found.shape != base.shape:
            return math.inf
        if name in layers:
            share = _share_of_allowed(layers[name], adapter, base, found)
        else:
            share = 0.0 if torch.equal(found, (base.to(dtype) if base.requires_grad else base).cpu()) else math.inf
        worst = share if math.isnan(share) else max(worst, share)
    return worst


def _share_of_allowed(layer: LoraLayer, adapter: str, weight: Tensor, found: Tensor) -> float:
    factors: Any = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    weight, b, a = (dense(tensor.detach()).cpu() for tensor in (weight, *factors))
    kind, wide = torch.finfo(weight.dtype), torch.finfo(torch.float64)
    if weight.ndim == 3:
        b, a = (expert_factors(x, name, len(weight)) for x, name in ((b, "lora_B"), (a, "lora_A")))
        if cast(Any, layer).get_base_layer().is_transposed:
            weight, found = weight.transpose(1, 2), found.transpose(1, 2)
    w, b, a = weight.double(), layer.scaling[adapter] * b.double(), a.double()
    exact, size = w + b @ a, w.abs() + b.abs() @ a.abs()
    terms = a.shape[-2] + 2
    if layer.use_dora[adapter]:
        vector: Any = layer.lora_magnitude_vector[adapter]
        scale = (vector.weight.detach().cpu().double() / exact.norm(dim=1))[:, None]
        exact, size, terms = scale * exact, scale.abs() * size, terms + w.shape[1]
    # Half a unit in the last place and a little more, because torch rounds float64 to 16 bits by way of float32.
    allowed = kind.eps / 2 * ((1 + 2**-14) * exact.abs() + kind.tiny) + terms * wide.eps * size
    error = (found.double() - exact).abs()
    # A weight of zeros is allowed no error and has none.
    return float(torch.where(error == 0, 0.0, error / allowed).max())


def certify_export(
    model: PeftModel | PreTrainedModel, merged: Tensor, folder: str | Path, input_ids: Tensor
) -> dict[str, float | str]:
    """The certificate's figures of an export: the model in memory against the one in a folder, loaded as users do.

    model: cut, with its adapter or trained whole. merged: `reference_logits` of `as_stored(model)` on input_ids
    [windows, tokens].
    """
    device = next(model.parameters()).device
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    reloaded: Any = read_sharded(folder, "auto", device) if is_sharded(base) else read_model(folder, dtype="auto")
    reloaded.to(device)
    gap = compare(merged, reloaded, input_ids)
    rounding, dtype = logit_gap(model, reloaded, input_ids).relative, dtype_name(reloaded)
    return {
        "cut_vs_reloaded": gap.relative,
        "cut_vs_reloaded_absolute": gap.absolute,
        "merge_error": merge_error(model, split_projections(reloaded)),  # which spends it
        "rounding_gap": rounding,
        "dtype": dtype,
    }


def holds(name: str, value: object) -> bool:
    """Whether a figure is a number within its limit; NaN is not."""
    return isinstance(value, (int, float)) and value <= limit_of(name)


def limit_of(name: str) -> float:
    """The largest value of a figure in a correct run."""
    return LIMITS.get(name, 0.0)


def failure(certificate: Mapping[str, Any], names: Iterable[str] = tuple(LIMITS)) -> str | None:
    """What the first of these figures says that is missing, NaN or above its limit; None if all hold.

    Also of `WORDS_CUT`, where the certificate has it.
    """
    for name in (*names, *([WORDS_CUT] if WORDS_CUT in certificate else [])):
        value = certificate.get(name)
        if not holds(name, value):
            found = f"{value:.2e}" if isinstance(value, (int, float)) else "missing"
            return f"{name} is {found}, not at most {limit_of(name):g} ({MEANING[name]})"
    return None


def check_certificate(certificate: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises `NotReached` for the first of these figures that does not hold."""
    if (sentence := failure(certificate, names)) is not None:
        raise NotReached(f"certificate: {sentence}")


def rounding_remark(certificate: Mapping[str, Any]) -> str | None:
    """A sentence if rounding moved the logits more than it usually does, else None."""
    dtype, gap = certificate["dtype"], certificate["rounding_gap"]
    if gap <= USUAL_ROUNDING[dtype]:
        return None
    scored = "the scores, taken after it, say whether it matters"
    remedy = "export with model.dtype=float32 if scores suffer" if wider(dtype) else scored
    return (
        f"rounding the weights to {dtype} moved logits by {gap:.2g} of their scale, more than the usual "
        f"{USUAL_ROUNDING[dtype]:g}: {remedy}"
    )


def wider(dtype: str) -> str:
    """What remedies for narrow weights begin with; empty for weights that are as wide as a config can make them."""
    return "" if dtype in ("float32", "float64") else "model.dtype=float32, or "


def dtype_name(model: nn.Module) -> str:
    """The dtype of a model's embeddings, e.g. `bfloat16`."""
    causal: Any = model
    return str(causal.get_input_embeddings().weight.dtype).removeprefix("torch.")


def _gap(reference: Iterator[Tensor] | tuple[Tensor, ...], logits: Iterator[Tensor]) -> LogitGap:
    absolute = scale = 0.0
    for expected, actual in zip(reference, logits, strict=True):
        expected = expected.to(actual.device)
        difference = _largest(expected - actual)
        # max() would drop a NaN, and a model with NaN logits must not pass.
        absolute = difference if difference != difference else max(absolute, difference)
        scale = max(scale, _largest(expected))
    return LogitGap(absolute, scale)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN if there is one, without a copy of the tensor."""
    return float(torch.linalg.vector_norm(tensor, math.inf))


def _logits(model: nn.Module, input_ids: Tensor, batch_size: int) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for batch in input_ids.split(batch_size):
        arithmetic = widened(model), ieee_products(), torch.autocast(device.type, enabled=False)
        with ExitStack() as stack:
            for part in (_evaluating(model), fused_attention(model), *arithmetic, torch.no_grad()):
                stack.enter_context(part)
            logits = model(input_ids=batch.to(device), use_cache=False).logits.float()
        yield logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
