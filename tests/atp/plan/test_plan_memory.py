"""Memory of a plan, by hand for a tiny model: hidden 96, inner 256, 6 heads of 16, 2 KV heads, 2 layers, 64 words."""

from dataclasses import replace

import pytest
import torch
from tiny_plans import LENGTH, RANK, VOCAB, job, unequal_job

from atp.plan.job import Questions
from atp.plan.memory import memory_of
from atp_kernels import PRODUCTS_HELD

# Linears of a layer, as rows times columns: q and o, k and v, gate, up and down.
WHOLE = 2 * 96 * 96 + 2 * 32 * 96 + 3 * 256 * 96
ENDS = 2 * VOCAB * 96 + 96  # embedding, head and the last norm
TOTAL = 2 * (WHOLE + 2 * 96) + ENDS
ADAPTER = 2 * RANK * (2 * (96 + 96) + 2 * (32 + 96) + 3 * (256 + 96))
TOKENS = 2 * LENGTH
# Per token and layer: two inputs, q, k, v and the output of attention, gate and up, S of seven linears; the stream
# before both norms; a float32 per head and norm.
KEPT = 4 * (2 * 96 + 96 + 32 + 32 + 96 + 2 * 256 + 7 * RANK) + 4 * 2 * 96 + 4 * (6 + 2)


def parts(*overrides, **options):
    return {row["phase"]: row for row in memory_of(job(*overrides, **options))}


def test_open_by_hand():
    row = parts()["open"]
    # All logits fit in one chunk; beside them the states of the scored tokens and their gradient.
    logits = TOKENS * VOCAB * 4 + 2 * TOKENS * 96 * 4
    backward = TOKENS * (2 * 256 * 4 + 3 * 96 * 4)
    assert logits < backward
    assert row["parts"] == {
        "process": 2048 * VOCAB,
        "weights": 4 * TOTAL,
        "adapter": 4 * ADAPTER,
        "optimizer": 8 * ADAPTER,
        "gradients": 4 * ADAPTER,
        "activations": KEPT * TOKENS * 2,
        "backward": backward,
    }
    assert row["bytes"] == sum(row["parts"].values())


def test_offloaded_activations_leave_one_layer_in_the_backward_pass():
    here, away = parts()["open"]["parts"], parts("training.offload=true")["open"]["parts"]
    assert away == {name: n for name, n in here.items() if name != "activations"} | {
        "backward": here["backward"] + KEPT * TOKENS
    }
    both = ("training.gradient_checkpointing=true", "training.offload=true")
    assert parts(*both)["open"]["parts"] == away
    saliency = parts("training.offload=true", "decisions.source=static", "training.precision=bfloat16")["saliency"]
    assert saliency["parts"].keys().isdisjoint({"activations", "merged"})


def test_large_vocabularies_fill_chunks_of_logits():
    alone = parts("data.length=512", vocab_size=100_000)
    rows = 64 * 2**20 // (4 * 100_000)
    assert rows < 2 * 512
    assert alone["open"]["parts"]["logits"] == rows * 100_000 * 4 + 2 * 1024 * 96 * 4


def test_autocast_halves_products_and_adds_narrow_weights():
    row = parts(autocast=torch.bfloat16)["open"]["parts"]
    assert row["casts"] == 2 * (2 * WHOLE + ADAPTER)
    assert row["weights"] == 4 * TOTAL and row["adapter"] == 4 * ADAPTER
    probabilities = 6 * (2 * LENGTH - 4)  # of short windows, instead of a float32 for each head
    assert row["activations"] == (KEPT - (KEPT - 4 * 2 * 96 - 4 * 8) / 2 + probabilities) * TOKENS * 2
    assert parts("model.dtype=bfloat16")["open"]["parts"]["weights"] == 2 * TOTAL


def test_checkpointing_keeps_the_stream_and_computes_one_layer_again():
    row = parts("training.gradient_checkpointing=true")["open"]["parts"]
    assert row["activations"] == 96 * 4 * TOKENS * 2
    assert row["backward"] == KEPT * TOKENS + TOKENS * (2 * 256 * 4 + 3 * 96 * 4)


def test_refit_by_hand():
    plan = job("decisions.refit_windows=8")
    row = next(row for row in memory_of(plan) if row["phase"] == "refit")["parts"]
    kept = 0.9 * 256  # in the widest layer of a cut that leaves unequal ones
    assert kept > plan.shapes.counts["mlp"][0]
    tokens = 8 * LENGTH
    assert row["windows"] == tokens * (3 * 96 + 256) * 4
    assert row["solve"] == round(4 * max(2 * (kept**2 + kept * 96) + tokens * (kept + 96), 3 * kept**2 + 4 * kept * 96))
    assert "refit" not in parts("decisions.refit_windows=0")
    equal = parts("decisions.refit_windows=8", "decisions.uniform=true")
    assert equal["refit"]["parts"]["solve"] < row["solve"] and equal["export"]["bytes"] < parts()["export"]["bytes"]


