"""How a case is measured: the result is checked first, then timed on cold caches, and reported with its cost.

A speed is never reported for a wrong result: the error against the truth in fp64 (fp32 on a GPU) may be at most twice
the error of torch's own operation in the same dtype (three times for gradients), plus a few ulps of the truth's scale.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .cases import Case, Provider

ULPS = 4


class WrongResult(AssertionError):  # noqa: N818 - it is a verdict, not a fault of the harness
    """A provider's output or gradient is further from the truth than the rule allows."""


@dataclass(frozen=True)
class Measurement:
    """One provider's time for one mode of a case; rates count the case's closed-form cost, not what was executed."""

    operation: str
    mode: str
    shape: dict[str, int | bool]
    dtype: str
    provider: str
    milliseconds: float  # median
    milliseconds_p20: float
    milliseconds_p80: float
    gigabytes_per_second: float
    teraflops: float
    peak_mib: float | None  # device memory above the inputs; None on a CPU


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _gradients(output: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype), retain_graph=True)


def _upstream(output: Tensor) -> Tensor:
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


def check(case: Case, device: torch.device) -> None:
    """Compare every provider with the truth, output and gradients; raises WrongResult."""
    inputs = case.inputs(device)
    exact = torch.float64 if device.type == "cpu" else torch.float32
    precise = tuple(x.detach().to(exact).requires_grad_() for x in inputs)
    truth = case.truth(*precise)
    upstream = _upstream(truth).to(case.dtype)
    truths = [truth, *_gradients(truth, precise, upstream)]

    def errors(provider: Provider) -> list[float]:
        output = provider(*inputs)
        results = [output, *_gradients(output, inputs, upstream)]
        return [(r.to(exact) - t).abs().max().item() for r, t in zip(results, truths, strict=True)]

    allowed = errors(case.truth)
    epsilon = torch.finfo(case.dtype).eps
    for name, provider in case.providers.items():
        for position, (error, peer, expected) in enumerate(zip(errors(provider), allowed, truths, strict=True)):
            limit = (3 if position else 2) * peer + ULPS * epsilon * expected.abs().max().item()
            if not error <= limit:
                what = f"gradient {position - 1}" if position else "output"
                raise WrongResult(f"{case.name}: {name}'s {what} is off by {error:.3g}; at most {limit:.3g} is allowed")


def task(case: Case, provider: Provider, mode: str, device: torch.device) -> Callable[[], object]:
    """The call to time: the forward alone, or the backward alone of a graph that is kept."""
    inputs = case.inputs(device)
    if mode == "forward":
        inputs = tuple(x.detach() for x in inputs)
        return lambda: provider(*inputs)
    output = provider(*inputs)
    upstream = _upstream(output)
    return lambda: _gradients(output, inputs, upstream)


def seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float, float]:
    """(p20, median, p80) of the call's time: CUDA events on a cold L2, or wall-clock time on a CPU."""
    if device.type == "cuda":
        low, median, high = triton.testing.do_bench(call, quantiles=(0.2, 0.5, 0.8))
        return low / 1e3, median / 1e3, high / 1e3
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    times = torch.tensor(timer.blocked_autorange(min_run_time=0.2).times, dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return low, median, high


def measure(case: Case, device: torch.device) -> Iterable[Measurement]:
    """Check the case, then time every provider, forward and backward."""
    check(case, device)
    for mode in ("forward", "backward"):
        cost = case.cost(mode == "backward")
        for name, provider in case.providers.items():
            call = task(case, provider, mode, device)
            peak = None
            if device.type == "cuda":
                call()  # compile and warm up before memory is counted
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
                call()
                peak = (torch.cuda.max_memory_allocated(device) - held) / 2**20
            low, median, high = seconds(call, device)
            yield Measurement(
                operation=case.operation,
                mode=mode,
                shape=dict(case.shape),
                dtype=str(case.dtype).removeprefix("torch."),
                provider=name,
                milliseconds=median * 1e3,
                milliseconds_p20=low * 1e3,
                milliseconds_p80=high * 1e3,
                gigabytes_per_second=cost.bytes / median / 1e9,
                teraflops=cost.flops / median / 1e12,
                peak_mib=peak,
            )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as write_text does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def as_records(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    return [asdict(measurement) for measurement in measurements]
