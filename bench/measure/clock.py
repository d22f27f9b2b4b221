"""How long calls take beside one another, on a machine that other work slows down and speeds up.

Calls are timed in turn, round after round: a slow moment falls on all of them alike, and by the time one comes round
again the others' memory has gone through the caches. What is reported is each call's median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...training.throughput import keep_freed_memory

Call = Callable[[], object]

# Bytes read before each timed call on a GPU, several times its L2. Read, not written: what was written would be written
# back while the call is timed, up to 60 MB of it.
L2_FLUSH = 2**28
WAKE = 0.01  # seconds of work before the first sample: an idle GPU's clocks are low
ROUND = 0.01  # seconds of a round of calls that follow one another


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the least, the 20th percentile, the median and the 80th of its runs.

    by: how they were timed, "graph" (replays of a CUDA graph), "events" (around the call itself) or "clock" (a CPU).
    """

    least: float
    low: float
    median: float
    high: float
    by: str


def timings(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 25),
    capture: bool = True,
) -> list[Timing]:
    """Each call's timing, of rounds[0] to rounds[1] runs, as many as fit into its share of `seconds`.

    On a GPU: events around the replay of a CUDA graph of the call, on a cold L2 (around the call itself where it cannot
    be captured, or is not to be). On a CPU: the clock on the wall; with a single thread, the time that thread ran.
    """
    if device.type == "cuda":
        flush = torch.zeros(L2_FLUSH // 4, dtype=torch.float32, device=device)
        runs = [_captured(call, device) if capture else None for call in calls]
        ways = ["events" if run is None else "graph" for run in runs]
        samplers = [_cuda_sampler(run or call, flush) for run, call in zip(runs, calls, strict=True)]
        _wake(samplers)
    else:
        keep_freed_memory()
        ways = ["clock"] * len(calls)
        samplers = [_cpu_sampler(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds[1]):
        for sampler, samples in zip(samplers, times, strict=True):
            if len(samples) < rounds[0] or sum(samples) < seconds / len(calls):
                samples.append(sampler())
    return [Timing(min(samples), *_quantiles(samples), way) for samples, way in zip(times, ways, strict=True)]


def median_seconds(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 25),
    capture: bool = True,
) -> list[float]:
    """Each call's median seconds, timed as `timings` does."""
    return [timing.median for timing in timings(calls, device, seconds=seconds, rounds=rounds, capture=capture)]


def _quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th, between the samples beside them."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[-1]


def launch_times(call: Call, device: torch.device, seconds: float) -> tuple[float, float]:
    """(seconds until the host has issued a call, seconds of a call) of calls on a GPU that follow one another.

    seconds: about what the device needs for one; too few are issued to fill the queue, and the best of three rounds
    counts. The caches are as the calls leave them.
    """
    count = max(3, min(100, int(ROUND / seconds)))
    call()
    issued = ended = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        issued = min(issued, (time.perf_counter() - start) / count)
        torch.cuda.synchronize(device)
        ended = min(ended, (time.perf_counter() - start) / count)
    return issued, ended


def clock() -> Callable[[], float]:
    """The clock for a CPU's work: waiting behind other processes is no work of the one thread that does it all."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _cpu_sampler(call: Call) -> Callable[[], float]:
    now = clock()
    call()  # first calls allocate, pack weights and choose kernels

    def sample() -> float:
        start = now()
        call()
        return now() - start

    return sample


def _cuda_sampler(run: Call, flush: Tensor) -> Callable[[], float]:
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        flush.sum()  # while the GPU reads, the host queues what follows: no launch is waited for
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def _wake(samplers: Sequence[Callable[[], float]]) -> None:
    end = time.perf_counter() + WAKE
    while time.perf_counter() < end:
        for sampler in samplers:
            sampler()


def _captured(call: Call, device: torch.device) -> Call | None:
    """The replay of a CUDA graph of the call; None where it synchronises and so cannot be captured.

    A backward pass runs on the stream its forward ran on: that must be this one (on_capture_stream).
    """
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and tune before the capture
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph.replay


_streams: dict[torch.device, torch.cuda.Stream] = {}


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which calls are captured."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def on_capture_stream(device: torch.device) -> AbstractContextManager:
    """What a backward pass that is to be timed must have its forward run in; nothing on a CPU."""
    return torch.cuda.stream(capture_stream(device)) if device.type == "cuda" else nullcontext()


def best_seconds(call: Call, device: torch.device, seconds: float = 0.3, *, capture: bool = True) -> float:
    """The shortest time of the call within `seconds`: a ceiling is what the machine can do."""
    return timings([call], device, seconds=seconds, rounds=(1, 1000), capture=capture)[0].least
