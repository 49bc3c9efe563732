"""The end of a run: how fast the original and the final model are."""

import json

import pytest
import torch
from tiny_command import read, start

from atp import run
from atp.ground.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture
def timed(monkeypatch):
    """The number of models that were timed together, call by call; two at once do not fit, other errors as given."""
    calls, time = [], run.throughputs

    def install(error):
        def throughputs(models, **options):
            calls.append(len(models))
            if len(models) == 2:
                raise error
            return time(models, **options)

        monkeypatch.setattr(run, "throughputs", throughputs)
        return calls

    return install


def test_two_models_that_do_not_fit_are_timed_one_after_the_other(config, tmp_path, timed):
    calls, said = timed(torch.OutOfMemoryError("CUDA out of memory")), []
    summary = start(config, tmp_path / "out", say=said.append)
    assert calls == [2, 1, 1] and any("one after the other" in line for line in said)
    scores = read(tmp_path / "out", "evaluation.json")
    speeds = {name: found["speed"] for name, found in scores.items() if "speed" in found}
    assert summary["speed"] == speeds and list(speeds) == ["original", "final"]
    for speed in speeds.values():
        for rate in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            low, high = speed[f"{rate}_interval"]
            assert 0 < low <= speed[rate] <= high


def test_another_error_is_not_taken_for_want_of_memory(config, tmp_path, timed):
    calls = timed(InputError("the base is gone"))
    with pytest.raises(InputError, match="the base is gone"):
        start(config, tmp_path / "out")
    assert calls == [2]


def test_a_finished_run_is_timed_again_only_where_a_speed_is_no_table(config, tmp_path):
    folder = tmp_path / "out"
    before = start(config, folder)["speed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "throughputs", lambda models, **_: pytest.fail("timed again"))
        (folder / "summary.json").unlink()
        assert start(config, folder, resume=True)["speed"] == before
    for name in ("original", "final"):
        (folder / "summary.json").unlink()
        scores = read(folder, "evaluation.json")
        damaged = scores | {name: scores[name] | {"speed": 3}}
        (folder / "evaluation.json").write_text(json.dumps(damaged), encoding="utf-8")
        assert start(config, folder, resume=True)["speed"][name]["decode_tokens_per_second"] > 0
