"""Operations of a pass against those that torch counts while one runs."""

import pytest
import torch
from tiny_plans import LENGTH, VOCAB, job, lora_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atp.data import collate
from atp.decide.maker import frozen
from atp.lora.controller import MaskController
from atp.models.attention import use_training_attention
from atp.plan import cost as costs
from atp.plan.cost import Cost, Flops, Row, cost_of
from atp.plan.probe import seconds_of
from atp.plan.shapes import mask_of
from atp.removal import cut_model
from atp.training.loss import causal_lm_loss

TOKENS = 2 * LENGTH
SCORED = (LENGTH - 1) / LENGTH  # nothing predicts the first token of a window


def added(total, left, right, **options):
    """Operations of a product that is added in place, which torch's own table leaves out; arguments are shapes."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: added}


@pytest.fixture(autouse=True)
def unfused(monkeypatch):
    """Attention in products that torch can count: the scores are kept, so backward has four products for two."""
    monkeypatch.setattr(costs, "ATTENTION_BACKWARD", 2.0)
    monkeypatch.setenv("ATP_KERNELS_BACKEND", "reference")
    with sdpa_kernel(SDPBackend.MATH):
        yield


def counted(model, backward=True):
    row = {"input_ids": torch.arange(LENGTH) % VOCAB, "labels": torch.arange(LENGTH) % VOCAB}
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        loss = causal_lm_loss(model, collate([row, row]))
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("space", ["kv_group", "head_dim", "disp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_step(space, checkpointing):
    plan = job(f"decisions.space={space}", f"training.gradient_checkpointing={checkpointing}", scored=SCORED)
    model = lora_model(plan.shapes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = Cost(plan).step(plan.shapes.whole)
    assert expected.cut == 0 and expected.head == pytest.approx(2 * SCORED * 2 * 96 * VOCAB)
    assert counted(model) == pytest.approx(expected.total * TOKENS, rel=1e-3)


@pytest.mark.parametrize("space", ["kv_group", "disp"])
def test_a_step_of_the_cut_model(space):
    plan = job(f"decisions.space={space}", scored=SCORED)
    shapes = plan.shapes
    smaller = cut_model(lora_model(shapes), shapes.space, mask_of(shapes.space, shapes.counts))
    use_training_attention(smaller.get_base_model())
    expected = Cost(plan).step(shapes.kept)
    assert expected.whole == 0
    assert counted(smaller) == pytest.approx(expected.total * TOKENS, rel=1e-3)


def test_a_soft_mask():
    plan = job(scored=SCORED)
    model = lora_model(plan.shapes)
    mask = torch.ones(plan.shapes.space.size, requires_grad=True)
    MaskController(model, plan.shapes.space).set(mask, "soft")
    with frozen(model):
        found = counted(model)
    assert found == pytest.approx(Cost(plan).decision().total * TOKENS, rel=1e-3)


def test_a_forward_pass():
    plan = job(scored=SCORED)
    with torch.no_grad():
        found = counted(lora_model(plan.shapes), backward=False)
    expected = Cost(plan).forward(plan.shapes.whole).total
    # The loss also forms the gradient of the logits where one is wanted, which is not here.
    assert found == pytest.approx((expected - (1 - SCORED) * 2 * 96 * VOCAB) * TOKENS, rel=1e-3)


def test_masks_save_their_share_of_the_frozen_linears():
    cost = Cost(job())
    whole, half = cost.step(cost.whole).total, cost.step(cost.whole, share=0.5).total
    spared = sum(2 * cost.whole.linears[f"self_attn.{name}_proj"].out_features * 96 for name in "qkv")
    assert whole - half == pytest.approx(0.5 * (2 * 2 * 2 * cost.whole.weights - spared))


def test_rows_are_the_parts_of_a_run():
    settings = ("training.steps=30", "training.gradient_accumulation=3", "decisions.refit_windows=8")
    plan = job(*settings, "training.distill=0.5")
    rows = {row.phase: row for row in cost_of(plan)}
    assert list(rows) == ["score", "open", "saliency", "refit", "tune", "certificate", "score again"]
    assert (rows["open"].steps, rows["open"].tokens) == (10, 10 * 2 * 3 * LENGTH)
    assert (rows["tune"].steps, rows["tune"].tokens) == (20, 20 * 2 * 3 * LENGTH)
    assert rows["refit"].tokens == 8 * LENGTH and rows["score"].tokens == 60 * LENGTH
    cost = Cost(plan)
    taught = cost.step(cost.cut) + cost.forward(cost.whole, lora=False)
    assert rows["tune"].flops == taught * rows["tune"].tokens
    assert rows["open"].flops == cost.step(cost.whole) * rows["open"].tokens


def test_learned_decisions_search_and_settle():
    plan = job(
        "decisions.source=learned", "training.search=10", "training.settle=5", "training.distill=0",
        "decisions.every=4", "decisions.batch_size=3", "training.steps=30", "training.open=0",
    )  # fmt: skip
    rows = {row.phase: row for row in cost_of(plan)}
    assert list(rows) == ["score", "saliency", "search", "refit", "settle", "tune", "certificate", "score again"]
    cost = Cost(plan)
    shares = [plan.config.decisions.target_keep + 0.4 * (1 - min(step / 4, 1)) ** 3 for step in range(1, 11)]
    steps = cost.step(cost.whole, share=sum(shares) / 10) * (10 * 2 * LENGTH)
    assert rows["search"].flops.total == pytest.approx((steps + cost.decision() * (3 * 3 * LENGTH)).total)
    settled = cost.step(cost.whole, share=plan.shapes.share)
    assert rows["settle"].flops.total == pytest.approx(settled.total * 5 * 2 * LENGTH)


def test_time_is_each_kind_of_operation_at_its_own_speed():
    row = Row("tune", 1, 1, Flops(whole=8e9, cut=6e9, head=1e9))
    assert seconds_of(row, Flops(whole=4e9, cut=2e9, head=10e9)) == pytest.approx(2 + 3 + 0.1)