def test_a_round_keeps_what_its_refit_changes():
    for source in ("tuned", "static", "running"):
        one, two = (parts(f"decisions.source={source}", f"decisions.rounds={n}") for n in (1, 2))
        assert list(two).count("saliency") == 1
        originals = 4 * 2 * (96 * 96 + 256 * 96)
        assert two["refit"]["parts"] == one["refit"]["parts"] | {"originals": originals}
        assert two["saliency"]["parts"]["originals"] == originals
        assert all(two[phase] == one[phase] for phase in ("cut", "tune", "export"))


def test_saliency_takes_one_window_and_no_gradients():
    row = parts("training.batch_size=8")["saliency"]["parts"]
    # Queries, keys and values before their masks, instead of inputs and S.
    each = 4 * (2 * (96 + 32 + 32) + 96 + 2 * 256) + 4 * 2 * 96 + 4 * 8
    assert row["activations"] == each * LENGTH * 2
    assert "gradients" not in row
    assert list(parts("decisions.source=static"))[1] == "saliency"
    assert "optimizer" not in parts("decisions.source=static")["saliency"]["parts"]
    assert "saliency" not in parts("decisions.source=running", "training.search=4")


def test_steps_that_are_watched_keep_what_masks_would_multiply():
    """Queries and keys; attention keeps values anyway."""
    for size in (1, 2):
        batch = f"training.batch_size={size}"
        running, tuned = parts(batch, "decisions.source=running"), parts(batch, "decisions.source=tuned")
        assert "saliency" in tuned and "saliency" not in running
        more = running["open"]["parts"]["activations"] - tuned["open"]["parts"]["activations"]
        assert more == 4 * (96 + 32) * size * LENGTH * 2
        assert running["tune"] == tuned["tune"]
    narrow = [parts(f"decisions.source={s}", autocast=torch.bfloat16)["refit"]["parts"] for s in ("running", "tuned")]
    assert narrow[0]["casts"] == 2 * (2 * WHOLE + ADAPTER) > narrow[1]["casts"], "measuring lets go of some"


def test_tune_is_of_the_cut_model():
    plan = job("decisions.refit_windows=0")
    row = next(row for row in memory_of(plan) if row["phase"] == "tune")["parts"]
    inner, groups = plan.shapes.counts["mlp"][0], plan.shapes.counts["kv_group"][0]
    assert groups == 1
    weights = 2 * 48 * 96 + 2 * 16 * 96 + 3 * inner * 96
    adapter = 2 * RANK * (2 * (48 + 96) + 2 * (16 + 96) + 3 * (inner + 96))
    assert row["weights"] == 4 * (2 * (weights + 2 * 96) + ENDS)
    assert row["adapter"] == 4 * adapter and row["optimizer"] == 8 * adapter
    kept = 4 * (2 * 96 + 48 + 16 + 16 + 48 + 2 * inner + 7 * RANK) + 4 * 2 * 96 + 4 * (3 + 2)
    assert row["activations"] == kept * TOKENS * 2


def test_all_weights_after_the_cut_by_hand():
    asked = "training.after_cut=full", "decisions.refit_windows=0", "training.keep_best=true"
    plan = job(*asked, "evaluation.every=9", "training.update_clipping=true", "model.dtype=bfloat16", count=2)
    rows = {row["phase"]: row["parts"] for row in memory_of(plan)}
    inner, total = plan.shapes.counts["mlp"][0], plan.after["total"]
    row = rows["tune"]
    assert row["weights"] == row["gradients"] == row["best"] == row["exchanged"] == row["clipped"] == 4 * total
    assert row["optimizer"] == 8 * total and "adapter" not in row and row["tables"] == 2 * 4 * VOCAB * 96
    # Two inputs, q, k, v and the output of attention, all four products of the MLP; norms keep what they normalized.
    kept = 4 * (2 * 96 + 48 + 16 + 16 + 48 + 4 * inner) + 4 * 4 * 96 + 4 * (3 + 2)
    assert row["activations"] == kept * TOKENS * 2
    assert rows["open"]["weights"] == 2 * TOTAL and rows["open"]["adapter"] == 4 * ADAPTER
    assert rows["export"]["weights"] == 4 * total and rows["score again"]["reloaded"] == 2 * total
    narrow = parts(*asked[:2], autocast=torch.bfloat16, device="cuda")["tune"]["parts"]
    assert narrow["casts"] == 2 * 2 * (2 * 48 * 96 + 2 * 16 * 96 + 3 * inner * 96)


