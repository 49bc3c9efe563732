"""Targets in parameters and megabytes come to the share that meets them."""

import pytest
from tiny_command import read, start
from tiny_folder import save
from transformers import AutoModelForCausalLM

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.inputs.targets import in_shares, share_of, share_of_total


def config_of(folder, **decisions):
    return ATPConfig.parse({"model": {"path": str(folder)}, "output_dir": "o", "decisions": decisions})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("targets") / "model")


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
