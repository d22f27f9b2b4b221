"""The figure of runs: what is read from their logs, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rooflight.bench.cli import app
from rooflight.bench.reports import runs
from rooflight.bench.reports.runs import plot_runs, read_log, series

RECORDS = [
    {"step": 0, "tokens": 0, "val_loss": 5.0},
    {"step": 10, "tokens": 640, "elapsed": 1.5, "loss": 4.0},
    {"step": 20, "tokens": 1280, "elapsed": 3.0, "loss": 3.0, "val_loss": 3.5},
]


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "runs" / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folders


def test_a_log_is_read_up_to_a_line_that_was_cut_off(logs):
    assert read_log(logs[0]) == read_log(logs[0] / "log.jsonl") == RECORDS
    with (logs[0] / "log.jsonl").open("a") as log:
        log.write('{"step": 30, "tok')
    assert read_log(logs[0]) == RECORDS
    with (logs[0] / "log.jsonl").open("a") as log:
        log.write('\n{"step": 40}\n')
    with pytest.raises(ValueError, match="line 4: no record of a step"):
        read_log(logs[0])
    (logs[0] / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step is in it yet"):
        read_log(logs[0])
    with pytest.raises(FileNotFoundError, match="expected a run's folder"):
        read_log(logs[0].parent)


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"step": "x"}', b'{"step": 1, "loss": "low"}', b"[3]"])
def test_a_line_that_is_no_record_is_named(logs, line):
    (logs[0] / "log.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: no record of a step"):
        read_log(logs[0])


def test_a_figure_without_a_format_is_refused_by_its_name(logs, tmp_path):
    with pytest.raises(ValueError, match=r"expected a file that ends in one of .*, got 'loss'"):
        plot_runs(logs, tmp_path / "loss")


def test_series_skip_what_a_record_lacks():
    assert series(RECORDS, "step", "loss") == ([10, 20], [4.0, 3.0])
    assert series(RECORDS, "tokens", "val_loss") == ([0, 1280], [5.0, 3.5])
    assert series(RECORDS, "elapsed", "val_loss") == ([3.0], [3.5])


@pytest.mark.parametrize(
    ("against", "label", "last"), [("step", "steps", 20), ("tokens", "tokens", 1280), ("time", "seconds", 3)]
)
def test_several_runs_are_drawn_in_one_figure(logs, tmp_path, monkeypatch, against, label, last):
    pytest.importorskip("matplotlib")
    drawn, save = [], runs._save
    monkeypatch.setattr(runs, "_save", lambda figure, path: (drawn.append(figure.axes[0]), save(figure, path)))
    plot_runs(logs, tmp_path / "x.svg", against=against)
    (axes,) = drawn
    names = [line.get_label() for line in axes.lines]
    assert names == ["a, training", "a, validation", "b, training", "b, validation"]
    assert axes.get_xlabel() == label
    assert [line.get_xdata()[-1] for line in axes.lines] == [last] * 4
    assert (tmp_path / "x.svg").stat().st_size > 1000


def test_the_command_draws(logs, tmp_path):
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(app, ["plot", *map(str, logs), "--out", str(tmp_path / "y.png"), "--against", "time"])
    assert done.output == f"{tmp_path}/y.png: written\n"
    assert (tmp_path / "y.png").read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["plot", str(logs[0]), "--against", "epochs"])
    assert str(wrong.exception) == "against: expected one of step, tokens, time, got 'epochs'"
