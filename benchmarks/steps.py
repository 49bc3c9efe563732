"""Whole training steps by phase, with the product's own classes: open, decision, search, and tune after the cut.

A random-weight Llama of the named sizes trains on random tokens; LoRA sits on all its linears. `part` is the mask
space. Weights are float32 on a CPU and of the case's dtype on a GPU; a 16-bit dtype means autocast. All variants of
a case share the frozen base weights, and all but stock PEFT compute the loss as the trainer does.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from atp.config import DecisionsConfig, TrainingConfig
from atp.data import collate
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.decide.maker import DecisionMaker
from atp.lora.controller import MaskController
from atp.lora.layer import ADAPTER, MaskedPeftLinear, add_lora
from atp.lora.regularizers.lasso import LoraGroups
from atp.models.attention import use_training_attention
from atp.models.fused import split_projections
from atp.removal import cut_model
from atp.spaces.space import MaskSpace
from atp.training.flat import FlatParameters
from atp.training.loss import causal_lm_loss
from atp.training.optimizer import adamw
from atp_kernels.linear import definition
from benchmarks.case import Case, Variant, Variants
from benchmarks.shapes import Model

_BETA = 0.3
WIDTHS = {"cpu": {"mlp": 32}, "cuda": {"mlp": 128}}  # what the kept widths are a multiple of


class UnfusedMaskedLinear(MaskedPeftLinear):
    """The masked LoRA layer in plain PyTorch operations, as one would write it on top of PEFT."""

    def forward(self, x: Tensor) -> Tensor:
        return definition.masked_lora_linear(
            x, self.get_base_layer().weight, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight,
            scaling=self.scaling[ADAPTER], out_mask=self.out_mask, in_mask=self.in_mask, mask_lora=self.mask_lora,
        )  # fmt: skip


def random_model(sizes: Model, length: int, dtype: torch.dtype, family: str = "llama") -> nn.Module:
    """A Llama of these sizes with random weights of a dtype, for windows of at least `length` tokens.

    family: another `model_type` in place of Llama's, with the settings that transformers gives it.
    """
    config = AutoConfig.for_model(
        family, vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim, tie_word_embeddings=sizes.tied, max_position_embeddings=max(2048, length),
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return split_projections(AutoModelForCausalLM.from_config(config, dtype=dtype))


class Scene:
    """What the steps of one case share: base model, tokens, mask space and masks at the share to keep."""

    def __init__(self, case: Case, family: str = "llama") -> None:
        self.case, sizes = case, case.sizes
        torch.manual_seed(0)
        with torch.device(case.device):
            self.base = random_model(sizes, case.length, self._weight_dtype(), family)
        self.base.requires_grad_(False).train()
        ids = torch.randint(sizes.vocab, (case.tokens // case.length, case.length))
        batch = collate([{"input_ids": row, "labels": row} for row in ids])
        self.batch = {k: v.to(case.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.space = MaskSpace.from_config(self.base.config, case.part)
        budget, widths = Budget(self.space), WIDTHS[case.device]
        self.masks = [fit_mask(torch.randn(self.space.size), case.keep, budget, widths) for _ in range(2)]

    def _weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.case.device == "cpu" else self.case.torch_dtype

    def copy(self) -> nn.Module:
        """The base model as a new module tree over the same weights, with activation checkpointing if asked."""
        shared = {id(tensor): tensor for tensor in self.base.parameters()}
        return self.checkpointed(copy.deepcopy(self.base, shared))

    def checkpointed(self, model: nn.Module) -> nn.Module:
        """Turns activation checkpointing on where the case asks for it."""
        if self.case.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        return model

    def with_lora(self, layer: type[nn.Module] | None) -> nn.Module:
        """Base and LoRA on all linears of the space, with layers of a class or PEFT's own, all of the same values."""
        names = sorted({name.rsplit(".", 1)[-1] for name in self.space.modules})
        config = LoraConfig(r=self.case.rank, lora_alpha=self.case.rank, target_modules=names, task_type="CAUSAL_LM")
        if layer is MaskedPeftLinear:
            model = add_lora(self.copy(), self.space, r=self.case.rank, alpha=self.case.rank, dropout=0.0)
        else:
            if layer is not None:
                config._register_custom_module({nn.Linear: layer})
            model = get_peft_model(self.copy(), config)
        rng = torch.Generator(self.case.device).manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(0, 0.01, generator=rng)
        return model.train()

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""
        return torch.autocast(self.case.device, self.case.torch_dtype, enabled=self.case.dtype != "float32")

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy of the batch, as the trainer computes it."""
        use_training_attention(model)
        with self.autocast():
            return causal_lm_loss(model, self.batch)

    def stock_loss(self, model: nn.Module) -> Tensor:
        """The same from transformers."""
        with self.autocast():
            return model(input_ids=self.batch["input_ids"], labels=self.batch["labels"]).loss

    def lora_step(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module], Tensor],
        masked: Callable[[], AbstractContextManager] = nullcontext,
        regularize: Callable[[], object] = lambda: None,
        holds: tuple[object, ...] = (),
        same: bool = True,
        flat: bool = False,
    ) -> Variant:
        """Forward, backward, gradient clip and AdamW over the adapter, under masks; regularize adds to gradients.

        flat: with the trainer's optimizer over one flat tensor.
        """
        learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        trained, optimizer, zero_grad = self._optimizer(learned, flat)

        def step() -> Tensor:
            with masked():
                loss = loss_of(model)
                loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            regularize()
            optimizer.step()
            zero_grad()
            return loss.detach()

        return Variant(step, same=same, holds=(model, optimizer, *holds))

    @staticmethod
    def _optimizer(
        learned: dict[str, nn.Parameter], flat: bool
    ) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Callable[[], None]]:
        """The tensors whose gradients are clipped, their optimizer, and what prepares gradients for the next step."""
        if not flat:
            stock = torch.optim.AdamW(learned.values(), lr=1e-4, weight_decay=0.0, fused=True)
            return list(learned.values()), stock, stock.zero_grad
        together = FlatParameters(learned)
        ours = adamw(together, TrainingConfig())
        ours.param_groups[0]["lr"] = 1e-4
        return [together.flat], ours, together.zero_grad

    def open_step(self, *, observed: bool) -> Variant:
        """The step of the uncut model without masks; observed: each sample's gradients of a mask of ones are summed."""
        model = self.with_lora(MaskedPeftLinear)
        controller = MaskController(model, self.space)
        saliency = torch.zeros(self.space.size, device=self.case.device)

        @contextmanager
        def observing() -> Iterator[None]:
            with controller.observer.observing(len(self.batch["input_ids"])) as sums:
                yield
            saliency.add_(controller.observer.gradients(sums).square().sum(0))

        watched = observing if observed else nullcontext
        return self.lora_step(model, self.loss, watched, holds=(controller, saliency), same=False, flat=True)

    def masked_step(self, layer: type[nn.Module], masks: list[Tensor]) -> Variant:
        """The LoRA step of the search under hard masks, which alternate if there are several."""
        model = self.with_lora(layer)
        controller, groups = MaskController(model, self.space), LoraGroups(model, self.space)
        # As in training: the controller counts on the host and waits for a mask on the device; the lasso reads one.
        pairs = [(mask, mask.to(self.case.device)) for mask in masks]

        def masked() -> AbstractContextManager:
            pairs.append(pairs.pop(0))
            return controller.masks(pairs[-1][0], "hard")

        return self.lora_step(
            model,
            self.loss,
            masked,
            regularize=lambda: groups.lasso_grad_(pairs[-1][1], _BETA),
            holds=(controller, groups),
            same=len(pairs) == 1,
        )

    def stock_step(self, *, same: bool) -> Variant:
        """The step of stock PEFT LoRA on the dense model."""
        return self.lora_step(self.with_lora(None), self.stock_loss, same=same)


