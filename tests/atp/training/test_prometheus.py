"""The metrics file never takes the place of another file, and its text is what Prometheus reads."""

import os
from pathlib import Path

import pytest
from tiny_run import TOTAL, make

from atp.ground.errors import InputError
from atp.training import prometheus
from atp.training.prometheus import MetricsFile, check_metrics_file, exposition


def test_labels_are_escaped_and_unknown_values_left_out():
    text = exposition({"step": 3, "loss": None, "kept": 0.5}, {"run": 'a"b\\c\nd'})
    assert text.splitlines() == [
        "# HELP atp_step Finished LoRA steps.", "# TYPE atp_step gauge", 'atp_step{run="a\\"b\\\\c\\nd"} 3',
        "# HELP atp_kept Share of the decoder's parameters that the mask of the last step keeps.",
        "# TYPE atp_kept gauge", 'atp_kept{run="a\\"b\\\\c\\nd"} 0.5',
    ]  # fmt: skip


def test_not_a_number_is_what_prometheus_calls_it():
    assert exposition({"loss": float("nan")}, {}).endswith("atp_loss{} NaN\n")
    assert exposition({"loss": float("inf")}, {}).endswith("atp_loss{} +Inf\n")


def test_only_a_file_of_ours_is_replaced(tmp_path):
    check_metrics_file(None)
    file = tmp_path / "deep" / "atp.prom"
    check_metrics_file(str(file))
    assert not file.parent.exists()
    file.parent.mkdir()
    for own in ("", exposition({"step": 1}, {})):
        file.write_text(own, encoding="utf-8")
        check_metrics_file(str(file))
    file.write_text("my notes", encoding="utf-8")
    with pytest.raises(InputError, match="atp.prom is another file, which would be overwritten"):
        check_metrics_file(str(file))
    assert file.read_text(encoding="utf-8") == "my notes"


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder"), ("file/atp.prom", "is not writable"), ("x" * 300, "File name too long")]
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path, name, message):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=f"training.metrics_file .*{message}"):
        check_metrics_file(str(tmp_path / name))


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "atp.prom")
    (tmp_path / "link.prom").symlink_to("/dev/null")
    for name in ("atp.prom", "link.prom"):
        with pytest.raises(InputError, match=rf"training.metrics_file .*{name} is no regular file: give another name"):
            check_metrics_file(str(tmp_path / name))


def test_each_record_and_checkpoint_replaces_the_file(tmp_path, monkeypatch):
    texts = []
    write = MetricsFile._write
    monkeypatch.setattr(
        MetricsFile, "_write", lambda self, loop: (write(self, loop), texts.append(self.path.read_text("utf-8")))
    )
    trainer = make(tmp_path, training={"metrics_file": str(tmp_path / "state" / "atp.prom"), "save_every": 4})
    trainer.train()
    steps = [int(text.split('"} ')[1].split("\n")[0]) for text in texts]
    assert steps == sorted(steps) and set(steps) == set(range(TOTAL + 1))
    assert "checkpoint_age" not in texts[0] and "atp_checkpoint_age_seconds{" in texts[-1]
    assert 'phase="search"' in texts[0] and "atp_kept" in texts[1] and 'phase="tune"' in texts[-1]


def test_a_half_written_file_is_no_prom_file_and_another_run_may_write_the_same(tmp_path, monkeypatch):
    file, seen = tmp_path / "atp.prom", []
    trainer = make(tmp_path / "run")
    monkeypatch.setattr(prometheus.os, "getpid", lambda: 1)
    first = MetricsFile(file)
    monkeypatch.setattr(prometheus.os, "getpid", lambda: 2)
    second = MetricsFile(file)
    write = Path.write_text

    def write_beside(self, *arguments, **options):
        written = write(self, *arguments, **options)
        if not seen:
            seen.extend(path for path in tmp_path.iterdir() if path.is_file())
            second.on_phase(trainer)
        return written

    monkeypatch.setattr(Path, "write_text", write_beside)
    first.on_phase(trainer)
    assert len(seen) == 1 and seen[0].suffix != ".prom"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["atp.prom"]


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path):
    file = tmp_path / f"{'x' * 250}.prom"
    check_metrics_file(str(file))
    MetricsFile(file).on_phase(make(tmp_path / "run"))
    assert "atp_step" in file.read_text(encoding="utf-8")
