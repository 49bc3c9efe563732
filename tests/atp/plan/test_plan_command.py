"""`atp plan`: what it prints, what it refuses, and what it still says when something is missing."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_folder import edit_json
from tiny_inputs import tiny_config
from transformers import LlamaConfig

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.inputs.checks import less_memory
from atp.inputs.loading import load_data, load_tokenizer
from atp.models.load import read_config, read_tokenizer
from atp.plan import make_plan
from atp.plan.cost import Flops
from atp.plan.data import shown_sample
from atp.plan.exports import EXPORTS, reachable_exports
from atp.plan.page import duration, page, size
from atp.plan.probe import flop_rates
from atp.run import Run

CONFIGS = Path(__file__).parent / "configs"
PHASES = ["starting", "reading the data", "counting", "timing a layer"]


def changed(config, *overrides):
    return ATPConfig.parse(config.model_dump(mode="json"), list(overrides))


def public(name, *overrides):
    values = {"model": {"path": str(CONFIGS / name), "dtype": "bfloat16"}, "output_dir": "unused"}
    return ATPConfig.parse(values, list(overrides))


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config)


def printed(plan):
    console = Console(width=200, record=True, markup=False, highlight=False, file=io.StringIO())
    for part in page(plan):
        console.print(part)
    return console.export_text()


@pytest.fixture
def command(monkeypatch, atp, tmp_path):
    """Runs `atp plan` on a config in a file: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(config, *arguments):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        ended = atp("plan", "config.yaml", *arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "a plan writes nothing"
        return ended

    return run


def test_json_holds_the_whole_plan(command, config):
    code, out, err = command(config, "--json", "decisions.target_keep=0.62")
    found = json.loads(out)
    assert code == 0 and [line[9:] for line in err.splitlines()] == PHASES
    assert list(found) == [
        "model", "decisions", "parameters", "widths", "vocabulary", "memory", "free_memory", "cost", "exchange",
        "quick_probe", "flops_per_second", "data", "exports", "remarks",
    ]  # fmt: skip
    assert found["decisions"]["target_keep"] == 0.62
    after = found["parameters"]["after"]
    assert after["total"]["parameters"] == sum(n["parameters"] for part, n in after.items() if part != "total")
    assert all(n["bytes"] == 4 * n["parameters"] for n in after.values())
    assert set(found["widths"]["mlp"]) == {"kept", "of", "multiple"}
    assert all(row["bytes"] == pytest.approx(sum(row["parts"].values()), abs=8) for row in found["memory"])
    assert found["quick_probe"] and all(row["seconds"] > 0 for row in found["cost"])
    found = json.loads(command(config, "--json", "--no-probe")[1])
    assert [row["seconds"] for row in found["cost"]] == [None] * len(found["cost"])
    assert found["flops_per_second"] is None and not found["quick_probe"]
    assert {row["name"]: row["reachable"] for row in found["exports"]}["GGUF, for llama.cpp"] is True


def test_the_page_shows_every_section(command, config):
    code, out, err = command(config)
    assert (code, err) == (0, "") and [line[9:] for line in out.splitlines()[:4]] == PHASES
    for title in ("Parameters", "Widths of every layer", "Memory", "Steps, tokens and operations", "Data", "Formats"):
        assert title in out
    assert "TFLOP" in out and "⟦" in out and "by one step of a layer (--probe is closer)" in out
    assert "time" not in command(config, "--no-probe")[1].split("Data")[0].split("operations")[1]
    assert ", cut in" not in " ".join(out.split())
    smaller = ("decisions.target_keep=0.4", "decisions.rounds=2", "decisions.refit_windows=2", "training.search=0")
    assert ", cut in 2 rounds" in " ".join(command(config, *smaller)[1].split())


def test_what_is_printed_is_what_json_holds(plan):
    text = printed(plan)
    for part, count in plan["parameters"]["before"].items():
        assert f"{count['parameters']:,}" in text, part
    for row in plan["cost"]:
        assert f"{row['tokens']:,}" in text
    for row in plan["memory"]:
        assert size(row["bytes"]) in text
    for remark in plan["remarks"]:
        assert remark[:60] in text


def test_probe_times_each_part(config, monkeypatch):
    monkeypatch.setattr("atp.plan.plan.flop_rates", partial(flop_rates, seconds=0.0))  # each part once
    plan = make_plan(changed(config, "training.precision=float32"), probe=True)
    assert plan["flops_per_second"].keys() == {
        "whole", "step", "cut", "head", "fitted", "moments", "solved", "certified", "scored",
    }  # fmt: skip
    assert all(rate > 0 for rate in plan["flops_per_second"].values())
    assert all(row["seconds"] > 0 for row in plan["cost"])
    assert "time" in printed(plan)


def test_it_says_in_short_what_a_run_takes_of_this_machine(config, monkeypatch):
    monkeypatch.setattr("atp.plan.plan.free_memory", lambda device: 2_000_000_000)
    plan = make_plan(config, probe=None)
    seconds, most = sum(row["seconds"] for row in plan["cost"]), max(row["bytes"] for row in plan["memory"])
    assert (
        f"In short: about {duration(seconds)} of computation here, by one step of a layer (--probe is closer); "
        f"at most {size(most)} of memory beyond the libraries', of 2.00 GB that are free here; "
        f"{plan['data']['epochs']:.2f} epochs\n"
    ) in printed(plan)
    assert not any("free here" in remark or "takes" in remark.split(": ")[0] for remark in plan["remarks"][:-1])
    assert "In short: at most" in printed(make_plan(config))


def test_a_run_that_does_not_fit_or_takes_hours_is_told_what_to_change(config, monkeypatch):
    monkeypatch.setattr("atp.plan.plan.free_memory", lambda device: 1_000_000)
    monkeypatch.setattr("atp.plan.plan.flop_rates", lambda job, *how: Flops(*[1e4] * 9))
    found = make_plan(config, probe=None)
    most = max(found["memory"], key=lambda row: row["bytes"])
    (memory,) = (line for line in found["remarks"] if "are free here" in line)
    assert memory.startswith(f"Part {most['phase']} takes about {size(1.25 * most['bytes'])}, a quarter of it")
    assert memory.endswith(f"1 MB are free here: {less_memory(config)}.") and "gradient_checkpointing=true" in memory
    longest = max(found["cost"], key=lambda row: row["seconds"])
    (hours,) = (line for line in found["remarks"] if line.startswith("Of "))
    assert f"part {longest['phase']} takes" in hours and hours.split(": ")[1].startswith(("lower ", "set "))


def test_what_is_left_out_is_counted_by_kind(config, tmp_path):
    rows = [{"text": " ".join(str((n * 7 + place * place) % 60) for place in range(12))} for n in range(60)]
    lines = [*map(json.dumps, rows + rows[:3]), "{", '{"text": ""}', "[1]", "{"]
    lines += [json.dumps({"text": f"{row['text']} 5"}) for row in rows[:30]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    asked = (f"data.train={tmp_path / 'a.jsonl'}", "data.labels=[]", "data.on_error=skip")
    found = make_plan(changed(config, *asked))
    left_out = found["data"]["left_out"]
    assert left_out["rows"] == {"not valid JSON": 2, "no text": 1, "a list, not an object": 1}
    assert f"{left_out['near_duplicates']} near-duplicates" in found["data"]["description"]
    text = " ".join(printed(found).split())
    assert f"{left_out['near_duplicates']} near-duplicates of held-out documents" in text
    assert "4 rows (2 not valid JSON, 1 no text, 1 a list, not an object)" in text


@pytest.mark.parametrize(
    ("name", "before", "groups", "channels", "after", "share"),
    [
        ("Llama-2-7b", "6,738,415,616", ("19", "32"), ("6,656", "11,008"), "4,154,724,352", "60.11%"),
        ("Llama-3.1-8B", "8,030,261,248", ("5", "8"), ("8,512", "14,336"), "5,236,854,784", "59.98%"),
        ("Qwen3-8B", "8,190,735,360", ("5", "8"), ("7,296", "12,288"), "5,416,203,264", "60.06%"),
        ("Qwen2.5-7B", "7,615,616,512", ("2", "4"), ("11,648", "18,944"), "5,008,005,632", "60.04%"),
    ],
)
def test_a_config_alone_is_enough(name, before, groups, channels, after, share):
    """The table of docs/plan.md, from a folder with nothing but a config.json."""
    plan = make_plan(public(name))
    assert plan["data"]["problem"].startswith("the data were not read, because there is no tokenizer: ")
    assert list(plan["data"]) == ["problem"]
    assert plan["parameters"]["before"]["total"]["bytes"] == 2 * plan["parameters"]["before"]["total"]["parameters"]
    assert any("every token counts" in remark for remark in plan["remarks"])
    text = printed(plan)
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert ["kv_group", *groups, "1"] in rows and ["mlp", *channels, "64"] in rows
    (total,) = (row for row in rows if row[0] == "total" and row[1] == before)
    assert after in total and f"equal widths keep {share} of the decoder" in text and "no tokenizer" in text
    docs = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
    widths = f"{' of '.join(groups)} | {' of '.join(channels)}"
    assert f"| {name.replace('-7b', '-7B')} | {before} | {widths} | {after} |" in docs
    assert all(reach.reachable for reach in reached(public(name, "preset=stock"), name).values()), "equal widths"


def test_the_cost_of_7b_is_that_of_the_page():
    path = str(CONFIGS / "Llama-2-7b")
    example = Path(__file__).parents[3] / "examples" / "custom.yaml"
    asked = [f"model.path={path}", "model.dtype=bfloat16", "data.length=512", "training.precision=bfloat16"]
    found = [make_plan(ATPConfig.load(example, asked), device=device) for device in ("cpu", "cuda")]
    peaks = [max(sum(row["parts"].values()) for row in plan["memory"]) / 1e9 for plan in found]
    arithmetic = sum(row["flops"] for row in found[0]["cost"]) / 1e12
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert f"| {peaks[0]:.1f} GB | {peaks[1]:.1f} GB | {round(arithmetic, -1):,.0f} TFLOP |" in page


def test_under_a_launcher_the_main_process_plans_alone(command, config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert command(config) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    code, out, err = command(config)
    assert (code, err) == (0, "") and "Exchanged" not in out


def test_the_command_plans_for_processes_on_gpus_that_are_not_here(command):
    asked = ("--processes", "8", "--device", "cuda", "training.sharding=fsdp", "evaluation.dense_baseline=false")
    code, out, err = command(public("Llama-3.1-8B"), *asked)
    assert (code, err) == (0, "")
    assert "on cuda in 8 processes" in out and "Memory of each process at the peak" in out
    rows = [line.split() for line in out.split("Exchanged in a step")[1].splitlines()]
    # 41,943,040 parameters of LoRA in float32; 6.98 billion of the decoder twice, embeddings and head, in bfloat16.
    assert ["open", "168", "MB", "30.02", "GB", "26.56", "GB"] in rows
    assert command(public("Llama-3.1-8B"), "--device", "tpu")[0] == 2


def test_a_tokenizer_made_from_nothing_is_none():
    """transformers makes one of a single token from a Qwen2 config."""
    with pytest.raises(InputError, match="has no tokenizer: add the tokenizer files"):
        read_tokenizer(CONFIGS / "Qwen2.5-7B")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decisions.target_keep=0.01"], "target_keep is 0.01, but the nearest share"),
        (["training.report_to=[nowhere]"], "there is no tracker 'nowhere'"),
        (["model.path=nowhere/at/all"], "cannot load the model from 'nowhere/at/all'"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(command, config, overrides, message):
    code, out, err = command(config, "--quiet", *overrides)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "rope"),
    [
        (["decisions.target_keep=0.01"], {}),
        ([], {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "partial_rotary_factor": 0.5}),
    ],
)
def test_a_run_refuses_what_a_plan_refuses(tmp_path, overrides, rope):
    config = tiny_config(tmp_path)
    if rope:
        edit_json(tmp_path / "config.json", rope_parameters=rope)
    spoiled = changed(config, *overrides, f"output_dir={tmp_path / 'run'}", "training.batch_size=1")
    sentences = []
    for attempt in (lambda: make_plan(spoiled), lambda: Run(spoiled, resume=False, command="").execute()):
        with pytest.raises(InputError) as caught:
            attempt()
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


def test_quantized_weights_are_refused(tmp_path):
    values = json.loads((CONFIGS / "Llama-2-7b" / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match="are quantized"):
        make_plan(ATPConfig.parse({"model": {"path": str(tmp_path)}, "output_dir": "unused"}))


# Data


def test_data_of_a_run(plan, config):
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer)
    found = plan["data"]
    assert found["problem"] is None and found["description"] == data.splits.description
    assert found["windows"] == {"train": len(data.train), "calibration": len(data.calibration), "test": len(data.test)}
    assert found["samples"]["train"] == len(data.splits.train)
    # Every sample has the same words: a number, eleven words, and the answer twice; then EOS.
    assert found["lengths"] == {"median": 15, "percentile_95": 15, "max": 15}
    per_step = config.training.batch_size
    assert found["epochs"] == pytest.approx(config.training.total * per_step / len(data.train))
    assert found["steps_per_epoch"] == len(data.train) / per_step
    scored = sum(int((row["labels"][1:] != -100).sum()) for row in data.train)
    assert found["scored_share"] == pytest.approx(scored / (16 * len(data.train)))
    assert found["longer_than_a_window"] == 0


def test_padded_samples_count_their_own_tokens(config):
    padded = changed(config, "data.packing=padded")
    plan = make_plan(padded)
    assert plan["data"]["tokens_per_window"] == 15
    tune = next(row for row in plan["cost"] if row["phase"] == "tune")
    assert tune["tokens"] == 15 * 2 * tune["steps"]
    data = load_data(padded, load_tokenizer(padded.model))
    assert max(data.train.lengths) == plan["data"]["lengths"]["max"]


def test_the_sample_shows_where_the_loss_is(plan):
    pieces = plan["data"]["sample"]
    assert {piece["loss"] for piece in pieces} == {True, False}
    scored = " ".join(piece["text"] for piece in pieces if piece["loss"])
    assert "heart" not in scored and ("yes" in scored or "no" in scored)
    assert "heart" in " ".join(piece["text"] for piece in pieces if not piece["loss"])


def test_a_long_sample_starts_a_little_before_its_loss():
    ids = list(range(500))
    labels = [-100] * 300 + ids[300:]
    pieces = shown_sample(ids, labels, lambda part: " ".join(map(str, part)))
    assert [piece["loss"] for piece in pieces] == [False, True]
    assert pieces[0]["text"].split()[0] == "252" and pieces[1]["text"].split()[0] == "300"
    assert sum(len(piece["text"].split()) for piece in pieces) == 96
    assert shown_sample([5, 6], [5, 6], str)[0] == {"text": "[5]", "loss": False}, "nothing predicts the first token"
    assert [piece["loss"] for piece in shown_sample([5, 6], [-100, -100], str)] == [False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.recipe=nothing"], "'nothing' is unknown"),
        (["data.labels=[yes, no, perhaps, surely]"], "labels 'perhaps' and 'surely' become the same tokens"),
        (["training.batch_size=4000"], "the training split has"),
    ],
)
def test_trouble_with_the_data_is_the_sentence_of_a_run_after_the_rest(command, config, tmp_path, overrides, message):
    code, out, err = command(config, "--json", "--quiet", *overrides)
    found = json.loads(out)
    assert code == 2 and err == f"error: {found['data']['problem']}\n"
    assert message in found["data"]["problem"] and "\n" not in found["data"]["problem"]
    assert found["memory"] and found["cost"] and found["exports"]
    code, out, err = command(config, "--quiet", *overrides)
    assert code == 2 and "Formats that can hold the result" in out and message not in out and message in err
    with pytest.raises(InputError) as refused:
        Run(changed(config, f"output_dir={tmp_path / 'run'}", *overrides), resume=False, command="").execute()
    assert str(refused.value) == found["data"]["problem"]


def test_what_falls_short_is_said_and_not_counted(config):
    many = make_plan(changed(config, "decisions.refit_windows=4000", "evaluation.windows=3000"))
    tokens = {row["phase"]: row["tokens"] for row in many["cost"]}
    windows, asked = many["data"]["windows"], many["data"]["questions"]["tokens"]
    assert asked > 0
    assert (tokens["refit"], tokens["score"]) == (16 * windows["calibration"], 16 * windows["test"] + asked)
    assert any("decisions.refit_windows is 4000" in sentence for sentence in many["data"]["shortfalls"])
    assert "decisions.refit_windows is 4000" in printed(many)
    assert f"{many['data']['questions']['sequences']:,}, {asked:,} tokens, longest" in printed(many)


# Exports


def reached(config, name="Llama-2-7b"):
    return {reach.name: reach for reach in reachable_exports(config, read_config(CONFIGS / name))}


def test_exports_by_settings():
    package, alone, gguf, int8, nf4 = (export.name for export in EXPORTS)
    default = reached(public("Llama-2-7b"))
    assert [reach.reachable for reach in default.values()] == [True, False, True, True, True]
    assert "set preset: stock" in default[alone].why_not
    assert all(reach.reachable == (reach.why_not is None) for reach in default.values())
    dims = reached(public("Llama-2-7b", "decisions.space=head_dim"))
    assert [dims[name].reachable for name in (package, alone, gguf, int8, nf4)] == [True, False, False, True, True]
    assert "set decisions.space=kv_group" in dims[gguf].why_not
    qwen3 = reached(public("Qwen3-8B"), "Qwen3-8B")[gguf]
    assert not qwen3.reachable and "norms of queries and keys" in qwen3.why_not
    assert reached(public("Llama-2-7b", "decisions.blocks=true"))[gguf].reachable
    gone = reached(public("Qwen3-8B", "decisions.blocks=true"), "Qwen3-8B")[gguf]
    assert not gone.reachable and "qwen3 lacks layers without attention or MLP" in gone.why_not
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6, "head_dim": 16}
    small = {reach.name: reach for reach in reachable_exports(public("Llama-2-7b"), LlamaConfig(**sizes))}
    assert small[int8].reachable and "no matrix of the decoder has a multiple of 64 inputs" in small[nf4].why_not


@pytest.mark.parametrize(
    ("say", "value", "text"),
    [
        (size, 12, "12 B"), (size, 4_300, "4 kB"), (size, 538_060_032, "538 MB"), (size, 16_060_522_496, "16.06 GB"),
        (duration, 1.23, "1.2 s"), (duration, 300, "5 min"), (duration, 10_800, "3.0 h"),
    ],
)  # fmt: skip
def test_sizes_and_durations(say, value, text):
    assert say(value) == text
