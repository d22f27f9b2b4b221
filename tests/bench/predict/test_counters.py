"""What ncu answers is read, and what it cannot answer is said. A stand-in prints what ncu would: no GPU is needed."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from rooflight.bench.predict import counters
from rooflight.bench.predict.counters import BYTES, TENSOR_OPERATIONS, available, count_step, sum_metrics
from rooflight.bench.predict.validate import _executed
from rooflight.model import ModelConfig, estimate
from rooflight.model.config import PRESETS

E = estimate(ModelConfig(128, 64, 2, 4, n_kv_head=2, d_model=64, d_ff=96), batch_size=2)
OPERATIONS = TENSOR_OPERATIONS["bfloat16"]
HEADER = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
CSV = f"""==PROF== Connected to process 7
==PROF== Profiling "matmul": 0%....50%....100%
{HEADER}
"0","matmul","Command line profiler metrics","{OPERATIONS}","inst","4,194,304"
"0","matmul","Command line profiler metrics","{BYTES[0]}","byte","1,000"
"0","matmul","Command line profiler metrics","{BYTES[1]}","byte","500"
"1","norm, fused","Command line profiler metrics","{OPERATIONS}","inst","0"
"1","norm, fused","Command line profiler metrics","{BYTES[0]}","byte","20"
"1","norm, fused","Command line profiler metrics","{BYTES[1]}","byte","7.5"
==PROF== Disconnected from process 7
"""


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """install(lines of Python) makes that an `ncu` on the path; its arguments go to arguments.json."""

    def install(*lines: str) -> Path:
        asked = tmp_path / "arguments.json"
        script = ["import json, sys, time", f"json.dump(sys.argv[1:], open({str(asked)!r}, 'w'))", *lines]
        path = tmp_path / "ncu"
        path.write_text("\n".join([f"#!{sys.executable}", *script]))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return asked

    return install


def test_metrics_are_summed_over_the_kernels():
    assert sum_metrics(CSV.splitlines()) == {OPERATIONS: 4194304, BYTES[0]: 1020, BYTES[1]: 507.5}


def test_a_step_is_asked_for_and_its_answer_read(ncu):
    asked = ncu(f"print({CSV!r})")
    assert count_step(E, torch.device("cuda")) == (4194304, 1527.5)
    arguments = json.loads(asked.read_text())
    assert arguments[arguments.index("--metrics") + 1].split(",") == [OPERATIONS, *BYTES]
    assert arguments[arguments.index("--clock-control") + 1] == "none"  # else it changes the card's clocks
    request = json.loads(arguments[-1])
    assert ModelConfig(**request["model"]) == E.config
    assert (request["batch_size"], request["context_length"], request["dtype"]) == (2, 64, "bfloat16")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["print('==ERROR== ERR_NVGPUCTRPERM')", "sys.exit(1)"], "ncu: ==ERROR== ERR_NVGPUCTRPERM"),
        (["sys.exit(9)"], "ncu: exit status 9"),
        ([f"print({HEADER!r})"], f"ncu: its answer has no {OPERATIONS}"),
        (["time.sleep(60)"], "ncu: no answer in 1 seconds"),
    ],
    ids=["no permission", "silent", "no metrics", "hangs"],
)
def test_without_an_answer_it_says_why(ncu, lines: list[str], message: str):
    ncu(*lines)
    with pytest.raises(RuntimeError, match=message):
        count_step(E, torch.device("cuda"), timeout=1)


def test_the_process_that_ncu_watches_ends_with_it(ncu, tmp_path: Path):
    """By itself it would keep the GPU."""
    watched = tmp_path / "pid"
    ncu(
        "import subprocess",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
        f"open({str(watched)!r}, 'w').write(str(child.pid))",
        "time.sleep(60)",
    )
    with pytest.raises(RuntimeError, match="no answer in 3 seconds"):
        count_step(E, torch.device("cuda"), timeout=3)
    status = Path("/proc", watched.read_text(), "status")
    deadline = time.monotonic() + 10
    while (alive := status.exists() and "State:\tZ" not in status.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def test_a_step_too_large_to_replay_is_not_begun(ncu):
    asked = ncu(f"print({CSV!r})")
    with pytest.raises(RuntimeError, match="not asked for models of more than 500 M parameters"):
        count_step(estimate(PRESETS["gpt2-xl"], batch_size=1), torch.device("cuda"))
    assert not asked.exists()


def test_counters_are_asked_for_on_a_gpu_that_has_them(ncu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert not available(torch.device("cuda"), "bfloat16")
    monkeypatch.setattr(counters.shutil, "which", lambda name: name)
    assert available(torch.device("cuda"), "bfloat16")
    assert not available(torch.device("cuda"), "float32")
    assert not available(torch.device("cpu"), "bfloat16")


def test_they_are_held_against_what_is_executed():
    executed = sum(E.ledgers["executed"].values())
    flops, moved = _executed(E, 2 * executed, 1e9)
    assert flops.ratio == 0.5
    assert moved.predicted == pytest.approx(sum(c.bytes for c in E.components) / 1e9)
