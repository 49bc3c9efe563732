"""Operations of a pass against those that torch counts while one runs."""

import dataclasses

import pytest
import torch
from tiny_plans import LENGTH, VOCAB, job, lora_model, settings, unequal_job
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atp.data import collate
from atp.decide.maker import frozen
from atp.lora.controller import MaskController
from atp.models.attention import use_training_attention
from atp.plan import cost as costs
from atp.plan import probe
from atp.plan.cost import Cost, Flops, PhaseCost, cost_of
from atp.plan.probe import one_layer, seconds_of
from atp.plan.shapes import mask_of
from atp.removal import cut_model
from atp.removal.masters import train_embeddings, whole_model
from atp.spaces.space import MaskSpace
from atp.training import offload
from atp.training.cross_entropy import linear_cross_entropy
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


def test_steps_of_a_model_whose_layers_differ_already():
    plan = unequal_job(scored=SCORED)
    shapes = plan.shapes
    assert [widths.kv_heads for widths in shapes.whole] == [2, 1] and shapes.whole[0] != shapes.whole[1]
    model = lora_model(shapes)
    assert counted(model) == pytest.approx(Cost(plan).step(shapes.whole).total * TOKENS, rel=1e-3)
    smaller = cut_model(model, shapes.space, mask_of(shapes.space, shapes.counts))
    use_training_attention(smaller.get_base_model())
    assert counted(smaller) == pytest.approx(Cost(plan).step(shapes.kept).total * TOKENS, rel=1e-3)
    assert plan.after["total"] == sum(p.numel() for n, p in smaller.named_parameters() if "lora_" not in n)
    # Speeds are those of the first layer.
    assert one_layer(shapes.config).layer_shape(0) == shapes.config.layer_shape(0)
    assert one_layer(shapes.config).num_hidden_layers == 1
    assert MaskSpace.from_config(one_layer(shapes.config, times=3), "kv_group").num_layers == 3


