"""The demo as a user runs it: a process of its own, on a small text, interrupted and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rooflight.bench.measure.harness import machine
from rooflight.bench.rates.ceilings import save_ceilings
from rooflight.model.ceilings import Ceilings

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
CODE = "import sys; from rooflight.bench.cli import main; sys.exit(main())"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Our own sources as text, few steps, everything below tmp_path."""
    out = str(tmp_path / "demo")
    return [sys.executable, "-c", CODE, "demo", "--text", str(ROOT / "kernels"), "--out", out, "--vocab-size", "400"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Plain CPU: what the demo runs without a GPU, not the interpreter."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # the ceilings take most of a minute to measure: these stand for an earlier measurement
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = machine(CPU)
    known = Ceilings({"bfloat16": 1e11}, 1e10, device=where["device"], versions={"torch": where["torch"]})
    save_ceilings(known, CPU)
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "160"}


def logged_steps(out: Path) -> int:
    log = out / "training" / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_interrupted_resumed_and_finished(tmp_path: Path, command: list[str], environment: dict[str, str]):
    out = tmp_path / "demo"
    arguments = [*command, "--device", "cpu", "--seconds", "600", "--steps", "24"]

    first = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while logged_steps(out) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 130, text
    assert "The same command goes on from step" in text

    second = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "bits per byte" in second.stdout
    assert "24 steps" in second.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["quantity"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["parameters"]["ratio"] == rows["matrix FLOPs"]["ratio"] == 1
    assert rows["step time"]["predicted"] > 0
    assert rows["peak memory"]["ratio"] == pytest.approx(1, abs=0.02)

    other = subprocess.run([*arguments, "--vocab-size", "500"], env=environment, capture_output=True, text=True)
    assert other.returncode == 2
    assert "vocab_size 400, not 500" in other.stderr


def test_exits_non_zero_when_the_loss_does_not_fall(capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    from rooflight.bench.demo import conclude
    from rooflight.training.loop import TrainResult

    def result(before: float, after: float) -> TrainResult:
        return TrainResult(
            step=2,
            train_loss=after,
            val_loss=after,
            first_val_loss=before,
            val_bits_per_byte=after,
            seconds=1.0,
            tokens=2,
            tokens_per_second=2.0,
            mfu=0.1,
            peak_flops=1.0,
            peak_memory_bytes=1,
            step_seconds=0.5,
            stopped="steps",
            checkpoint=Path("checkpoint"),
        )

    assert conclude(result(3.0, 2.0), Path("loss.png"), Console()) == 0
    assert conclude(result(3.0, 3.0), Path("loss.png"), Console()) == 1
    assert "did not fall" in capsys.readouterr().out
