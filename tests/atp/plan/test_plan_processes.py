"""A plan for several processes: what each holds, computes and sends, by hand and against the tensors of real models."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_plans import LENGTH, RANK, VOCAB, job, lora_model

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.plan import make_plan
from atp.plan.cost import cost_of
from atp.plan.exchange import exchange_of
from atp.plan.memory import memory_of
from benchmarks import model_processes

QUIET = ("evaluation.dense_baseline=false",)
SHARDED = (*QUIET, "training.sharding=fsdp")


def parts(*overrides, **options):
    return {row["phase"]: row["parts"] for row in memory_of(job(*overrides, **options))}


def public(*overrides):
    path = str(Path(__file__).parent / "configs" / "Llama-3.1-8B")
    values = {"model": {"path": path, "dtype": "bfloat16"}, "output_dir": "unused"}
    return ATPConfig.parse(values, [*QUIET, *overrides])


def test_each_process_holds_its_share_of_the_weights_and_a_whole_adapter():
    one, whole, shared = (
        parts(*overrides, count=count)["open"] for overrides, count in ((QUIET, 1), (QUIET, 4), (SHARDED, 4))
    )
    assert whole == one | {"exchanged": one["gradients"]}, "gradients are copied into one piece"
    assert shared["weights"] == math.ceil(one["weights"] / 4) and shared["adapter"] == one["adapter"]
    largest = max(2 * 96 * 96 + 2 * 32 * 96 + 3 * 256 * 96, VOCAB * 96)
    assert shared["gathered"] == 4 * largest * (2 + 1 / 4)
    assert parts(*SHARDED, count=1) == parts(*QUIET, count=1), "one process shares with nobody"


def test_in_shards_a_cut_gathers_one_weight_and_a_pass_the_largest_layer():
    # Two processes of wide layers: while weights are cut, one at a time is whole.
    wide = make_plan(public("training.sharding=fsdp", "training.steps=9"), count=2, device="cpu")["memory"]
    found = {row["phase"]: row["parts"] for row in wide}
    assert found["cut"]["gathered"] == 2 * 2 * 14336 * 4096 and "cut weights" in found["cut"]
    assert found["tune"]["gathered"] == found["speed"]["gathered"] == 2.5 * 2 * 128256 * 4096
    assert "checkpoint" not in found["tune"]
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    assert found["refit"]["gathered"] == 2 * layer, "while a linear is fitted its layer lies in one piece"


def test_processes_share_calibration_windows_but_not_steps():
    options = ("training.open=2", "decisions.refit_windows=9", "decisions.saliency_windows=8", *QUIET)
    one, four = ({row.phase: row for row in cost_of(job(*options, count=count))} for count in (1, 4))
    assert four["open"] == one["open"] and four["saliency"].tokens == 2 * LENGTH == one["saliency"].tokens / 4
    assert four["refit"].tokens == 3 * LENGTH
    assert parts(*options, count=4)["refit"]["windows"] * 3 == parts(*options, count=1)["refit"]["windows"]


@pytest.mark.parametrize("tied", [False, True])
def test_exchanged_are_gradients_of_the_adapter_and_in_shards_every_weight_that_a_pass_reads(tied):
    options = ("training.gradient_accumulation=3", "training.open=1", "training.search=0", *SHARDED)
    plan = job(*options, count=4, tie_word_embeddings=tied)
    parameters = dict(lora_model(plan.shapes).named_parameters())
    adapter = sum(p.nbytes for name, p in parameters.items() if ".lora_" in name)
    layers = sum(p.nbytes for name, p in parameters.items() if ".layers." in name and ".lora_" not in name)
    ends = 2 * VOCAB * 96 * 4 + 96 * 4 * 2  # embeddings and head, tied or not; the last norm, as a layer's
    found = {row["phase"]: row for row in exchange_of(plan)}
    assert found["open"] == {
        "phase": "open", "reduced": adapter, "gathered": 3 * (2 * layers + ends),
        "sent": round(0.75 * (2 * adapter + 3 * (2 * layers + ends))),
    }  # fmt: skip
    assert found["tune"]["gathered"] < found["open"]["gathered"]
    assert {row["gathered"] for row in exchange_of(job(*QUIET, count=4))} == {0}
    assert exchange_of(job(*SHARDED, count=1)) == []


def test_learned_decisions_gather_for_a_batch_of_their_own():
    options = ("decisions.source=learned", "training.search=2", "training.gradient_accumulation=1", *SHARDED)
    plan = job(*options, count=2)
    found = {row["phase"]: row for row in exchange_of(plan)}
    assert found["decision"]["gathered"] == found["search"]["gathered"]
    assert found["decision"]["reduced"] == 4 * plan.shapes.space.size
    assert found["search"]["reduced"] == 4 * 2 * RANK * (2 * (96 + 96) + 2 * (32 + 96) + 3 * (256 + 96))


def test_what_is_trained_besides_lora_is_reduced_too():
    asked = "training.embeddings=true", "training.after_cut=full", *QUIET
    plan, alone = job(*asked, count=2), job(*QUIET, count=2)
    found, others = ({row["phase"]: row["reduced"] for row in exchange_of(each)} for each in (plan, alone))
    assert found["open"] == others["open"] + 4 * 64 * 96 and found["tune"] == 4 * plan.after["total"]


def test_a_plan_of_many_processes_on_gpus_needs_neither():
    one, many = make_plan(public(), device="cuda"), make_plan(public("training.sharding=fsdp"), count=8, device="cuda")
    assert one["model"] | {"processes": 8} == many["model"] and one["model"]["device"] == "cuda"
    assert one["exchange"] == [] and {row["phase"] for row in many["exchange"]} == {"open", "tune"}
    largest = {name: max(row["bytes"] for row in plan["memory"]) for name, plan in (("one", one), ("many", many))}
    assert largest["many"] < largest["one"]
    assert not any("process" in row["parts"] for row in many["memory"])


def test_what_is_here_is_planned_for_whatever_it_is(monkeypatch):
    monkeypatch.setattr("atp.plan.plan.processes.device", lambda: torch.device("mps"))
    assert make_plan(public("training.precision=float32"))["model"]["device"] == "mps"


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ((), {"device": "tpu"}, "--device 'tpu' is not planned for: use one of cpu, cuda"),
        ((), {"device": "cuda", "probe": True}, "--probe times this machine, which trains on cpu"),
        (("training.sharding=fsdp", "evaluation.dense_baseline=true"), {"count": 2}, "does not shard"),
        (("model.load_in=8bit",), {"count": 2}, "trains in one process, not in 2"),
    ],
)
def test_what_several_processes_refuse_a_plan_of_them_refuses(overrides, options, message):
    with pytest.raises(InputError, match=message):
        make_plan(public(*overrides), **options)


def test_sharding_in_one_process_is_remarked_on():
    said = "shares weights among processes, and one process holds them whole"
    assert any(said in remark for remark in make_plan(public("training.sharding=fsdp"))["remarks"])
    assert not any(said in remark for remark in make_plan(public("training.sharding=fsdp"), count=2)["remarks"])


def test_the_table_of_estimates_is_that_of_the_command(capsys):
    assert model_processes.main([]) == 0
    page = (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")
    for line in capsys.readouterr().out.splitlines()[2:]:
        assert line in page


def test_a_model_in_a_file_is_estimated_as_by_its_name(tmp_path, capsys):
    lines = []
    (tmp_path / "config.json").write_text(json.dumps(model_processes.config_of("tiny").to_dict(), default=str))
    for model in ("tiny", str(tmp_path)):
        assert model_processes.main(["--model", model, "--processes", "2", "--tokens", "64", "--checkpointing"]) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1].split("|")[2:])
    assert lines[0] == lines[1]
    assert model_processes.main(["--model", "nonsense"]) == 2 and "unknown model" in capsys.readouterr().err
    assert model_processes.main(["--tokens", "100", "--length", "64"]) == 2
