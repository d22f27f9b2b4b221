"""A run's folder is marked, locked while the run lives, and nobody else's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rooflight.training.run.run_folder import FORMAT, LOCK, MARKER, RunFolder

HOLD = """
import os, sys, time, pathlib
from rooflight.training.run.run_folder import RunFolder
folder = RunFolder(pathlib.Path(sys.argv[1]), resume=False, overwrite=False, say=print)
with folder:
    if os.fork() == 0:  # a worker of the run, which must not keep the folder when the run has left it
        time.sleep(2)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
sys.stdin.readline()
with folder:
    print("held", flush=True)
    sys.stdin.readline()
"""


def _folder(path: Path, *, resume: bool = False, overwrite: bool = False, said: list[str] | None = None) -> RunFolder:
    return RunFolder(path, resume=resume, overwrite=overwrite, say=([] if said is None else said).append)


def test_a_folder_is_marked_and_its_marker_read(tmp_path):
    path = tmp_path / "a" / "run"
    with _folder(path):
        assert json.loads((path / MARKER).read_text()) == {"format": FORMAT, "version": 1}
        assert f"process {os.getpid()} on " in (path / LOCK).read_text()
    with _folder(path):  # again: it holds no checkpoint
        pass
    (path / MARKER).write_text(json.dumps({"format": FORMAT, "version": 2}))
    with pytest.raises(ValueError, match="version 2; expected 'rooflight-run', 1"):
        _folder(path)
    (path / MARKER).write_text("{")
    with pytest.raises(ValueError, match=r"rooflight\.json is damaged"):
        _folder(path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "checkpoints", "model.safetensors"])
def test_a_folder_that_holds_other_things_is_refused(tmp_path, name, resume):
    """A Hugging Face model, somebody's log: nothing in it is touched."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"out_dir .* holds {name} and no rooflight\.json"):
        _folder(tmp_path, resume=resume)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]
    with pytest.raises(ValueError, match="must be a folder"):
        _folder(tmp_path / name)


def test_a_run_that_was_killed_while_it_wrote_its_marker_begins_again(tmp_path):
    (tmp_path / f".{MARKER}.123.0badcafe").write_text("")
    with _folder(tmp_path):
        assert (tmp_path / MARKER).is_file()


def test_a_run_is_resumed_moved_aside_or_refused(tmp_path):
    with _folder(tmp_path):
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
        (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="holds a run already: resume it, or choose another, or overwrite"):
        _folder(tmp_path)
    with _folder(tmp_path, resume=True):
        assert (tmp_path / "log.jsonl").read_text() == "mine"
    for n in (1, 2):
        said: list[str] = []
        with _folder(tmp_path, overwrite=True, said=said):
            assert {p.name for p in tmp_path.iterdir() if "previous" not in p.name} == {MARKER, LOCK}
        assert re.search(rf"into .*previous-{n}: .*{MARKER}", said[0])
    assert (tmp_path / "previous-1" / "log.jsonl").read_text() == "mine"


def test_one_process_holds_a_folder(tmp_path):
    """Others are told its id; a process that has died, or left, holds nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {run.pid} on .*: wait for that run"):
            _folder(tmp_path).__enter__()
        assert str(run.pid) in (tmp_path / LOCK).read_text()
        for end in ("left\n", "held\n"):
            run.stdin.write("\n")
            run.stdin.flush()
            assert run.stdout.readline() == end
            if end == "left\n":
                with _folder(tmp_path):
                    pass
        with pytest.raises(ValueError, match=rf"is in use by process {run.pid}"):
            _folder(tmp_path).__enter__()
        run.kill()
        run.wait()
        with _folder(tmp_path):
            pass


def test_the_id_of_a_dead_process_is_no_lock(tmp_path):
    tmp_path.joinpath(LOCK).write_text("process 1 on elsewhere\n")
    with _folder(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
