"""What callbacks and trackers hear of a run."""

import pytest
from accelerate import tracking
from tiny_callbacks import StopAt
from tiny_run import CUT, SEARCH, TOTAL, TUNE, make, records

from atp.ground.errors import InputError, Interrupted
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import Callback, check_trackers


class Diary(Callback):
    def __init__(self):
        self.heard = []

    def on_phase(self, loop):
        self.heard.append((loop.phase, loop.step, loop.model.config.model_type))

    def on_step(self, loop, record):
        self.heard.append((loop.step, record))

    def on_checkpoint(self, loop, folder):
        assert checkpoints.load(folder).step == loop.step
        self.heard.append(folder.name)

    def on_end(self, loop):
        self.heard.append("end")


def test_callbacks_hear_phases_steps_checkpoints_and_the_end_in_order(tmp_path):
    diary = Diary()
    make(tmp_path, callbacks=[diary], training={"save_every": 4, "log_every": 2}).train()
    logged = {record["step"]: record for record in records(tmp_path)}
    assert list(logged) == list(range(2, TOTAL + 1, 2))
    expected = []
    for step in range(TOTAL + 1):
        if step:
            expected.append((step, logged.get(step)))
        if step in (4, CUT, 8, TOTAL):
            expected.append(f"checkpoint-{step:08d}")
        if step in (0, SEARCH, CUT):
            phase = {0: "search", SEARCH: "settle", CUT: "tune"}[step]
            expected.append((phase, step, "atp_llama" if phase == "tune" else "llama"))
    assert diary.heard == [*expected, "end"]


def test_the_end_is_heard_of_an_interrupted_run_and_a_resumed_one_names_its_phase(tmp_path):
    first, second = Diary(), Diary()
    with pytest.raises(Interrupted):
        make(tmp_path, callbacks=[first, StopAt(CUT + 1)], training={"save_every": 100}).train()
    assert first.heard[-2:] == [f"checkpoint-{CUT + 1:08d}", "end"]
    make(tmp_path, callbacks=[second], training={"save_every": 100}).train(resume=True)
    assert second.heard[0] == ("tune", CUT + 1, "atp_llama") and len(second.heard) == 1 + TUNE - 1 + 2


class Noting(tracking.GeneralTracker):
    """A tracker of the user's own."""

    name, requires_logging_directory = "noting", False
    seen: list = []

    @property
    def tracker(self):
        return self

    def start(self):
        self.seen.append(("start",))

    def store_init_configuration(self, values):
        self.seen.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.seen.append(("log", step, values))

    def finish(self):
        self.seen.append(("finish",))

    def __init__(self, project, **kwargs):
        super().__init__()


def test_a_tracker_gets_settings_once_and_the_numbers_of_every_record(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noting", Noting)
    monkeypatch.setattr(Noting, "seen", [])
    check_trackers(["noting"])
    make(tmp_path, training={"report_to": ["noting"]}).train()
    kinds = [event[0] for event in Noting.seen]
    assert kinds == ["start", "config", *["log"] * TOTAL, "finish"]
    settings = Noting.seen[1][1]
    assert settings["training.lr"] == 1e-2 and settings["decisions.target_keep"] == 0.6
    assert all(type(value) in (int, float, str, bool) for value in settings.values())
    for (_, step, values), record in zip(Noting.seen[2:-1], records(tmp_path), strict=True):
        assert step == record["step"] and values["loss"] == record["loss"]
        assert values == {name: value for name, value in record.items() if isinstance(value, int | float)}


@pytest.mark.parametrize("names", [["nope"], ["none", "nope"], ["tensorboards"]])
def test_an_unknown_tracker_is_refused_with_the_known_ones(names):
    with pytest.raises(InputError, match=r"there is no tracker 'n?o?\w+': use some of .*tensorboard.*wandb"):
        check_trackers(names)


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("atp.training.callbacks.get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    check_trackers(["all"])
    check_trackers(["none"])
    with pytest.raises(InputError, match="tracker 'wandb' is not installed: install its package or leave it out"):
        check_trackers(["tensorboard", "wandb"])
