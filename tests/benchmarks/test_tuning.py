"""The tuning scripts: all ways to compute a layer agree, and both scripts print what they promise."""

import torch
from torch.testing import assert_close

from benchmarks import overhead, tune_linear


def test_every_way_computes_the_same():
    ways = tune_linear.candidates(6, 10, 8, 3, torch.float64, "cpu")
    expected, *others = (call() for call in ways.values())
    assert len(others) == 3
    for other in others:
        assert_close(other, expected)


def test_scripts_print_a_line_a_case(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    options = ["--model", "tiny", "--rank", "4", "--dtype", "float32", "--tokens", "4", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["tune_linear", *options])
    tune_linear.main()
    lines = capsys.readouterr().out.splitlines()
    shapes = ("64x64", "32x64", "96x64", "64x96")
    assert [line.split(":")[0] for line in lines] == [f"{shape} r4 float32" for shape in shapes]
    assert all("one product, prepared" in line and "noise" in line for line in lines)
    monkeypatch.setattr("sys.argv", ["overhead", "--rounds", "20"])
    overhead.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["forward", "forward and backward"]
