"""SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024): the residual stream rotated to its principal axes and sliced.

An RMSNorm without weights commutes with rotations. So each norm's weights move into the linears behind it, the stream
before every block is expressed in the principal axes of its calibration signals, the axes of least variance are cut,
and a shortcut matrix on each residual connection carries the stream from one block's axes to the next one's.

Here `bases` [2 layers + 1, hidden, width] holds the kept axes as columns: before each attention, before each MLP, and
before the head. In the original coordinates slicing is the projection x -> x P P^T in front of each block, which is how
the calibration signals are computed: through the blocks sliced so far, with the model's own modules.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from atp.baselines.calibration import Batch, calibration_batches
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.evaluation.inference import inference
from atp.families import BLOCKS, family_of, is_cut
from atp.ground.errors import InputError
from atp.models.config import CutConfig
from atp.models.cut import build, copy_unsaved
from atp.models.layers import first_layer_inputs, run_block
from atp.spaces.space import MaskSpace

_MULTIPLE = 8
_DAMPING = 0.01  # share of the mean variance added to every variance


def choose_bases(model: PreTrainedModel, calibration: Dataset, config: ATPConfig) -> Tensor:
    """The bases for the width that meets the budget, float32 [2 layers + 1, hidden, width]."""
    width = sliced_width(model.config, config.decisions.target_keep)
    batches = calibration_batches(calibration, config, next(model.parameters()).device)
    return residual_bases(model, batches, width)


def sliced_width(config: PretrainedConfig, target: float) -> int:
    """The width, a multiple of 8, whose decoder's parameter share, shortcuts included, is nearest to `target`.

    Raises `InputError` for a residual stream too narrow to cut, and for families with norms behind blocks or of queries
    and keys.
    """
    family = family_of(config)
    if family.layer_norm:
        raise InputError(
            f"slicegpt does not fit model family '{family.name}': its LayerNorms take the mean away, which "
            "rotations do not keep, so choose another baseline"
        )
    if family.blocks is not BLOCKS:
        raise InputError(
            f"slicegpt does not fit model family '{family.name}': norms read the outputs of its blocks, with which "
            "rotations do not commute, so choose another baseline"
        )
    if family.qk_norm:
        raise InputError(
            f"slicegpt does not fit model family '{family.name}': its norms of queries and keys share rms_norm_eps "
            "with the norms that slicing rescales, so choose another baseline"
        )
    if is_cut(config) and (lacking := config.lacking()) is not None:
        raise InputError(f"slicegpt rotates between the blocks of all layers, but {lacking}: use another method")
    space = MaskSpace.from_config(config, "kv_group")  # for its linears and their parameters, as any other space
    wanted = target * Budget(space).total
    widths = range(_MULTIPLE, config.hidden_size, _MULTIPLE)
    if not widths:
        raise InputError(
            f"slicegpt needs a hidden_size above {_MULTIPLE}, not {config.hidden_size}: use another method"
        )
    return min(widths, key=lambda width: abs(_decoder_params(space, width) - wanted))


def _decoder_params(space: MaskSpace, width: int) -> int:
    """Decoder parameters with `width` channels of the residual stream left, shortcuts included."""
    total = space.num_layers * (2 * width + 2 * width * width)
    for name, linear in (item for linears in space.linears for item in linears.items()):
        writes = name in ("self_attn.o_proj", "mlp.down_proj")
        rows = width if writes else linear.out_features
        columns = linear.in_features if writes else width
        total += rows * (columns + linear.bias)
    return total


@torch.no_grad()
def residual_bases(model: PreTrainedModel, batches: Iterable[Batch], width: int) -> Tensor:
    """The `width` leading principal axes of the stream before every block, float32 [2 layers + 1, hidden, width].

    model: a stock causal LM of a supported family. A block's axes are the eigenvectors of the uncentred covariance of
    the hidden states that reach it through the blocks sliced before it, 1 % of the mean variance added, in float64.
    """
    decoder = model.model
    with inference(model):
        inputs = [first_layer_inputs(decoder, batch) for batch in batches]
        states, arguments = [x for x, _ in inputs], [given for _, given in inputs]
        bases = [_principal_axes(states, width)]
        for layer in decoder.layers:
            for block in BLOCKS:
                states = [_project(x, bases[-1]) for x in states]
                states = [run_block(layer, block, x, a) for x, a in zip(states, arguments, strict=True)]
                bases.append(_principal_axes(states, width))
    return torch.stack([basis.float().cpu() for basis in bases])


def _principal_axes(states: list[Tensor], width: int) -> Tensor:
    """Leading eigenvectors of the damped uncentred covariance of the states, float64 [hidden, width]."""
    hidden = states[0].shape[-1]
    covariance = torch.zeros(hidden, hidden, dtype=torch.float64, device=states[0].device)
    for state in states:
        x = state.double().flatten(0, -2)
        covariance += x.T @ x
    covariance.diagonal().add_(_DAMPING * covariance.diagonal().mean())
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :width]


def _project(x: Tensor, basis: Tensor) -> Tensor:
    basis = basis.to(x.dtype)
    return x @ basis @ basis.T


@torch.no_grad()
def slice_model(model: PreTrainedModel, bases: Tensor) -> PreTrainedModel:
    """The model in the coordinates of `bases` [2 layers + 1, hidden, width]; `model` stays as it is.

    With width = hidden it computes what `model` does. Weights are computed in float64 and rounded once. Tied embeddings
    are untied, since the first and the last basis differ.
    """
    source, hidden, width = model.config, bases.shape[1], bases.shape[2]
    # The norm must divide by the original width: a weight of sqrt(hidden / width) makes the stock one do so.
    config = CutConfig.from_whole(
        source, hidden_size=width, tie_word_embeddings=False, shortcuts=True,
        rms_norm_eps=source.rms_norm_eps * hidden / width,
    )  # fmt: skip
    with torch.device("meta"):
        sliced = build(config)
    dtype = model.lm_head.weight.dtype
    state = _sliced_weights(model, bases.to(model.lm_head.weight.device).double())
    sliced.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    copy_unsaved(sliced, model)
    sliced.generation_config = copy.deepcopy(model.generation_config)
    made: PreTrainedModel = sliced.train(model.training)
    return made


def _sliced_weights(model: PreTrainedModel, bases: Tensor) -> dict[str, Tensor]:
    """Every tensor of the sliced model by name: inputs absorb norm weights and basis, outputs the next basis."""
    decoder, (_, hidden, width) = model.model, bases.shape
    *producers, writer_of_mlp = (name.removeprefix("mlp.") for name in family_of(model.config).mlp)
    norm = torch.full((width,), (hidden / width) ** 0.5, dtype=bases.dtype, device=bases.device)
    state = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight.double() @ bases[0],
        "model.norm.weight": norm,
        "lm_head.weight": model.lm_head.weight.double() * decoder.norm.weight.double() @ bases[-1],
    }
    for index, layer in enumerate(decoder.layers):
        start = f"model.layers.{index}."
        before, middle, after = bases[2 * index : 2 * index + 3]
        blocks = (
            ("input_layernorm", "attention_shortcut", ("q_proj", "k_proj", "v_proj"), "o_proj", before, middle),
            ("post_attention_layernorm", "mlp_shortcut", tuple(producers), writer_of_mlp, middle, after),
        )
        for (norm_name, shortcut, readers, writer, this, following), block in zip(
            blocks, ("self_attn", "mlp"), strict=True
        ):
            linears, gain = layer.get_submodule(block), layer.get_submodule(norm_name).weight.double()
            state[f"{start}{norm_name}.weight"] = norm.clone()
            state[f"{start}{shortcut}.weight"] = following.T @ this
            for name in readers:
                linear = linears.get_submodule(name)
                state[f"{start}{block}.{name}.weight"] = linear.weight.double() * gain @ this
                if linear.bias is not None:
                    state[f"{start}{block}.{name}.bias"] = linear.bias.double()
            linear = linears.get_submodule(writer)
            state[f"{start}{block}.{writer}.weight"] = following.T @ linear.weight.double()
            if linear.bias is not None:
                state[f"{start}{block}.{writer}.bias"] = following.T @ linear.bias.double()
    return state
