"""Targets in milliseconds, parameters and megabytes: what they come to on real models, and their place in a run."""

import pytest
import torch
from tiny_command import read, results, start
from tiny_folder import save
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.evaluation.inference import cache_name
from atp.ground.errors import InputError
from atp.inputs.targets import in_shares, share_of, share_of_total
from atp.plan import latency, make_plan
from atp.plan.latency import PROMPT, LatencyTable, measured_target, share_of_widths
from atp.plan.page import page
from atp.plan.shapes import mask_of
from atp.removal import cut_config
from atp.spaces.space import MaskSpace

SHAPES = AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, head_dim=16, max_position_embeddings=512,
)  # fmt: skip
TABLE = LatencyTable(((0.5, 2.0), (1.0, 4.0)), ((0.25, 1.0), (1.0, 7.0)), norms=0.5, outside=3.0, layers=2)


def config_of(folder, **decisions):
    values = {"model": {"path": str(folder)}, "output_dir": str(folder / "o"), "vocabulary": {"keep": None}}
    return ATPConfig.parse(values | {"decisions": decisions})


@pytest.fixture
def table(monkeypatch):
    """The table stands for a measurement; the list says what was to be timed."""
    asked = []
    monkeypatch.setattr(latency, "measure", lambda *given, decode: (asked.append(decode), TABLE)[1])
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("latency") / "model")


def cut(kept, space):
    found = MaskSpace.from_config(SHAPES, space)
    counts = {name: [round(kept * s.size) for s in layers] for name, layers in found.by_name().items()}
    mask = mask_of(found, counts)
    return AutoModelForCausalLM.from_config(cut_config(SHAPES, found, mask)).eval(), Budget(found).share(mask)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("space", ["kv_group", "head_dim"])
