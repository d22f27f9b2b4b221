"""How a case is measured: the result is checked first, then timed, device and host apart, and reported with its cost.

A speed is never reported for a wrong result: the error against the truth in fp64 (fp32 on a GPU) may be at most twice
the error of torch's own operation in the same dtype (three times for gradients), plus a few ulps of the truth's scale.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...kernels.attention import paths
from ...kernels.cost import flash_attention_cost
from ..cases.case import COMPILED, Case, Provider
from ..cases.here import commit, processor
from .clock import launch_times, on_capture_stream, timings
from .compiler import compiled, no_fallback
from .memory import peak_bytes
from .records import Failure, Measurement, is_host_bound

ULPS = 4
SECONDS = {"cpu": 0.2, "cuda": 0.04}  # of runs of one mode of one provider
ROUNDS = {"cpu": (5, 100), "cuda": (10, 25)}


class WrongResult(AssertionError):  # noqa: N818 - it is a verdict, not a fault of the harness
    """A provider's output or gradient is further from the truth than the rule allows."""


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "gpu": _gpu(device) if cuda else None,
        "commit": commit(),
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


Results = tuple[Tensor, ...]


def _outputs(result: Tensor | Results) -> Results:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _gradients(outputs: Results, inputs: Results, upstream: Results, *, keep: bool = True) -> Results:
    given = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, given, retain_graph=keep)


def _upstream(outputs: Results) -> Results:
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs)


@contextmanager
def running(case: Case, name: str) -> Iterator[None]:
    """What all calls of a provider must run in: on its path, with a compiler of its own, and no fallback unsaid."""
    paths.forget()  # a path that failed is tried again, and fails again
    with no_fallback(), case.path(name), compiled() if name in COMPILED else nullcontext():
        yield


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
        with running(case, name):
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
    """The call to time, by the case's modes.

    Drawn and, for the backward, run forward where the clock captures calls.
    """
    with on_capture_stream(device):
        inputs = case.inputs(device)
        if mode == "forward":
            inputs = tuple(x.detach() for x in inputs)
        else:  # training's gradient too needs to know the outputs' shapes
            outputs = _outputs(provider(*inputs))
            upstream = _upstream(outputs)
    settle(device)  # the call may be made on another stream
    if mode == "forward":
        return lambda: provider(*inputs)
    if mode == "training":
        return lambda: _gradients(_outputs(provider(*inputs)), inputs, upstream, keep=False)
    return lambda: _gradients(outputs, inputs, upstream)


class ContextLost(RuntimeError):  # noqa: N818 - what it says is what happened
    """The device answers every call with an error: this process can measure nothing any more."""


def settle(device: torch.device) -> None:
    """Wait until the device has done all it was asked for; raises the error of whatever failed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alive(device: torch.device) -> bool:
    """Whether the device still works for this process, after an error."""
    if device.type != "cuda":
        return True
    for _ in range(2):  # the first may tell of an error that passes
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
            return True
    return False


def measure(
    case: Case,
    device: torch.device,
    *,
    without: Container[str] = (),
    progress: Callable[[str], object] = lambda provider: None,
) -> Iterator[Measurement | Failure]:
    """Check each provider of the case, then time it, forward and backward; one that fails loses nobody else's time.

    Raises ContextLost, with what the provider at hand raised, once the device answers no more.
    """
    checker = Checker(case, device)
    for name in case.providers:
        if name in without:
            continue
        progress(name)
        try:
            with running(case, name):
                checker.check(name)
                if case.repeats:
                    checker.check_repeats(name)
                found = [_timed(case, name, mode, device) for mode in case.modes] if case.timed else []
                settle(device)  # an error that is still on its way is this provider's
        except Exception as error:
            if not alive(device):
                raise ContextLost(sentence(error)) from error
            yield Failure(case.name, name, sentence(error))
        else:
            yield from found


def sentence(error: Exception) -> str:
    """The first line of what it says, with its type unless that is a verdict."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, WrongResult) else f"{type(error).__name__}: {first}"


def _timed(case: Case, name: str, mode: str, device: torch.device) -> Measurement:
    cost = case.cost_of(mode)
    call = task(case, case.providers[name], mode, device)
    peak, host = None, None
    if device.type == "cuda":
        call()  # compile and warm up before memory is counted
        peak = peak_bytes(call, device) / 2**20
    (timing,) = timings([call], device, seconds=SECONDS[device.type], rounds=ROUNDS[device.type])
    total = timing.median
    if device.type == "cuda":
        host, total = launch_times(call, device, timing.median)
    return Measurement(
        operation=case.operation,
        mode=mode,
        shape=dict(case.shape),
        dtype=str(case.dtype).removeprefix("torch."),
        provider=name,
        device_milliseconds=timing.median * 1e3,
        device_milliseconds_p20=timing.low * 1e3,
        device_milliseconds_p80=timing.high * 1e3,
        call_milliseconds=total * 1e3,
        gigabytes_per_second=cost.bytes / timing.median / 1e9,
        teraflops=cost.flops / timing.median / 1e12,
        peak_mib=peak,
        host_microseconds=None if host is None else host * 1e6,
        host_bound=is_host_bound(None if host is None else host * 1e6, total * 1e3),
        timed_by=timing.by,
        path=case.taken(name, mode),
    )
