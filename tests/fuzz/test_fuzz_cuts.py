"""A slice of the random cuts, and that the harness notices what it is there for."""

import fuzz_cuts
import pytest

from atp.ground.errors import InputError

SEED = 1


def outcome(number, folder):
    folder.mkdir()
    return fuzz_cuts.run_case(SEED, number, folder)


def test_a_cut_model_is_the_masked_one_or_refused(tmp_path):
    kinds = {outcome(number, tmp_path / str(number)).partition(":")[0] for number in range(12)}
    assert "cut" in kinds and kinds <= {"cut", "cut twice", "refused", "no model"}


def doubled(model, kept):
    model.model.norm.weight.data.mul_(2)
    return model


def read(error):
    def refuse(*_):
        raise error

    return refuse


@pytest.mark.parametrize(
    ("instead", "raised"),
    [
        ({"zeroed": doubled}, AssertionError),
        ({"read_model": read(KeyError("x"))}, KeyError),
        ({"read_model": read(InputError("x"))}, AssertionError),
        ({"architecture_of": read(TypeError("x"))}, TypeError),
    ],
)
def test_the_harness_notices(instead, raised, tmp_path, monkeypatch):
    cuts = (number for number in range(20) if outcome(number, tmp_path / str(number)).startswith("cut"))
    number = next(cuts)
    for name, function in instead.items():
        monkeypatch.setattr(fuzz_cuts, name, function)
    with pytest.raises(raised):
        outcome(number, tmp_path / "broken")
