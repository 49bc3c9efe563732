"""Models are scored and asked where runs train: on a machine with a GPU, there."""

import pytest
import torch
from tiny_command import start
from tiny_inputs import tiny_config

from atp import run
from atp.cli.chat import Conversation
from atp.cli.scoring import Scoring, score_folder
from atp.processes import processes


class Seen(Exception):
    """The device of the model that was about to be used."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("inputs"))


def test_eval_and_chat(config, monkeypatch):
    monkeypatch.setattr(processes, "device", lambda: torch.device("meta"))

    def use(model, *rest, **options):
        raise Seen(next(model.parameters()).device.type)

    for place in ("atp.cli.scoring.evaluate_model", "atp.cli.chat.inference"):
        monkeypatch.setattr(place, use)
    options = Scoring(suite=config.data.train, labels=("yes", "no"), length=16, questions=2, precision="float32")
    with pytest.raises(Seen, match="meta"):
        score_folder(config.model.path, options)
    with pytest.raises(Seen, match="meta"):
        Conversation(config.model.path, plain=True).ask("the heart", print)


def test_every_model_that_a_run_scores_or_times_is_placed(config, tmp_path, monkeypatch):
    used, placed = [], []
    score, place, time = run.evaluate_model, run.placed, run.throughputs
    monkeypatch.setattr(run, "placed", lambda model: placed.append(model) or place(model))
    monkeypatch.setattr(run, "evaluate_model", lambda model, *a, **o: used.append(model) or score(model, *a, **o))
    monkeypatch.setattr(run, "throughputs", lambda models, **o: used.extend(models) or time(models, **o))
    start(config, tmp_path / "run")
    assert len(used) == 3 + 2 and all(a is b for a, b in zip(used, placed, strict=True))
