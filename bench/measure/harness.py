"""How a case is measured: the result is checked first, then timed on cold caches, and reported with its cost.

A speed is never reported for a wrong result: the error against the truth in fp64 (fp32 on a GPU) may be at most twice
the error of torch's own operation in the same dtype (three times for gradients), plus a few ulps of the truth's scale.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...kernels.cost import flash_attention_cost
from ..cases.kernels import Case, Provider

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
    host_microseconds: float | None = None  # to launch the call; None on a CPU


@dataclass(frozen=True)
class Failure:
    """A provider that does not run a case, or runs it wrong."""

    case: str
    provider: str
    error: str


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
        "gpu": _gpu(device) if cuda else None,
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _gpu(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks and power limit, as nvidia-smi says; None where it is not."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "ecc.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = done.stdout.splitlines()[device.index or 0].split(", ")
    return dict(zip(fields, values, strict=False))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


Results = tuple[Tensor, ...]


def _outputs(result: Tensor | Results) -> Results:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _gradients(outputs: Results, inputs: Results, upstream: Results) -> Results:
    given = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, given, retain_graph=True)


def _upstream(outputs: Results) -> Results:
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs)


class Checker:
    """A case's truth, worked out once, that any provider's results are held against."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.inputs = case, case.inputs(device)
        self.exact = torch.float64 if device.type == "cpu" else torch.float32
        precise = tuple(x.detach().to(self.exact).requires_grad_() for x in self.inputs)
        outputs = _outputs(case.truth(*precise))
        self.n_output = len(outputs)
        self.upstream = tuple(u.to(case.dtype) for u in _upstream(outputs))
        self.truths = [x.detach() for x in (*outputs, *_gradients(outputs, precise, self.upstream))]
        del outputs, precise
        self.allowed = self._errors(case.truth)

    def _errors(self, provider: Provider) -> list[float]:
        outputs = _outputs(provider(*self.inputs))
        results = [*outputs, *_gradients(outputs, self.inputs, self.upstream)]
        return [(r.detach().to(self.exact) - t).abs().max().item() for r, t in zip(results, self.truths, strict=True)]

    def check(self, name: str) -> None:
        """Raises WrongResult, and whatever the provider raises."""
        case, provider = self.case, self.case.providers[name]
        epsilon = torch.finfo(case.dtype).eps
        with case.path(name):
            errors = self._errors(provider)
        for position, (error, peer, expected) in enumerate(zip(errors, self.allowed, self.truths, strict=True)):
            gradient = position - self.n_output
            limit = (2 if gradient < 0 else 3) * peer + ULPS * epsilon * expected.abs().max().item()
            if not error <= limit:
                what = f"gradient {gradient}" if gradient >= 0 else f"output {position}" if position else "output"
                raise WrongResult(f"{case.name}: {name}'s {what} is off by {error:.3g}; at most {limit:.3g} is allowed")

    def check_repeats(self, name: str) -> None:
        """Raises WrongResult unless `repeats` backward runs agree to the last bit."""
        case = self.case
        with case.path(name):
            outputs = _outputs(case.providers[name](*self.inputs))
            first = _gradients(outputs, self.inputs, self.upstream)
            for run in range(1, case.repeats):
                if not all(map(torch.equal, first, _gradients(outputs, self.inputs, self.upstream))):
                    raise WrongResult(f"{case.name}: {name}'s backward {run} differs from its first")


def check(case: Case, device: torch.device) -> None:
    """Compare every provider with the truth, output and gradients; raises WrongResult."""
    checker = Checker(case, device)
    for name in case.providers:
        checker.check(name)


def check_flops(case: Case, device: torch.device) -> None:
    """Raises WrongResult where torch's FlopCounterMode and the closed form disagree, forward or backward.

    On a GPU our operators are counted. On a CPU, where torch knows the FLOPs of none that run, the oracle's products
    are, if it stands among the providers: attention's, over every pair.
    """
    name, expected = "rooflight", [case.cost(backward).flops for backward in (False, True)]
    if device.type == "cpu":
        name, s = "eager", case.shape
        if name not in case.providers or case.operation != "flash_attention":
            return
        every_pair = flash_attention_cost(s["B"], s["H"], s["K"], s["T"], s["T"], s["D"], causal=False).flops
        expected = [every_pair, 2 * every_pair]
    inputs = case.inputs(device)
    with FlopCounterMode(display=False) as forward:
        outputs = _outputs(case.providers[name](*inputs))
    upstream = _upstream(outputs)
    with FlopCounterMode(display=False) as backward:
        _gradients(outputs, inputs, upstream)
    counted = [forward.get_total_flops(), backward.get_total_flops()]
    if counted != expected:
        raise WrongResult(f"{case.name}: torch counts {counted} FLOPs, the closed form {expected}")


def task(case: Case, provider: Provider, mode: str, device: torch.device) -> Callable[[], object]:
    """The call to time: the forward alone, or the backward alone of a graph that is kept."""
    inputs = case.inputs(device)
    if mode == "forward":
        inputs = tuple(x.detach() for x in inputs)
        return lambda: provider(*inputs)
    outputs = _outputs(provider(*inputs))
    upstream = _upstream(outputs)
    return lambda: _gradients(outputs, inputs, upstream)


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


def host_microseconds(call: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    """How long the host takes to launch a call that takes `seconds`, the best of three rounds; None on a CPU."""
    if device.type != "cuda":
        return None
    calls = max(5, min(100, int(0.02 / seconds)))  # too few to fill the queue of launches
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize(device)
    return best * 1e6


def measure(
    case: Case,
    device: torch.device,
    *,
    without: Container[str] = (),
    progress: Callable[[str], object] = lambda provider: None,
) -> Iterator[Measurement | Failure]:
    """Check each provider of the case, then time it, forward and backward; one that fails loses nobody else's time."""
    checker = Checker(case, device)
    right = []
    for name in case.providers:
        if name in without:
            continue
        progress(name)
        try:
            checker.check(name)
            if case.repeats:
                checker.check_repeats(name)
            right.append(name)
        except Exception as error:
            yield Failure(case.name, name, _sentence(error))
    del checker
    for name in right if case.timed else ():
        progress(name)
        try:
            with case.path(name):
                yield from [_timed(case, name, mode, device) for mode in ("forward", "backward")]
        except Exception as error:
            yield Failure(case.name, name, _sentence(error))


def _sentence(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, WrongResult) else f"{type(error).__name__}: {first}"


def _timed(case: Case, name: str, mode: str, device: torch.device) -> Measurement:
    cost = case.cost(mode == "backward")
    call = task(case, case.providers[name], mode, device)
    peak = None
    if device.type == "cuda":
        call()  # compile and warm up before memory is counted
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        peak = (torch.cuda.max_memory_allocated(device) - held) / 2**20
    low, median, high = seconds(call, device)
    return Measurement(
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
        host_microseconds=host_microseconds(call, device, median),
    )


def as_records(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    return [asdict(measurement) for measurement in measurements]
