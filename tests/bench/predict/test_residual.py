"""What a step leaves beyond its components, in three parts that add up to it."""

import os
import time
from pathlib import Path

import pytest
import torch

from rooflight.bench.predict import residual
from rooflight.bench.predict.compared import ComponentRow, Validation
from rooflight.bench.reports.terminal import lines
from rooflight.model import PRESETS, Ceilings, estimate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("step", "components", "busy", "clocks", "kernels", "gaps", "clock"),
    [
        (10.0, 6.0, 7.0, (None, None), 1.0, 3.0, 0.0),  # nothing is known of the clock
        (10.0, 6.0, 8.0, (1500.0, 2000.0), 0.0, 2.0, 2.0),  # a quarter slower in the step: all of what kernels lose
        (10.0, 9.0, 8.0, (2000.0, 2000.0), -1.0, 2.0, 0.0),  # faster in the step, where a cache is warm
        (10.0, 6.0, 7.0, (1500.0, None), 1.0, 3.0, 0.0),
    ],
)
def test_the_parts_are_the_residual(step, components, busy, clocks, kernels, gaps, clock):
    parts = residual.split(step, components, busy, clocks)
    assert (parts.kernels, parts.gaps, parts.clock) == pytest.approx((kernels, gaps, clock))
    assert parts.seconds == pytest.approx(step - components)


def test_a_step_that_sleeps_has_gaps():
    a = torch.randn(256, 256)

    def step() -> None:
        for _ in range(10):
            a @ a
        time.sleep(0.05)

    start = time.perf_counter()
    step()
    whole = time.perf_counter() - start
    assert 0 < residual.busy_seconds(step, CPU) < 0.8 * max(whole, 0.05)


def test_operators_within_operators_count_once():
    assert residual.union([(0, 10), (2, 5), (8, 12), (20, 21), (20, 21)]) == 13
    assert residual.union([]) == 0


@pytest.mark.parametrize("there", [True, False])
def test_the_clock_is_what_nvidia_smi_saw(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\nprintf "1980\\n1500\\n[N/A]\\n1200\\n"\nexec sleep 60\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}" if there else str(tmp_path / "nowhere"))
    with residual.Clock(torch.device("cuda", 1)) as seen:
        deadline = time.monotonic() + 10
        while there and not (tmp_path / "asked").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1 * there)
    assert seen.megahertz == (1500 if there else None)
    if there:
        assert "--query-gpu=clocks.sm" in (tmp_path / "asked").read_text()
        assert "-i 1 " in (tmp_path / "asked").read_text()
    with residual.Clock(CPU) as seen:
        pass
    assert seen.megahertz is None


def test_the_table_shows_the_parts_below_the_residual():
    e = estimate(PRESETS["tiny"], batch_size=1, ceilings=Ceilings({"bfloat16": 1e12}, 1e10))
    parts = residual.Residual(kernels=0.25, gaps=1.5, clock=0.25)
    done = Validation("tiny", e, (), (ComponentRow("FFN", 1.0, 2.0),), step_seconds=4.0, split=parts)
    told = [line for line, _ in lines(done.tables()[0], 80)]
    at = next(i for i, line in enumerate(told) if line.startswith("residual: step - sum"))
    shown = [" ".join(line.split()[-3:]) for line in told[at : at + 4]]
    assert shown == ["2,000.000 ms 50.0%", "250.000 ms 6.2%", "1,500.000 ms 37.5%", "250.000 ms 6.2%"]
    assert done.to_dict()["residual"] == {"kernels": 0.25, "gaps": 1.5, "clock": 0.25}
