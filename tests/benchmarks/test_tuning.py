"""The script that times what a call costs beside its products prints what it promises."""

import torch

from benchmarks import overhead


def test_overhead_prints_a_line_a_pass(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("sys.argv", ["overhead", "--rounds", "20"])
    overhead.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["forward", "forward and backward"]
