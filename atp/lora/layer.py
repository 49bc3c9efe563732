"""The LoRA layers that know masks: a PEFT `Linear`, and an MLP of three, whose forward is one call of `atp_kernels`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.config import LoraVariant
from atp.families import BLOCKS, EXPERTS, ExpertFamily, family_of, layer_config
from atp.ground.errors import InputError
from atp.ground.rng import seeded
from atp.lora.attention import fuse_attention, unfuse_attention
from atp.lora.decoder_layer import FusedRMSNorm, fuse_layer, unfuse_layer
from atp.lora.experts import STACKED, mask_experts, unmask_experts
from atp.lora.observer import observed
from atp.lora.packs import Packs
from atp.lora.stock import Hooked, runs_stock_forward
from atp.sharding.shards import is_sharded
from atp.spaces.space import MaskSpace
from atp_kernels import (
    KeptSlice,
    Projection,
    kept_lora_linear,
    masked_lora_linear,
    masked_lora_swiglu,
    new_seed,
)
from atp_kernels.packed.op import Norm, packed_linears, packed_mlp
from atp_kernels.swiglu.native import GELU

ADAPTER = "default"
_STACKS_SIDES = (0, 19)  # before, PEFT took outputs of stacked weights for inputs


class MaskedPeftLinear(PeftLinear):
    """PEFT LoRA linear with masks on its outputs [out_features] and inputs [in_features].

    Masks are state of the current pass, not parameters: bool (hard) or float32 (soft, differentiable), None keeps all.
    With `mask_lora` they cover base and LoRA path, without it the base path alone (docs/method.md section 3). A kept
    slice stands for hard masks on the base path, at the cost of what they keep. What a side is worth can be observed
    without a mask (`observe`). With DoRA the forward is PEFT's own, and masks are on the sum alone.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self._unmask()

    @classmethod
    def adopt(cls, layer: PeftLinear) -> None:
        """Turns a stock layer into this one in place: same object, parameters and hooks, another forward."""
        layer.__class__ = cls
        cast(MaskedPeftLinear, layer)._unmask()

    def _unmask(self) -> None:
        self._narrow: tuple[Tensor, int, Tensor] | None = None
        self.packs = Packs()  # of the linears that read the same input, of which this is the first
        self.set_masks(None, None)
        self.gates: list[Tensor | None] = [None, None]
        self.observed: list[Tensor | None] = [None, None]
        self.factors: tuple[Tensor, Tensor] | None = None  # A and B in autocast's dtype, where somebody casts them all
        self.holds_casts = True  # whether a whole weight may outlive the pass that reads it

    def set_masks(
        self,
        out_mask: Tensor | None,
        in_mask: Tensor | None,
        *,
        mask_lora: bool = False,
        kept: KeptSlice | None = None,
    ) -> None:
        """Sets the masks of the next passes, or the slice that stands for them; they stay until the next call."""
        self.out_mask, self.in_mask, self.mask_lora, self.kept = out_mask, in_mask, mask_lora, kept
        if kept is not None or out_mask is not None or in_mask is not None:
            self._narrow = None  # the memory that masked passes need
            self.packs.drop()

    def set_gate(self, axis: int, gate: Tensor | None) -> None:
        """Multiplies rows of B (axis 0, gate [out_features]) or columns of A (1, [in_features]) until the next call."""
        self.gates[axis] = gate

    def observe(self, axis: int, sums: Tensor | None) -> None:
        """Until the next call, backward passes add the gradients of a mask of ones to sums [samples, features].

        Of outputs (axis 0) or inputs (1), whatever is trained: see `atp_kernels.mask_gradient`.
        """
        self.observed[axis] = sums

    def seen(self, y: Tensor) -> Tensor:
        """Outputs that a block made of the weights, observed where they are."""
        return observed(y, self.observed[0])

    @property
    def plain(self) -> bool:
        """Whether this is base and adapter side by side: neither merged nor disabled, one adapter, and no DoRA."""
        return self._alone and not self.use_dora[ADAPTER]

    @property
    def _alone(self) -> bool:
        return not (self.disable_adapters or self.merged) and self.active_adapters == [ADAPTER]

    @property
    def dropout(self) -> float:
        """The probability of LoRA dropout in this pass. Decision steps, whose masks cover the sum, judge all of it."""
        module = self.lora_dropout[ADAPTER]
        return module.p if self.training and isinstance(module, nn.Dropout) and not self.mask_lora else 0.0

    @property
    def fusible(self) -> bool:
        """Whether a block may use the weights without calling the layer: no hook waits for the call or sees its input.

        What becomes of outputs is for the block to observe.
        """
        hooks = self._forward_pre_hooks or self._forward_hooks
        return self.plain and not hooks and self.observed[1] is None

    @property
    def projection(self) -> Projection:
        """The frozen base and its adapter with its gates, as `atp_kernels` takes them."""
        weight, lora_a, lora_b, scaling, bias = self.uncast
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._learns_whole:
            weight = self._narrowed(weight)
        out_gate, in_gate = self.gates
        if self.factors is not None and torch.is_grad_enabled() and lora_a.requires_grad:
            if out_gate is None and in_gate is None:  # whose products are rounded once, not before too
                lora_a, lora_b = self.factors
        lora_a = lora_a if in_gate is None else lora_a * in_gate
        lora_b = lora_b if out_gate is None else lora_b * out_gate[:, None]
        return Projection(weight, lora_a, lora_b, scaling, bias)

    @property
    def uncast(self) -> Projection:
        """The frozen base and its adapter as they are."""
        modules = self.get_base_layer(), self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        base, a, b = (cast(nn.Linear, module) for module in modules)
        return Projection(base.weight, a.weight, b.weight, self.scaling[ADAPTER], base.bias)

    @property
    def packable(self) -> bool:
        """Whether this trains plain LoRA beside its whole weight, without gates, dropout and observed inputs."""
        apart = self.observed[1] is not None or any(gate is not None for gate in self.gates) or self.dropout
        return self.plain and self._learns_whole and self.holds_casts and not apart

    @property
    def _learns_whole(self) -> bool:
        """Whether passes read the whole weight beside an adapter that learns: a constant one is merged into it."""
        whole = self.out_mask is None and self.in_mask is None and self.kept is None
        return whole and cast(nn.Linear, self.lora_A[ADAPTER]).weight.requires_grad

    def _narrowed(self, weight: Tensor) -> Tensor:
        """The frozen weight in autocast's dtype, cast once: casts are a sixth of a step on one short window."""
        device = weight.device.type
        idle = not torch.is_autocast_enabled(device) or weight.dtype != torch.float32 or weight.requires_grad
        if idle or not self.holds_casts:
            return weight
        if self._narrow is None or self._narrow[0] is not weight or self._narrow[1] != weight._version:
            self._narrow = weight, weight._version, weight.detach().to(torch.get_autocast_dtype(device))
        return self._narrow[2]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.seen(self._forward(observed(x, self.observed[1]), *args, **kwargs))

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.plain:
            return self._as_peft(x, *args, **kwargs)
        packed = self.packs.of((self,), x)
        if packed is not None:
            return packed_linears(x, *packed)
        weight, lora_a, lora_b, scaling, bias = self.projection
        p = self.dropout
        # From torch's generator, so that activation checkpointing draws the same one again.
        seed = new_seed(x) if p else None
        if self.kept is not None:
            return kept_lora_linear(x, self.kept, lora_a, lora_b, scaling=scaling, dropout=p, seed=seed)
        return masked_lora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            scaling=scaling,
            out_mask=self.out_mask,
            in_mask=self.in_mask,
            mask_lora=self.mask_lora,
            bias=bias,
            dropout=p,
            seed=seed,
        )

    def _as_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.out_mask is None and self.in_mask is None and self.kept is None:
            return super().forward(x, *args, **kwargs)
        if not self._alone:
            raise RuntimeError("masks are set on a merged or disabled LoRA layer: clear them with set_masks first")
        if not self.mask_lora:
            raise RuntimeError("DoRA has no base path to mask alone, since it scales the sum: merge it first")
        y = super().forward(x if self.in_mask is None else (x * self.in_mask).to(x.dtype), *args, **kwargs)
        return y if self.out_mask is None else (y * self.out_mask).to(y.dtype)