def test_the_table_adds_up_to_the_passes_of_whole_cut_models(monkeypatch, space, decode):
    """With a clock that counts operations, a second each, the sum of parts is the count of the whole model's pass."""
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(latency, "now", lambda device: counter.get_total_flops())
        found = latency.measure(SHAPES, space, torch.float32, decode=decode)
    assert found.norms == 0 and found.outside > 0 and found.layers == 3
    for kept in (0.25, 0.5, 1.0):
        model, share = cut(kept, space)
        prompt = torch.zeros(1, PROMPT, dtype=torch.long)
        with torch.no_grad():
            cached = cache_name(model)
            cache = getattr(model(prompt, use_cache=True), cached)
            passes = []
            for _ in range(1 + latency._DECODES if decode else 1):
                with FlopCounterMode(display=False) as counted:
                    if decode:
                        model(prompt[:, :1], use_cache=True, logits_to_keep=1, **{cached: cache})
                    else:
                        model(prompt, use_cache=True, logits_to_keep=1)
                passes.append(counted.get_total_flops())
        # Each new token reads one more: the median is of those after the first.
        passes = sorted(passes[1:] if decode else passes)
        middle = (passes[(len(passes) - 1) // 2] + passes[len(passes) // 2]) / 2
        assert found.ms(kept) == pytest.approx(1000 * middle)
        assert share_of_widths(kept, MaskSpace.from_config(SHAPES, space)) == pytest.approx(share)


def test_the_share_is_the_largest_whose_time_meets_the_target(folder, table):
    assert TABLE.ms(1.0) == 2 * (4 + 7 + 0.5) + 3 and TABLE.ms(0.5) == 2 * (2 + 3 + 0.5) + 3
    assert TABLE.kept(14.0) == pytest.approx(0.5) and TABLE.kept(20.0) == pytest.approx(0.75)
    space = MaskSpace.from_config(AutoConfig.from_pretrained(folder), "kv_group")
    for key, decode in (("target_prefill_ms", False), ("target_decode_ms", True)):
        found = measured_target(config_of(folder, **{key: 14}))
        assert table.pop() == decode
        assert found["target_keep"] == pytest.approx(share_of_widths(0.5, space)) and found["target"] == {key: 14}
        what = "a new token" if decode else "a prompt of 256 tokens"
        assert found["description"].startswith(f"{what} takes 26 ms on this device before the cut, and 14 ms with ")
    plain = config_of(folder, target_keep=0.7)
    assert measured_target(plain) is None and not table
    assert latency._rising({0.5: [3.0, 5.0], 1.0: [3.5], 0.25: [1.0]}) == ((0.25, 1.0), (0.5, 4.0), (1.0, 4.0))


def test_times_out_of_reach_are_refused(folder, table):
    with pytest.raises(InputError, match=r"target_prefill_ms is 26, but the whole model takes 26 ms .* nothing needs"):
        measured_target(config_of(folder, target_prefill_ms=26))
    with pytest.raises(InputError, match=r"target_decode_ms is 5, but .* an eighth of every width takes 10 ms for"):
        measured_target(config_of(folder, target_decode_ms=5))
    for value in (0, -3, "soon"):
        with pytest.raises(InputError, match="config key 'decisions.target_decode_ms' is"):
            config_of(folder, target_decode_ms=value)
    for other in ({"target_decode_ms": 5}, {"target_keep": 0.5}, {"target_megabytes": 5}):
        with pytest.raises(InputError, match="one target in different units"):
            config_of(folder, target_prefill_ms=5, **other)
    with pytest.raises(InputError, match="target_prefill_ms is measured .*, `atp sweep` and `atp plan` only"):
        share_of(config_of(folder, target_prefill_ms=5))


def test_a_run_keeps_its_share_when_it_resumes(config, tmp_path, table, monkeypatch):
    said, asked, out = [], {"target_keep": 0.6, "target_prefill_ms": 18}, tmp_path / "out"
    values = {"decisions": asked, "evaluation": {"dense_baseline": False, "windows": 4, "questions": 2}}
    start(config, out, say=said.append, **values)
    summary = read(out, "summary.json")
    assert summary["latency"] == read(out, "latency.json") and summary["latency"]["description"] in said
    assert summary["latency"]["table"]["outside"] == 3.0
    share = summary["latency"]["target_keep"]
    assert summary["target_keep"] == share and summary["keep_decoder"] == pytest.approx(share, abs=0.02)
    assert f"target_keep: {share}" in (out / "resolved.yaml").read_text(encoding="utf-8")
    before = results(out)
    (out / "summary.json").unlink()
    monkeypatch.setattr(latency, "measure", lambda *given, **options: pytest.fail("it was measured before"))
    start(config, out, resume=True, **values)
    assert results(out) == before and read(out, "summary.json")["latency"] == summary["latency"]


def test_the_plan_says_what_a_time_comes_to(config, table):
    found = make_plan(type(config).parse(config.model_dump(mode="json"), ["decisions.target_prefill_ms=18"]))
    assert found["decisions"]["latency"]["target_keep"] == found["decisions"]["target_keep"]
    assert found["decisions"]["latency"]["description"] in list(page(found))


def test_a_model_whose_layers_differ_is_refused(tmp_path):
    space = MaskSpace.from_config(SHAPES, "kv_group")
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[space.layer(0)[0].start] = False
    cut_config(SHAPES, space, mask).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="those of this model differ in width: use target_keep"):
        measured_target(config_of(tmp_path, target_decode_ms=5.0))


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_the_model(tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(save(tmp_path / "model", tie_word_embeddings=tied))
    total = sum(p.numel() for p in model.parameters())
    decoder = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    share, (least, most) = share_of_total(total - 0.25 * decoder, model.config, "kv_group")
    assert (least, most) == (total - decoder, total) and share == pytest.approx(0.75)


def test_parameters_and_megabytes_are_one_target(folder):
    _, (least, most) = share_of_total(1, AutoModelForCausalLM.from_pretrained(folder).config, "kv_group")
    wanted = round(least + 0.6 * (most - least))
    by_count = in_shares(config_of(folder, target_params=wanted)).decisions
    assert by_count.target_keep == pytest.approx(0.6, abs=1e-3) and by_count.target_params is None
    by_size = in_shares(config_of(folder, target_megabytes=4 * wanted / 1e6)).decisions
    assert by_size.target_keep == pytest.approx(by_count.target_keep) and by_size.target_megabytes is None
    narrow = config_of(folder, target_megabytes=2 * wanted / 1e6)
    narrow.model.dtype = "bfloat16"
    assert share_of(narrow) == pytest.approx(by_count.target_keep)
    plain = config_of(folder, target_keep=0.3)
    assert share_of(plain) == 0.3


def test_a_run_meets_a_target_in_parameters(config, tmp_path):
    total, decoder = 0, 0
    for name, p in AutoModelForCausalLM.from_pretrained(config.model.path).named_parameters():
        total, decoder = total + p.numel(), decoder + p.numel() * (".layers." in name)
    wanted = round(total - 0.4 * decoder)
    start(config, tmp_path / "out", decisions={"target_params": wanted})
    summary = read(tmp_path / "out", "summary.json")
    assert abs(summary["params_after"] - wanted) <= 0.02 * decoder
    assert summary["target_keep"] == pytest.approx(0.6, abs=1e-3)


def test_targets_out_of_reach_and_two_targets_are_refused(folder):
    for key, value in (("target_params", 10), ("target_params", 10**9), ("target_megabytes", 1e-5)):
        with pytest.raises(InputError, match=rf"decisions.{key} is .* are not in the decoder.*choose a number between"):
            share_of(config_of(folder, **{key: value}))
    with pytest.raises(InputError, match="one target in different units"):
        config_of(folder, target_params=5, target_keep=0.5)
    with pytest.raises(InputError, match="one target in different units"):
        config_of(folder, target_params=5, target_megabytes=5)
