"""A whole run that removes blocks: stopped and resumed, reported, exported, and pruned again."""

import pytest
import torch
from tiny_command import read, results, start, stopping_at
from transformers import AutoModelForCausalLM

from atp.config import ATPConfig
from atp.export.gguf import architecture_of
from atp.models.load import read_config
from atp.plan import make_plan
from atp.report import write_report
from atp.spaces.space import MaskSpace
from atp.training.loop import Loop

pytestmark = pytest.mark.usefixtures("wide_budget")
DECISIONS = {"blocks": True, "target_keep": 0.1, "source": "running", "rounds": 2, "multiples": {"mlp": 4}}


@pytest.fixture(scope="module")
def asked(config):
    values = config.model_dump(mode="json")
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    values["decisions"] |= DECISIONS
    values["training"] |= {"open": 3, "search": 0, "settle": 0, "tune": 3}
    values["lora"] |= {"dropout": 0.0}
    return ATPConfig.parse(values)


@pytest.fixture(scope="module")
def ended(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, start(asked, folder)


def test_nine_tenths_go_and_the_result_says_so(ended):
    folder, summary = ended
    assert abs(summary["keep_decoder"] - 0.1) <= 0.02
    certificate = read(folder, "certificate.json")
    assert certificate["removed_lora_norm"] == 0 and certificate["masked_vs_cut"] < 1e-4
    assert certificate["cut_vs_reloaded"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert summary["params_after"] == sum(p.numel() for p in model.parameters()) < summary["params_before"]
    gone = model.config.gone()
    assert gone, "some block is worth least"
    layers = read(folder, "decisions.json")["layers"]
    for structure, block in (("kv_group", "attention"), ("mlp", "mlp")):
        assert [i for i, kept in enumerate(layers) if not kept[structure]] == gone.get(block, [])
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count("<svg") >= 2 and "is left out" not in page
    assert "* Without " in (folder / "model" / "README.md").read_text()


def test_a_stop_before_the_cut_and_one_behind_it_resume_to_the_same_bytes(asked, ended, tmp_path):
    for step in (2, 3, 5):
        folder = tmp_path / str(step)
        with stopping_at(Loop, "write", after=True, when=lambda loop, state, step=step: state.step == step):
            start(asked, folder)
        start(asked, folder, resume=True)
        assert results(folder) == results(ended[0]), step


def test_the_result_is_exported_and_pruned_again(atp, asked, ended, tmp_path):
    assert architecture_of(read_config(ended[0] / "model"), "the result").name == "deci"
    code, _, err = atp("export", ended[0], "--to", "int8", "--out", tmp_path / "int8")
    assert code == 0, err
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert small.config.gone() == read_config(ended[0] / "model").gone()
    again = ATPConfig.parse(asked.model_dump(mode="json"), [f"model.path={ended[0] / 'model'}"])
    first = AutoModelForCausalLM.from_pretrained(ended[0] / "model")
    options = {"target_keep": 0.88, "blocks": False, "multiples": {}}
    plan = make_plan(again.model_copy(update={"decisions": again.decisions.model_copy(update=options)}))
    assert plan["parameters"]["before"]["total"]["parameters"] == sum(p.numel() for p in first.parameters())
    summary = start(again, tmp_path / "again", decisions=options)
    assert summary["params_before"] == sum(p.numel() for p in first.parameters()) > summary["params_after"]
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    assert second.config.gone() == first.config.gone(), "without the setting no further block goes"
    space = MaskSpace.from_config(second.config, "kv_group")
    assert len(space.emptied(torch.ones(space.size, dtype=torch.bool))) == sum(map(len, first.config.gone().values()))
