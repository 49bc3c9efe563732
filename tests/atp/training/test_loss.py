"""The batch loss against the one that transformers computes, for stock, LoRA, cut and wrapped models."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from atp.data import collate
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.attention import use_training_attention
from atp.removal import cut_model
from atp.spaces.space import MaskSpace
from atp.training.loss import causal_lm_loss

IGNORE = -100
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip


def stock(kind="llama", **extra):
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}[kind]
    return model(config(**SHAPE | extra))


def with_lora(model, nudge=0.05):
    """The model in a LoRA adapter that is not zero."""
    space = MaskSpace.from_config(model.config)
    wrapped = add_lora(model, space, r=2, alpha=2, dropout=0.0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=nudge)
    return wrapped, space


def rows(seed=0, length=11, count=3, ignored=0.4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (count, length), generator=generator)
    labels = ids.masked_fill(torch.rand(count, length, generator=generator) < ignored, IGNORE)
    return [{"input_ids": i, "labels": lab} for i, lab in zip(ids, labels, strict=True)]


def gradients(loss, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained)


def plain_loss(model, batch):
    """From all logits, in their own dtype (transformers itself would round to float32)."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def check(model, batch, rtol=1e-10):
    """Loss and all gradients equal those of the plain form."""
    theirs = plain_loss(model, batch)
    ours = causal_lm_loss(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    for mine, other in zip(gradients(ours, model), gradients(theirs, model), strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_of_a_stock_model(kind, tied):
    check(stock(kind, tie_word_embeddings=tied).double(), collate(rows()))


def test_lora_model_under_hard_masks():
    model, space = with_lora(stock())
    model.double()
    mask = torch.arange(space.size) % 3 > 0
    with MaskController(model, space).masks(mask, "hard"):
        check(model, collate(rows()))


def test_decision_step_gradient_of_the_mask():
    model, space = with_lora(stock())
    model.double().requires_grad_(False)
    controller, batch = MaskController(model, space), collate(rows())
    found = []
    for loss_of in (causal_lm_loss, plain_loss):
        soft = torch.linspace(0.1, 1, space.size, dtype=torch.float64, requires_grad=True)
        with controller.masks(soft, "soft"):
            found.append(torch.autograd.grad(loss_of(model, batch), soft)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


def test_cut_model():
    model, space = with_lora(stock())
    check(cut_model(model.double(), space, torch.arange(space.size) % 3 > 0), collate(rows()))


def test_count_divides_the_sum_over_several_batches():
    model, _ = with_lora(stock())
    model.double()
    first, second = collate(rows(0)), collate(rows(1, ignored=0.8))
    total = len(first["targets"]) + len(second["targets"])
    parts = sum(causal_lm_loss(model, batch, total) for batch in (first, second))
    torch.testing.assert_close(parts, causal_lm_loss(model, collate(rows(0) + rows(1, ignored=0.8))))


@pytest.mark.parametrize("attention", ["sdpa", "training"])
def test_packed_samples_cost_what_they_cost_alone(attention):
    """Neither attention nor loss crosses the border, and padding adds nothing."""
    model, _ = with_lora(stock())
    model.double()
    if attention == "training":
        use_training_attention(model)
    long, short = rows(0, length=9, count=1)[0], rows(1, length=4, count=1)[0]
    packed = {name: torch.cat([long[name], short[name]]) for name in long}
    packed["position_ids"] = torch.cat([torch.arange(9), torch.arange(4)])
    packed["labels"] = packed["labels"].masked_fill(packed["position_ids"] == 0, IGNORE)
    losses = [causal_lm_loss(model, collate(batch)) for batch in ([long, short], [packed])]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for padded, joined in zip(*(gradients(loss, model) for loss in losses), strict=True):
        torch.testing.assert_close(padded, joined, rtol=1e-8, atol=1e-12)


def test_answers_only_cost_only_the_answers():
    """The head is applied to the scored positions alone, and not by the model, which would cast it for none."""
    model, _ = with_lora(stock())
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    batch = collate(rows(ignored=0.9))
    assert 0 < len(batch["targets"]) < 8
    causal_lm_loss(model, batch).backward()
    assert seen == []


def test_a_distributed_wrapper_sees_the_pass():
    model, _ = with_lora(stock())
    batch = collate(rows())
    plain = causal_lm_loss(model, batch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        passes = []
        wrapped.register_forward_hook(lambda *_: passes.append(1))
        loss = causal_lm_loss(wrapped, batch)
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert passes == [1] and torch.equal(loss, plain)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