def test_embeddings_beside_lora_by_hand():
    quiet = ("decisions.refit_windows=0",)
    for tied, dtype in ((True, "float32"), (False, "bfloat16")):
        given = (*quiet, f"model.dtype={dtype}")
        without, with_them = (
            parts(*given, *more, tie_word_embeddings=tied) for more in ((), ("training.embeddings=true",))
        )
        table = VOCAB * 96
        for phase in ("open", "tune"):
            row, before = with_them[phase], without[phase]
            more = {name: row["parts"][name] - before["parts"].get(name, 0) for name in row["parts"]}
            changed = {"optimizer": 8 * table, "gradients": 4 * table, "tables": 4 * table * (1 + tied)}
            changed |= {"weights": 2 * table} if dtype == "bfloat16" else {}
            assert {name: n for name, n in more.items() if n} == changed


def test_layers_that_differ_are_added_up_one_by_one():
    rows = {row["phase"]: row["parts"] for row in memory_of(unequal_job())}
    narrow = 2 * 48 * 96 + 2 * 16 * 96 + 3 * 100 * 96
    adapter = ADAPTER // 2 + RANK * (2 * (48 + 96) + 2 * (16 + 96) + 3 * (100 + 96))
    assert rows["open"]["weights"] == 4 * (WHOLE + narrow + 4 * 96 + ENDS)
    assert rows["open"]["adapter"] == 4 * adapter
    kept = 4 * (2 * 96 + 48 + 16 + 16 + 48 + 2 * 100 + 7 * RANK) + 4 * 2 * 96 + 4 * (3 + 2)
    assert rows["open"]["activations"] == (KEPT + kept) * TOKENS
    assert rows["open"]["backward"] == TOKENS * (2 * 256 * 4 + 3 * 96 * 4), "the widest layer counts"


def test_what_lies_on_the_host_is_not_on_the_device():
    host, device = (parts(device=name, vocab_size=20_000) for name in ("cpu", "cuda"))
    window = LENGTH * 20_000 * 4
    assert host["export"]["parts"]["certificate"] - device["export"]["parts"]["certificate"] == 4 * window
    assert host["score again"]["parts"]["reloaded"] == device["score again"]["parts"]["reloaded"]
    assert all("process" in row["parts"] for row in host.values())
    assert not any({"process", "file"} & row["parts"].keys() for row in device.values())


def test_models_that_are_read_again_and_timed_exist_once():
    """Tensors lie in the pages of their file; the original and the final model are timed side by side."""
    rows = {phase: row["parts"] for phase, row in parts().items()}
    speed, again = rows["speed"], rows["score again"]
    assert rows["export"]["reloaded"] == again["reloaded"] == speed["reloaded"] == rows["tune"]["weights"]
    assert "file" not in again and speed["weights"] == rows["score"]["weights"]
    assert not {"weights", "adapter", "optimizer"} & again.keys(), "the tuned model is gone by then"


def test_products_that_stay_compiled():
    def kept(*overrides, sequences=20, **options):
        asked = job("evaluation.batch_size=8", *overrides, **{"autocast": torch.bfloat16} | options)
        rows = memory_of(replace(asked, questions=Questions(sequences, longest=9, tokens=9 * sequences)))
        found = {row["phase"]: row["parts"].get("compiled", 0) / (280 * 1024) for row in rows}
        assert found["tune"] == found["export"] <= found["score again"] == found["speed"] and not found["open"]
        return found["speed"]

    steps = 11 * (2 * 2 + 3)  # of gate and up, and down, in both layers; of q, k and v, and o, in all
    assert kept() == steps + 4 * 2 * 7, "windows, three batches of questions, widths of their own in both layers"
    assert kept("decisions.uniform=true") == 11 * (2 + 3) + 4 * 7
    assert kept("data.packing=padded", sequences=0, sample=3.5) == 4 * steps + 2 * 7, "of samples of four tokens"
    assert kept(sequences=100_000) == PRODUCTS_HELD
    assert kept(sequences=0) == steps + 2 * 7 and kept(autocast=None) == 0 == kept(device="cuda")


@pytest.mark.parametrize("space", ["kv_group", "head_dim", "disp"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_more_of_anything_is_never_less(family, space):
    base = f"decisions.space={space}"
    plain = parts(base, family=family)
    for change in ("training.batch_size=4", "data.length=64", "lora.r=8", "lora.dropout=0.1"):
        for phase, row in parts(base, change, family=family).items():
            assert row["bytes"] >= plain[phase]["bytes"], (change, phase)
    rows = parts(base, "training.search=4", "training.settle=4", "decisions.source=learned", "training.open=0")
    last = ["cut", "tune", "export", "score again", "speed"]
    assert list(rows) == ["score", "saliency", "search", "refit", "settle", *last]
    if family == "llama" and space == "kv_group":  # masked phases gather slices
        assert rows["search"]["parts"]["slices"] == 4 * 2 * WHOLE
        assert rows["settle"]["parts"]["slices"] < 0.65 * 4 * 2 * WHOLE