class MaskedMLP(Hooked):
    """Replaces a gated MLP whose three linears are `MaskedPeftLinear`: same submodules, same names.

    The fused block saves less for backward than three separate linears, and draws LoRA dropout once for gate and up. It
    computes what the original MLP does, linear by linear, where one of them does not train plain LoRA, has another
    probability of dropout, or a hook before its forward, and where `atp_kernels` has no such activation (None).
    """

    gate_proj: MaskedPeftLinear
    up_proj: MaskedPeftLinear
    down_proj: MaskedPeftLinear

    def __init__(self, mlp: Any, activation: str | None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.activation = activation
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = linears = self.gate_proj, self.up_proj, self.down_proj
        packed = self.packed(x)
        if packed is not None:
            return down.seen(packed)
        if self.activation is None or not all(linear.fusible for linear in linears):
            return self._apart(x)
        if not gate.dropout == up.dropout == down.dropout:
            return self._apart(x)
        options: dict[str, Any]
        if all(linear.kept is not None for linear in linears):
            options = {"kept": tuple(linear.kept for linear in linears)}
        elif self._one_mask():
            options = {"mask": gate.out_mask, "mask_lora": gate.mask_lora}
        else:
            return self._apart(x)
        if gate.observed[0] is not None or up.observed[0] is not None:
            sums = gate.observed[0]
            if sums is None or sums is not up.observed[0] or len(x) > len(sums) or not x.requires_grad:
                return self._apart(x)
            options["mask_grad"] = sums[: len(x)]
        if gate.dropout:
            options |= {"dropout": gate.dropout, "seeds": (new_seed(x), new_seed(x))}
        projections = (linear.projection for linear in linears)
        y = masked_lora_swiglu(x, *projections, activation=self.activation, **options)
        return down.seen(y)

    def packed(self, x: Tensor, norm: Norm | None = None) -> Tensor | None:
        """All of it in a training step that `packed_mlp` takes, which adds it to the stream x if given a norm.

        None in other steps.
        """
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        sums = gate.observed[0]
        if self.activation is None or sums is not up.observed[0] or not all(part.fusible for part in (gate, up, down)):
            return None
        if sums is not None and (len(x) > len(sums) or not x.requires_grad):
            return None
        first = gate.packs.of((gate, up), x)
        last = None if first is None else down.packs.of((down,), x)
        if first is None or last is None or (norm is not None and down.observed[0] is not None):
            return None
        sums = None if sums is None else sums[: len(x)]
        gelu = self.activation == GELU
        return packed_mlp(x, first[0], last[0], [*first[1], *last[1]], sums, norm, gelu)

    def _apart(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def _one_mask(self) -> bool:
        """Whether one mask of the channels, in one form, is all that is set."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return (
            gate.out_mask is up.out_mask
            and gate.in_mask is up.in_mask is down.out_mask is None
            and gate.mask_lora == up.mask_lora == down.mask_lora
            # Where the mask covers the sums, removed channels are zero before down sees them.
            and (down.in_mask is gate.out_mask or (gate.mask_lora and down.in_mask is None))
        )


def fuse_layers(model: PeftModel) -> PeftModel:
    """Fuses norms, RoPE, MLPs and whole decoder layers around their masked LoRA layers; returns the model.

    What somebody else serves, as Liger and `kernelize` do, stays as it is (`runs_stock_forward`).
    """
    base = cast(PreTrainedModel, model.get_base_model())
    family = family_of(base.config)
    for index, layer in enumerate(base.get_decoder().layers):
        if not family.own_attention:
            fuse_attention(layer.self_attn)
        for linear in (module for module in layer.modules() if isinstance(module, MaskedPeftLinear)):
            linear.holds_casts = not is_sharded(base)
        if isinstance(family, ExpertFamily):
            mask_experts(layer, family)
        elif len(family.mlp) == 3 and runs_stock_forward(layer.mlp) and _are_masked(layer.mlp):
            layer.mlp = MaskedMLP(layer.mlp, family.activation(base.config))
        for name in family.norms(layer_config(base.config, index)):
            norm, offset = layer.get_submodule(name), family.unit_offset
            if not runs_stock_forward(norm) or family.layer_norm or not (offset or hasattr(norm, "variance_epsilon")):
                continue
            if not is_sharded(base):
                layer.set_submodule(name, FusedRMSNorm(norm, offset=offset))
            elif not offset:
                FusedRMSNorm.adopt(norm)
        if not is_sharded(base) and family.blocks is BLOCKS:
            fuse_layer(layer)
    return model


def _are_masked(mlp: Any) -> bool:
    return all(isinstance(part, MaskedPeftLinear) for part in _parts(mlp))


def _parts(mlp: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def unload(model: PeftModel, stock: list[dict[str, Any]]) -> PreTrainedModel:
    """Takes LoRA and fused modules out of a model again; stock: what `stock_modules` gave before. Returns the model."""
    plain: PreTrainedModel = model.unload()
    family = family_of(plain.config)
    for layer, modules in zip(plain.get_decoder().layers, stock, strict=True):
        unfuse_layer(layer)
        unfuse_attention(layer.self_attn)
        mlp = modules["mlp"]
        if isinstance(family, ExpertFamily):
            unmask_experts(layer, family)
        elif isinstance(layer.mlp, MaskedMLP):  # PEFT gives back the linears, but not the modules around them
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = _parts(layer.mlp)
        for name, module in modules.items():
            layer.set_submodule(name, module)
    return plain


def stock_modules(model: PreTrainedModel) -> list[dict[str, Any]]:
    """For each decoder layer of a plain causal LM the modules, by name, that `fuse_layers` replaces."""
    family, layers = family_of(model.config), model.get_decoder().layers
    norms = (family.norms(layer_config(model.config, index)) for index in range(len(layers)))
    return [{n: layer.get_submodule(n) for n in ("mlp", *own)} for layer, own in zip(layers, norms, strict=True)]


def lora_config(
    modules: Iterable[str],
    *,
    r: int,
    alpha: float,
    dropout: float,
    variant: LoraVariant = "lora",
    experts: bool = False,
) -> LoraConfig:
    """PEFT's config of an adapter on the linears with these names, with or without what stands before the last dot.

    experts: whether it is on the stacked weights of experts too. Raises `InputError` where PEFT is too old for that.
    """
    if experts and tuple(map(int, peft.__version__.split(".")[:2])) < _STACKS_SIDES:
        raise InputError(f"lora.experts needs PEFT 0.19 or newer, and this is {peft.__version__}: upgrade peft")
    return LoraConfig(
        r=r,
        lora_alpha=cast(int, alpha),  # PEFT only divides it
        lora_dropout=dropout,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in modules}),
        target_parameters=[f"{EXPERTS}.{name}" for name in STACKED] if experts else None,
        task_type="CAUSAL_LM",
    )


def add_lora(
    model: PreTrainedModel,
    space: MaskSpace,
    *,
    r: int,
    alpha: float,
    dropout: float,
    variant: LoraVariant = "lora",
    experts: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Wraps a causal LM in a stock PEFT adapter on all linears that the space adapts, with masked layers and MLPs.

    experts: whether each expert has an adapter too.

    The model computes what it did before. variant: lora; rslora, whose scale is alpha / sqrt(r) (arXiv 2312.03732);
    dora (arXiv 2402.09353). The adapter that is saved is PEFT's: the custom layer is registered on the config, not
    written to it.
    """
    config = lora_config(space.adapted, r=r, alpha=alpha, dropout=dropout, variant=variant, experts=experts)
    config._register_custom_module({nn.Linear: MaskedPeftLinear})
    with seeded(seed):
        wrapped = get_peft_model(model, config)
    if variant == "dora":
        _widen_magnitudes(wrapped)
    return fuse_layers(wrapped)


@torch.no_grad()
def _widen_magnitudes(model: PeftModel) -> None:
    """Takes DoRA's magnitudes again in their own dtype: PEFT rounds them to that of 16-bit weights, then widens them.

    They are the norms of the rows of W, since B is zero.
    """
    for layer in (module for module in model.modules() if isinstance(module, MaskedPeftLinear)):
        modules: Any = layer.lora_magnitude_vector[ADAPTER], layer.get_base_layer()
        magnitude, weight = (module.weight for module in modules)
        magnitude.copy_(torch.linalg.norm(weight.to(magnitude.dtype), dim=1))
