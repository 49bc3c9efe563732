"""The settings of an arm: its overrides on top of the common config, and those of a preset below them."""

import pytest

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.studies.compare.arms import Arm
from atp.studies.compare.members import Members

BASE = {
    "model": {"path": "tiny"},
    "output_dir": "runs/tiny",
    "data": {"length": 64, "seed": 0},
    "training": {"precision": "float32"},
    "evaluation": {"dense_baseline": False},
}


def members(folder, **settings):
    return Members(ATPConfig.parse(BASE | settings), folder, command="a test")


@pytest.mark.parametrize("preset", ["auto", "quick", "standard", "thorough", "stock", "paper"])
def test_a_preset_of_an_arm_is_that_of_a_run(tmp_path, preset):
    found = members(tmp_path).config_of(Arm("atp", (f"preset={preset}",)), 3)
    assert found == ATPConfig.parse(BASE, [f"preset={preset}", "seed=3", f"output_dir={found.output_dir}"])


@pytest.mark.parametrize("overrides", [("lora.r=4", "preset=paper"), ("preset=paper", "lora.r=4")])
def test_its_other_settings_stand_above_it(tmp_path, overrides):
    found = members(tmp_path).config_of(Arm("atp", overrides), 0)
    assert (found.lora.r, found.lora.alpha, found.decisions.space) == (4, 8, "head_dim")


def test_arms_with_other_settings_have_other_folders(tmp_path):
    ours = members(tmp_path)
    names = {
        overrides: ours.path(Arm("atp", overrides), 0).name
        for overrides in [(), ("lora.r=16",), ("preset=paper",), ("preset=paper", "lora.r=16")]
    }
    assert names[("lora.r=16",)] == names[()] == "atp-seed0", "16 is the common config's"
    assert names[("preset=paper",)] == "atp,preset=paper-seed0"
    assert names[("preset=paper", "lora.r=16")] == "atp,preset=paper,lora.r=16-seed0", "and not the preset's"
    assert ours.path(Arm("atp", ("preset=auto",)), 0).name == "atp-seed0"
    assert ours.path(Arm("atp", ("training.lr=1e-4",)), 1).name == "atp,training.lr=1e-4-seed1"
    assert ours.config_of(Arm("atp", ("training.lr=1e-4",)), 7).training.lr == 1e-4
    with pytest.raises(InputError, match="config key 'seed' is 4294967296: numbers reach 4294967295"):
        ours.config_of(Arm("atp"), 2**32)


def test_settings_that_need_each_other_name_a_folder_in_any_order(tmp_path):
    needing = ("training.keep_best=true", "evaluation.every=5", "training.patience=3", "lora.r=16")
    ours = members(tmp_path, lora={"r": 16})
    assert ours.config_of(Arm("atp", needing), 0).training.keep_best
    assert ours.path(Arm("atp", needing), 0).name == f"atp,{','.join(needing[:3])}-seed0"
    with pytest.raises(InputError, match="set evaluation.every"):
        ours.path(Arm("atp", needing[:1]), 0)


def test_a_preset_on_top_of_another_is_refused(tmp_path):
    with pytest.raises(InputError, match="an arm sets preset=paper, but the common config has the preset stock"):
        members(tmp_path, preset="stock").config_of(Arm("atp", ("preset=paper",)), 0)
    with pytest.raises(InputError, match="config key 'preset' is 'papr'"):
        members(tmp_path).config_of(Arm("atp", ("preset=papr",)), 0)
