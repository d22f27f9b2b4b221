"""One and several processes side by side: what is run, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rooflight.bench.measure import processes
from rooflight.tokenizer import Tokenizer


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "x.txt").write_text("the cat sat, naïve 日本語\n" * 1000, encoding="utf-8")
    Tokenizer({i: bytes([i]) for i in range(256)}, []).save(tmp_path / "tk")
    return tmp_path / "x.txt", tmp_path / "tk"


@pytest.mark.parametrize("task", processes.TASKS)
def test_a_run_measures_what_it_says(paths, task, monkeypatch):
    seen = []
    monkeypatch.setattr(processes, "CHARACTERS", 100)
    for name in processes.TASKS:
        own = getattr(Tokenizer, name)

        def spy(self, *arguments, num_workers, own=own, name=name):
            seen.append((name, num_workers, arguments[0]))
            return own(self, *arguments, num_workers=num_workers)

        monkeypatch.setattr(Tokenizer, name, spy)
    wall, busiest, all_ = processes.measure(task, *paths, 2)
    assert wall > 0
    assert 0 < busiest <= all_
    ((name, workers, given),) = seen
    assert (name, workers) == (task, 2)
    if task == "encode_batch":
        assert "".join(given) == paths[0].read_text(encoding="utf-8")
        assert {len(text) for text in given[:-1]} == {100}


def test_the_fastest_run_of_each_is_shown(monkeypatch, capsys):
    found = iter([[8.0, 4.0, 4.0], [5.0, 3.0, 6.0], [6.0, 5.0, 5.0], [7.0, 2.0, 7.0]] * 2)
    commands = []

    def run(command, **_):
        commands.append(command[3:])
        return SimpleNamespace(stdout=json.dumps(next(found)))

    monkeypatch.setattr(processes.subprocess, "run", run)
    monkeypatch.setattr(processes, "__spec__", SimpleNamespace(name="here"))
    processes.main("x.txt", "tk", "4", "2")
    assert commands[:3] == [["x.txt", "tk", n, "1", "encode_file"] for n in ("1", "4", "1")]
    assert len(commands) == 8
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:4]] == [
        ["encode_file", "wall", "busiest", "all"],
        ["1", "process", "6.00", "4.00", "4.00"],
        ["4", "processes", "5.00", "2.00", "6.00"],
        ["times", "as", "fast", "1.20", "2.00", "2.67"],
    ]


@pytest.mark.parametrize("workers", ["1", "0", "two"])
def test_several_are_more_than_one(workers: str):
    with pytest.raises(SystemExit, match=f"WORKERS: expected a number from 2 on, got {workers}"):
        processes.main("text", "folder", workers)
