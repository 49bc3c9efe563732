"""Runs that take over the decisions of another one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_command import read, results, start, stopping_at

from atp.config import ATPConfig
from atp.decide.given import given_mask
from atp.ground.errors import InputError
from atp.models.load import read_config
from atp.plan.plan import make_plan
from atp.spaces.space import MaskSpace
from atp.studies.compare.arms import Arm
from atp.studies.compare.members import Members
from atp.training import pruning
from atp.training.loop import Loop

ONE_ROUND = {"evaluation": {"dense_baseline": False, "windows": 4, "questions": 2},
             "training": {"open": 3, "search": 0, "settle": 0, "tune": 2}}  # fmt: skip
pytestmark = pytest.mark.usefixtures("wide_budget")


@pytest.fixture(scope="module")
def small(config):
    values = config.model_dump(mode="json")
    return ATPConfig.parse(
        {key: value | ONE_ROUND.get(key, {}) if isinstance(value, dict) else value for key, value in values.items()}
    )


@pytest.fixture(scope="module")
def first(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "out"
    start(small, folder)
    return folder


def mask_of(folder):
    return load_file(folder / "decisions.safetensors")["mask"]


def test_another_seed_is_cut_alike_and_resumes_to_the_same_bytes(small, first, tmp_path, monkeypatch):
    other = small.model_copy(update={"seed": 7})
    own, taken = tmp_path / "own", tmp_path / "taken"
    start(other, own)
    monkeypatch.setattr(pruning, "fisher_saliency", None)  # nobody measures
    start(other, taken, decisions={"path": str(first)})
    assert not torch.equal(mask_of(own), mask_of(first)), "else nothing is shown"
    assert torch.equal(mask_of(taken), mask_of(first))
    assert read(taken, "certificate.json")["masked_vs_cut"] < 1e-4
    for step in (1, 3, 4):
        again = tmp_path / str(step)
        with stopping_at(Loop, "write", after=True, when=lambda loop, state, step=step: state.step == step):
            start(other, again, decisions={"path": str(first)})
        start(other, again, resume=True, decisions={"path": str(first)})
        assert results(again) == results(taken), step


def test_members_of_a_comparison_take_over_each_others_decisions(small, tmp_path):
    members = Members(small, tmp_path, command="")
    with members.opened(resume=False):
        for method, other in (("atp", "static"), ("static", "atp")):
            arms = [Arm(other), Arm(method, (f"decisions.path={other}-seed{{seed}}",))]
            for seed in (0, 1):
                for arm in arms:
                    members.run(arm, seed, say=lambda line: None)
                assert torch.equal(*(mask_of(members.path(arm, seed)) for arm in arms)), (method, seed)
                assert members.read(arms[1], seed).summary["keep_decoder"] == pytest.approx(0.6, abs=0.02)
    with pytest.raises(InputError, match="wanda_sp removes what its own rule says: leave out decisions.path"):
        members.run(Arm("wanda_sp", (f"decisions.path={tmp_path / 'atp-seed0'}",)), 0, say=lambda line: None)


def test_a_plan_counts_no_saliency(small, first):
    phases = [
        {row["phase"] for row in make_plan(config)["cost"]}
        for config in (
            ATPConfig.parse(small.model_dump(mode="json") | {"decisions": small.decisions.model_dump() | changes})
            for changes in ({"source": "static"}, {"path": str(first)})
        )
    ]
    assert phases[0] - phases[1] == {"saliency"} and phases[1] <= phases[0]


def test_decisions_that_do_not_fit_are_one_sentence_before_anything_is_written(small, first, tmp_path):
    space = MaskSpace.from_config(read_config(small.model.path), "kv_group")
    mask = mask_of(first)
    for name, tensors, metadata in (
        ("longer", {"mask": torch.cat([mask, mask])}, {"space": "kv_group"}), ("unnamed", {"mask": mask}, None),
        ("empty", {"other": mask}, {"space": "kv_group"}),
        ("all", {"mask": torch.ones_like(mask)}, {"space": "kv_group"}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "decisions.safetensors", metadata)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "decisions.safetensors").write_text("mask")
    for name, sentence in {
        "longer": f"{2 * len(mask)} decisions of space kv_group, but this model has {len(mask)} of space kv_group",
        "unnamed": "decisions of space None", "empty": "cannot be read", "text": "cannot be read",
        "none": "cannot be read .*: give the folder of a run that was cut",
        "all": "keeps 1.000 of the decoder, but the target is 0.600: set decisions.target_keep=1.000",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"^decisions.path: .*{sentence}") as error:
            start(small, tmp_path / "out", decisions={"path": str(tmp_path / name)})
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists(), name
    for changes, sentence in (
        ({"decisions": {"path": "x", "source": "tuned"}}, "nothing is left to decide: leave out source and rounds"),
        ({"decisions": {"path": "x", "rounds": 2}}, "nothing is left to decide"),
        ({"decisions": {"path": "x"}, "training": {"search": 2}}, "decisions.path leaves nothing to search"),
    ):
        with pytest.raises(InputError, match=sentence):
            start(small, tmp_path / "out", **changes)
    settings = small.decisions.model_copy(update={"path": str(first)})
    assert torch.equal(given_mask(settings, space), mask.bool())