@pytest.mark.parametrize("space", ["kv_group", "disp"])
def test_a_step_of_the_cut_model(space):
    plan = job(f"decisions.space={space}", scored=SCORED)
    shapes = plan.shapes
    smaller = cut_model(lora_model(shapes), shapes.space, mask_of(shapes.space, shapes.counts))
    use_training_attention(smaller.get_base_model())
    expected = Cost(plan).step(shapes.kept)
    assert expected.whole == expected.step == 0
    assert counted(smaller) == pytest.approx(expected.total * TOKENS, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_steps_that_train_more_than_lora(tied):
    plan = job("training.embeddings=true", "training.after_cut=full", scored=SCORED, tie_word_embeddings=tied)
    shapes, model = plan.shapes, lora_model(plan.shapes)
    train_embeddings(model)
    assert counted(model) == pytest.approx(Cost(plan).step(shapes.whole).total * TOKENS, rel=1e-3)
    whole = whole_model(cut_model(model, shapes.space, mask_of(shapes.space, shapes.counts)))
    use_training_attention(whole)
    assert counted(whole) == pytest.approx(Cost(plan).full_step().total * TOKENS, rel=1e-3)
    rows = {row.phase: row for row in cost_of(plan)}
    assert rows["tune"].flops == Cost(plan).full_step() * rows["tune"].tokens


def test_a_soft_mask_and_a_forward_pass():
    plan = job(scored=SCORED)
    model, cost = lora_model(plan.shapes), Cost(plan)
    with torch.no_grad():
        found = counted(model, backward=False)
    # The loss also forms the gradient of the logits where one is wanted, which is not here.
    expected = cost.forward(plan.shapes.whole).total - (1 - SCORED) * 2 * 96 * VOCAB
    assert found == pytest.approx(expected * TOKENS, rel=1e-3)
    mask = torch.ones(plan.shapes.space.size, requires_grad=True)
    MaskController(model, plan.shapes.space).set(mask, "soft")
    with frozen(model):
        assert counted(model) == pytest.approx(cost.decision().total * TOKENS, rel=1e-3)


def test_masks_save_their_share_of_the_frozen_linears():
    cost = Cost(job())
    whole, half = cost.step(cost.whole).total, cost.step(cost.whole, share=0.5).total
    spared = sum(2 * cost.whole[0].linears[f"self_attn.{name}_proj"].out_features * 96 for name in "qkv")
    assert whole - half == pytest.approx(0.5 * (2 * 2 * 2 * cost.whole[0].weights - spared))


def test_rows_are_the_parts_of_a_run():
    settings = ("training.steps=30", "training.gradient_accumulation=3", "decisions.refit_windows=8")
    plan = job(*settings)
    rows = {row.phase: row for row in cost_of(plan)}
    assert list(rows) == ["score", "open", "saliency", "refit", "tune", "certificate", "score again"]
    assert (rows["open"].steps, rows["open"].tokens) == (10, 10 * 2 * 3 * LENGTH)
    assert (rows["tune"].steps, rows["tune"].tokens) == (20, 20 * 2 * 3 * LENGTH)
    assert rows["refit"].tokens == 8 * LENGTH and rows["score"].tokens == 60 * LENGTH
    cost = Cost(plan)
    assert rows["tune"].flops == cost.step(cost.cut) * rows["tune"].tokens
    assert rows["open"].flops == cost.step(cost.whole) * rows["open"].tokens


def test_each_round_refits_and_all_but_the_last_judge():
    settings = ("training.steps=30", "decisions.refit_windows=8", "decisions.saliency_windows=5")
    for source, measured in (("tuned", 5), ("static", 5), ("running", 0)):
        one, three = (
            {row.phase: row for row in cost_of(job(*settings, f"decisions.source={source}", f"decisions.rounds={n}"))}
            for n in (1, 3)
        )
        assert three["refit"].tokens == 3 * one["refit"].tokens == 3 * 8 * LENGTH
        assert three["refit"].flops == one["refit"].flops * 3
        assert three["saliency"].tokens == (measured + 2 * 8) * LENGTH
        assert three["saliency"].flops == Cost(job(*settings)).decision() * three["saliency"].tokens
        assert ("saliency" in one) == bool(measured)
        assert three["tune"] == one["tune"] and three["certificate"] == one["certificate"]


@pytest.mark.parametrize(
    ("every", "refit", "before", "after"),
    [(7, 8, 1 + 2, 4 + 1), (7, 0, 1 + 1, 4 + 1), (10, 8, 1 + 2, 2 + 1), (99, 8, 2, 2)],
)
def test_scores_on_a_validation_split_are_counted(every, refit, before, after):
    plan = job(
        "training.steps=30", "training.open=10", "evaluation.validation_windows=3", f"evaluation.every={every}",
        f"decisions.refit_windows={refit}",
    )  # fmt: skip
    row = next(row for row in cost_of(plan) if row.phase == "validation")
    cost = Cost(plan)
    assert row.tokens == (before + after) * 3 * LENGTH
    flops = cost.forward(cost.whole).total * before + cost.forward(cost.cut).total * after
    assert row.flops.total == pytest.approx(flops * 3 * LENGTH)


def test_learned_decisions_search_and_settle():
    plan = job(
        "decisions.source=learned", "training.search=10", "training.settle=5",
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
    row = PhaseCost("tune", 1, 1, Flops(whole=8e9, cut=6e9, head=1e9))
    assert seconds_of(row, Flops(whole=4e9, cut=2e9, head=10e9)) == pytest.approx(2 + 3 + 0.1)


def test_the_dense_baseline_has_the_steps_of_the_open_phase():
    rows = {row.phase: row.flops for row in cost_of(job("evaluation.dense_baseline=true", "training.steps=30"))}
    dense, opened = rows["dense baseline"], rows["open"]
    assert dense.whole == opened.whole == 0
    assert dense.step == pytest.approx(3 * opened.step) and rows["saliency"].whole > 0


@pytest.mark.parametrize(("sample", "length"), [(None, LENGTH), (10.7, 11)])
def test_the_probe_times_batches_like_those_of_the_run(monkeypatch, sample, length):
    """Short samples make short batches, in which a token takes longer."""
    seen, scored = [], []

    def once(step, device, seconds):
        step()
        return 2.0

    def loss(model, batch):
        seen.append((len(model.get_base_model().model.layers), *batch["input_ids"].shape))
        return causal_lm_loss(model, batch)

    def head(states, *rest):
        scored.append(len(states))
        return linear_cross_entropy(states, *rest)

    monkeypatch.setattr(probe, "_median", once)
    monkeypatch.setattr(probe, "causal_lm_loss", loss)
    monkeypatch.setattr(probe, "linear_cross_entropy", head)
    plan = job("evaluation.dense_baseline=true", scored=0.25)
    plan = dataclasses.replace(plan, sample=sample or LENGTH, calibrated=19.6)
    found = probe.flop_rates(plan)
    measured = (2, 1, 20)  # one calibration window, as saliency is measured
    assert sorted(seen) == sorted([measured] + 2 * [(2, 2, length)]), "both layers, both rows of a batch"
    assert scored == [round(2 * plan.sample * 0.25)]
    assert all(seconds_of(row, found) > 0 for row in cost_of(plan))
    expected = Cost(dataclasses.replace(plan, sample=length)).step(plan.shapes.kept).cut + 4 * 96 * 16
    assert found.cut == pytest.approx(expected * 2 * length / 2.0), "with a head of 16 words"
    without = settings("evaluation.dense_baseline=false", "decisions.refit_windows=0")
    found = probe.flop_rates(dataclasses.replace(plan, config=without))
    assert found.moments == found.solved == 0


@pytest.mark.parametrize(("packing", "source", "aside"), [("joined", "running", False), ("separate", "tuned", True)])
def test_the_probe_times_steps_as_the_run_takes_them(monkeypatch, tmp_path, packing, source, aside):
    """With what a running saliency observes, the mask that keeps samples apart, checkpoints and offloading."""
    seen, written, to_file = [], [], offload._to_file

    def loss(model, batch):
        linear = model.get_base_model().model.layers[0].mlp.gate_proj
        learns = linear.lora_A["default"].weight.requires_grad if hasattr(linear, "lora_A") else None
        judged = getattr(linear, "out_mask", None) is not None or getattr(linear, "observed", [None])[0] is not None
        seen.append((learns, judged, "position_ids" in batch, model.is_gradient_checkpointing))
        return causal_lm_loss(model, batch)

    monkeypatch.setattr(offload, "SMALLEST", 1)
    monkeypatch.setattr(offload, "_to_file", lambda *found: written.append(1) or to_file(*found))
    monkeypatch.setattr(probe, "_median", lambda step, device, seconds: (step(), 1.0)[1])
    monkeypatch.setattr(probe, "causal_lm_loss", loss)
    asked = (f"training.gradient_checkpointing={aside}", f"training.offload={aside}", f"output_dir={tmp_path / 'run'}")
    probe.flop_rates(job(f"data.packing={packing}", f"decisions.source={source}", *asked))
    apart, watched = packing == "separate", source == "running"
    told = [(False, True), (True, watched), (True, False)]  # measured, open and cut
    assert seen == [(*each, apart, aside) for each in told] and bool(written) == aside
    assert not list(tmp_path.iterdir()), "nothing is left of the file that a CPU offloads to"


def test_calibration_data_may_be_shorter_than_training_samples():
    """As headlines are, or longer, as general text among them is."""
    rows = [
        {row.phase: row for row in cost_of(dataclasses.replace(job(), calibrated=calibrated))} for calibrated in (32, 8)
    ]
    for phase in ("saliency", "refit", "certificate"):
        long, short = (found[phase] for found in rows)
        assert long.tokens == 4 * short.tokens and long.flops.total > 2 * short.flops.total, phase
    assert rows[0]["open"] == rows[1]["open"]
