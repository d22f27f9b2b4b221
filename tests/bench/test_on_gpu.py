"""bench/on_gpu.sh, as far as it goes without a GPU: what its tests are, and that it tells of a failure at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.cuda_context import end_if_lost

ROOT = Path(__file__).parents[2]
# What stands in for a GPU, or compiles for one that is not there.
CPU_ONLY = re.compile(
    r"support\.(gluon_\w+|aot|artifacts|sass)|from mutants|test_mutants|support\.interpreter import extent"
)


def on_gpu(out: Path, part: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", ROOT / "bench" / "on_gpu.sh", out, part],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tests_part_takes_what_a_gpu_changes(tmp_path):
    busy = {"TEST_SECONDS": "900", "TOTAL_SECONDS": "1000"}  # this machine may be
    done = on_gpu(tmp_path, "tests", PYTEST_ADDOPTS="--collect-only -p no:terminalprogress", **busy)
    tests = re.findall(r"^(tests/\S+\.py)::", done.stdout, re.MULTILINE)
    assert len(tests) > 800, done.stdout[-2000:]
    files = set(tests)
    kernels, model, training = "kernels/test_rms_norm.py", "model/test_transformer.py", "training/data/test_data.py"
    assert {f"tests/{name}" for name in (kernels, model, training)} <= files
    assert [name for name in files if name.endswith("/test_attention.py")]
    assert not [name for name in files if CPU_ONLY.search((ROOT / name).read_text(encoding="utf-8"))]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_no_part_begins_after_the_last_second(tmp_path):
    done = on_gpu(tmp_path, "tests", TOTAL_SECONDS="0")
    assert done.returncode == 1
    assert re.sub(r"== \S+ ", "", done.stdout).splitlines() == [f"{x}, at most 0 s" for x in ("GPU", "paths", "tests")]


FAILING = """
import time
from pathlib import Path
import pytest

def test_that_fails():
    assert 1 == 2, "the first line\\nthe second line"

@pytest.fixture
def broken():
    raise RuntimeError("no such thing")

def test_that_cannot_begin(broken):
    pass

def test_that_waits():
    end = time.monotonic() + 30
    while not Path("go on").exists():
        assert time.monotonic() < end, "nobody has read of the failures"
        time.sleep(0.01)
"""


# In the place of torch, whose import is most of what a made-up suite takes: the conftest asks it for a GPU alone.
NO_TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
"""


def made_up(folder: Path, tests: str, conftest: str = (ROOT / "conftest.py").read_text(encoding="utf-8")) -> list[str]:
    """A suite of these tests with our own conftest; the command that runs it, in `folder`."""
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    (folder / "tests").mkdir()
    (folder / "tests" / "torch.py").write_text(NO_TORCH, encoding="utf-8")
    (folder / "tests" / "test_made_up.py").write_text(tests, encoding="utf-8")
    options = ["-p", "no:benchmark", "-q", "--tb=no", "--announce"]
    start = "import sys; sys.path.insert(0, 'tests'); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return [sys.executable, "-P", "-c", start, *options]


def test_a_failure_is_announced_while_the_others_run(tmp_path):
    """In the plain process and in xdist's: the last test ends only once both failures were read here."""
    command = made_up(tmp_path, FAILING)
    for options in (["-p", "no:xdist", "-p", "no:timeout"], ["-n", "1"]):
        (tmp_path / "go on").unlink(missing_ok=True)
        with subprocess.Popen([*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            expected = [
                "test_that_fails: AssertionError: the first line",
                "test_that_cannot_begin: RuntimeError: no such",
            ]
            for line in process.stdout:
                if line.startswith("FAILED "):
                    assert line.startswith(f"FAILED tests/test_made_up.py::{expected.pop(0)}")
                    if not expected:
                        break
            assert process.poll() is None
            (tmp_path / "go on").touch()
            assert "1 passed" in process.stdout.read()
        assert not expected


SLOW = """
import time
from pathlib import Path

def test_that_takes_its_time():
    time.sleep(0.3)

def test_that_does_not():
    pass

def test_that_never_ends():
    Path("begun").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("options", [["-p", "no:xdist"], ["-n", "1"]], ids=["plain", "xdist"])
def test_slow_tests_and_those_that_a_ctrl_c_cuts_are_named(tmp_path, options):
    source = (ROOT / "conftest.py").read_text(encoding="utf-8")
    shorter = source.replace("SLOW_SECONDS = 10 ", "SLOW_SECONDS = 0.25 ")
    assert shorter != source
    command = [*made_up(tmp_path, SLOW, shorter), *options]

    def hear_ctrl_c() -> None:  # which a suite in the background of a shell ignores, and its children with it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(2)  # a worker's message that the test began takes its way to the process that announces
        process.send_signal(signal.SIGINT)
        printed = process.communicate()[0]
    told = [line.rsplit(" ", 2)[0] for line in printed.splitlines() if line.startswith(("SLOW ", "UNFINISHED "))]
    assert "SLOW tests/test_made_up.py::test_that_takes_its_time" in told, printed
    assert told[-1] == "UNFINISHED tests/test_made_up.py::test_that_never_ends", printed


def test_long_tests_stand_at_the_head_of_each_processs_run(request):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "conftest.py"))

    def item(i: int) -> SimpleNamespace:
        return SimpleNamespace(i=i, get_closest_marker=lambda name: name == "long" and i in (3, 10, 11))

    items = [item(i) for i in range(14)]
    order = [x.i for x in conftest.long_first(items, 2)]
    assert order == [3, 11, 0, 1, 2, 4, 5, 10, 6, 7, 8, 9, 12, 13]
    for processes in (1, 2, 5, 16):
        assert sorted(x.i for x in conftest.long_first(items, processes)) == list(range(14))


def test_a_lost_cuda_context_ends_the_process(monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    end_if_lost()  # CUDA was never used here
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(pytest.exit.Exception, match="context is lost: CUDA error: an illegal instruction"):
        end_if_lost()
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
    with pytest.raises(SystemExit):
        end_if_lost()
