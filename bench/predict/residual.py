"""What a measured step takes beyond its components by themselves, in three parts.

gaps      the device had nothing to do: the host was behind, or a launch took its time
clock     the processor's clock was lower in the step than under the components (a GPU that meets its power limit)
kernels   the rest: kernels that run faster or slower in the step than by themselves, a cache being warm or shared
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

PROFILED = 3  # steps
SAMPLE_MILLISECONDS = 20  # between two looks at the clock


@dataclass(frozen=True)
class Residual:
    """Seconds of a step beyond the sum of its components; clock is 0 where it cannot be read."""

    kernels: float
    gaps: float
    clock: float

    @property
    def seconds(self) -> float:
        return self.kernels + self.gaps + self.clock


def split(
    step: float, components: float, busy: float, clocks: tuple[float | None, float | None] = (None, None)
) -> Residual:
    """The parts of step - components.

    busy: seconds of the step in which the device worked.  clocks: of the step and of the components, MHz. All the work
    is taken to slow down with the clock, which is more than what waits for memory does: the clock's part is at most so.
    """
    during, alone = clocks
    clock = busy * (1 - during / alone) if during and alone else 0.0
    return Residual(busy - clock - components, step - busy, clock)


def busy_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step in which the device runs anything: the union of its kernels, on a CPU of its operators.

    A CPU's profiler slows the step down: there it is the same share of the step without.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    step()
    plain = time.perf_counter()
    for _ in range(PROFILED):
        step()
    plain = time.perf_counter() - plain
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(PROFILED):
            step()
        profiled = time.perf_counter() - start
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = [
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == wanted and (cuda or e.name().startswith(("aten::", "rooflight::")))
    ]
    seconds = union(spans) / 1e9
    return (seconds if cuda else seconds / profiled * plain) / PROFILED


def union(spans: Iterable[tuple[int, int]]) -> int:
    """The length of what any of these (start, end) covers.

    >>> union([(0, 2), (1, 3), (5, 6)])
    4
    """
    covered, reached = 0, None
    for start, end in sorted(spans):
        begin = start if reached is None else max(start, reached)
        covered += max(0, end - begin)
        reached = end if reached is None else max(reached, end)
    return covered


class Clock:
    """While entered, looks at a GPU's clock again and again; afterwards `megahertz` is the median, None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.megahertz: float | None = None
        self._reader: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clock:
        if self.device.type == "cuda":
            query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
            query += ["-i", str(self.device.index or 0), "-lms", str(SAMPLE_MILLISECONDS)]
            try:
                self._reader = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                self._reader = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reader is not None:
            self._reader.terminate()
            told, _ = self._reader.communicate()
            seen = [float(line) for line in told.split() if line.isdigit()]
            self.megahertz = statistics.median(seen) if seen else None