def before(case: Case) -> Variants:
    """The step before any decision: with saliency (`ours`), as a baseline's (`ours_dense`), and of stock PEFT LoRA."""
    scene = Scene(case)
    return {
        "stock": scene.stock_step(same=True),
        "ours": scene.open_step(observed=True),
        "ours_dense": scene.open_step(observed=False),
    }


def decision(case: Case) -> Variants:
    """One update of the generator; the floor is a dense forward and backward to activations without any LoRA."""
    scene = Scene(case)
    floor = scene.copy()
    floor.enable_input_require_grads()

    def dense() -> Tensor:
        loss = scene.loss(floor)
        loss.backward()
        return loss.detach()

    def decide(layer: type[nn.Module]) -> Variant:
        model = scene.with_lora(layer).requires_grad_(False)
        controller = MaskController(model, scene.space)
        config = DecisionsConfig(space=case.part, target_keep=case.keep)
        maker = DecisionMaker(scene.space, config, search_steps=100, prior=None, seed=0, device=case.device)

        def loss_of(mask: Tensor) -> Tensor:
            controller.set(mask, "soft")
            return scene.loss(model)

        def step() -> Tensor:
            torch.manual_seed(0)  # the generator's dropout, so that all variants decide alike
            outcome = maker.update(0, loss_of)
            maker.refresh(0)
            return outcome.loss

        return Variant(step, holds=(model, maker.generator, maker.optimizer))

    return {
        "unfused": decide(UnfusedMaskedLinear),
        "ours": decide(MaskedPeftLinear),
        "floor": Variant(dense, same=False, holds=(floor,)),
    }


def search(case: Case) -> Variants:
    """The LoRA step under hard masks; `ours_moving` meets another decision at every step."""
    scene = Scene(case)
    return {
        "unfused": scene.masked_step(UnfusedMaskedLinear, scene.masks[:1]),
        "stock": scene.stock_step(same=False),
        "ours": scene.masked_step(MaskedPeftLinear, scene.masks[:1]),
        "ours_moving": scene.masked_step(MaskedPeftLinear, scene.masks),
    }


def tune(case: Case) -> Variants:
    """The step of the really cut model, against stock PEFT LoRA on the dense one."""
    scene = Scene(case)
    cut = cut_model(scene.with_lora(MaskedPeftLinear), scene.space, scene.masks[0])
    return {
        "stock": scene.stock_step(same=True),
        "ours": scene.lora_step(scene.checkpointed(cut), scene.loss, same=False, flat=True),
    }
