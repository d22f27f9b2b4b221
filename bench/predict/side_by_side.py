"""One training step, ours beside plain PyTorch's, in one process: what a user pays, per step and for the first.

ours, eager      the model as `rooflight train` runs it
ours, graphed    forward, backward and update as one CUDA graph: the host's part falls away (GPU only)
ours, compiled   the model under torch.compile, as `rooflight train --compile` and the demo on a CPU run it
plain, eager     bench/cases/plain_model.py: scaled_dot_product_attention, torch's fused AdamW
plain, compiled  the same with its blocks compiled, which take seconds once; the vocabulary padded to 64
ours, fp8        as a graph, with the blocks' products in fp8: not the others' numbers, so a row to be read apart
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ...model import Ceilings, ModelConfig, Transformer, estimate
from ...training.optim import build_optimizers, low_precision
from ...training.throughput import keep_freed_memory
from ..cases.plain_model import PlainTransformer
from ..measure.clock import clock
from ..measure.compiler import compiled, no_fallback
from ..rates.kernel_rates import ops_on
from .host import eager_seconds
from .step import graphed, multiply_in_fp8, take_step

WAYS = ("ours, eager", "ours, graphed", "ours, compiled", "plain, eager", "plain, compiled", "ours, fp8")
GPU_ONLY = ("ours, graphed", "ours, fp8")  # on a CPU fp8 is imitated: asked for, it runs, without a graph
# what is taken where nothing is asked for: on a GPU a graph does what a compiler would, without its minute
DEFAULT = {"cpu": tuple(way for way in WAYS if way not in GPU_ONLY), "cuda": (*WAYS[:2], *WAYS[3:])}
PADDED = 64  # rows that a vocabulary is padded to


@dataclass(frozen=True)
class StepTime:
    """One way to take the step. host_milliseconds: until the host has issued it; on a CPU the whole step."""

    name: str
    ours: bool
    vocab_size: int
    milliseconds: float  # median
    milliseconds_best: float
    milliseconds_worst: float
    tokens_per_second: float
    host_milliseconds: float
    peak_bytes: int | None  # None on a CPU
    first_step_seconds: float  # compilation, capture and warm-up included
    mfu: float | None  # of visible pairs' FLOPs; None where no peak is given
    mfu_full: float | None  # counting T^2 pairs, as is usual
    first_loss: float
    last_loss: float
    predicted_milliseconds: float | None = None  # of ours, on this machine's ceilings


class _Step:
    """Forward, backward and update; `issue` returns the loss without waiting for it."""

    def __init__(self, way: str, config: ModelConfig, tokens: Tensor, dtype: torch.dtype) -> None:
        device = tokens.device
        self.ours, self.dtype = way.startswith("ours"), dtype
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        padded = -(-config.vocab_size // PADDED) * PADDED
        self.vocab_size = padded if way == "plain, compiled" else config.vocab_size
        with device:
            self.model = (
                Transformer(config, ops_on(device)[1])
                if self.ours
                else PlainTransformer(config, vocab_size=self.vocab_size)
            )
        if way == "ours, fp8":
            multiply_in_fp8(self.model.layers, ops_on(device)[1], device)
        # as training builds them: compiled code casts weights by itself; the peer's is torch's fused one
        copies = low_precision(device, dtype) if self.ours and way != "ours, compiled" else {}
        triton = None if self.ours else False
        self.optimizers = build_optimizers(self.model, optimizer="adamw", lr=1e-4, triton=triton, **copies)
        self.forward: Callable[..., Tensor] = self.model
        if way == "ours, compiled":
            self.forward = torch.compile(self.model)
        elif way == "plain, compiled":
            for block in self.model.layers:
                block.compile()

    def issue(self) -> Tensor:
        return take_step(self.forward, self.inputs, self.targets, self.optimizers, self.dtype)


def measure_steps(
    config: ModelConfig,
    batch_size: int,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    ways: Sequence[str] | None = None,
    seconds: float = 5.0,
    peak_flops: float | None = None,
    ceilings: Ceilings | None = None,
    progress: Callable[[str], object] = lambda way: None,
    failures: dict[str, str] | None = None,
) -> Iterator[StepTime]:
    """Each way's step, about `seconds` of them after the first; a way that this device does not have is left out.

    ways: some of WAYS; the device's DEFAULT when None.  ceilings: of this machine; with them ours is predicted too.
    failures: receives why a way has no time, by its name: a compiler that leaves parts of it to eager PyTorch is such a
    reason. Without it the error is raised.

    Raises ValueError on an unknown way, on no seconds, and on a model that the peer cannot be.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds: expected a finite number > 0, got {seconds}")
    ways = DEFAULT[device.type] if ways is None else ways
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"ways: expected some of {', '.join(WAYS)}, got {unknown[0]!r}")
    flops = [
        e.forward_flops + e.backward_flops
        for e in (
            estimate(config, batch_size=batch_size, context_length=context_length, causal=c) for c in ("exact", "full")
        )
    ]
    if device.type == "cpu":
        keep_freed_memory()  # as in training; the peers have it too
    for way in ways:
        if way == "ours, graphed" and device.type != "cuda":
            continue
        progress(way)
        torch.manual_seed(0)
        tokens = torch.randint(config.vocab_size, (batch_size, context_length + 1), device=device)
        try:
            with no_fallback(), compiled() if way.endswith("compiled") else nullcontext():
                step = _measure(way, config, tokens, dtype, seconds, peak_flops, flops)
        except Exception as error:
            if failures is None:
                raise
            failures[way] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            if ceilings is not None and step.ours:
                predicted = _predicted(way, config, batch_size, context_length, dtype, device, ceilings)
                step = replace(step, predicted_milliseconds=predicted)
            yield step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _predicted(
    way: str,
    config: ModelConfig,
    batch_size: int,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
) -> float | None:
    """Milliseconds of that way; a compiled step and a graph have no host in them."""
    e = estimate(
        config, batch_size=batch_size, context_length=context_length, dtype=str(dtype).removeprefix("torch."),
        ceilings=ceilings, ops=ops_on(device)[0], fp8=way == "ours, fp8",
    )  # fmt: skip
    seconds = eager_seconds(e) if way == "ours, eager" else e.seconds
    return None if seconds is None else seconds * 1e3


def _measure(
    way: str,
    config: ModelConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    seconds: float,
    peak: float | None,
    flops: list[int],
) -> StepTime:
    cuda = tokens.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step = _Step(way, config, tokens, dtype)
    issue = graphed(step.issue) if cuda and way in GPU_ONLY else step.issue
    first_loss = issue().item()
    first = time.perf_counter() - start
    issue().item()  # the moments are there, compiled code is for them too
    whole, host, loss = _timed(issue, cuda, seconds)
    median = statistics.median(whole)
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
    mfus = [f / median / peak if peak else None for f in flops]
    return StepTime(
        name=way, ours=step.ours, vocab_size=step.vocab_size, milliseconds=median * 1e3,
        milliseconds_best=min(whole) * 1e3, milliseconds_worst=max(whole) * 1e3,
        tokens_per_second=step.inputs.numel() / median, host_milliseconds=statistics.median(host) * 1e3,
        peak_bytes=peak_bytes, first_step_seconds=first, mfu=mfus[0], mfu_full=mfus[1],
        first_loss=first_loss, last_loss=loss,
    )  # fmt: skip


def _timed(issue: Callable[[], Tensor], cuda: bool, seconds: float) -> tuple[list[float], list[float], float]:
    """(seconds of each step, seconds until each was issued, the last loss), from 3 to 50 steps.

    On a CPU with a single thread, the time that thread ran.
    """
    now = time.perf_counter if cuda else clock()
    whole: list[float] = []
    host: list[float] = []
    loss = None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    while len(whole) < 3 or (sum(whole) < seconds and len(whole) < 50):
        start = now()
        if cuda:
            events[0].record()
        loss = issue()
        if cuda:
            events[1].record()
        host.append(now() - start)
        if cuda:
            events[1].synchronize()
        whole.append(events[0].elapsed_time(events[1]) / 1e3 if cuda else now() - start)
    assert loss is not None
    return whole, host, loss.item()


def steps_table(title: str, steps: Sequence[StepTime]) -> Table:
    """For the terminal."""
    out = Table(title=title)
    out.add_column("step")
    for column in (
        "vocabulary",
        "predicted",
        "ms",
        "best-worst",
        "tokens/s",
        "MFU",
        "MFU, T^2",
        "host ms",
        "peak GiB",
        "first, s",
    ):
        out.add_column(column, justify="right", no_wrap=True)
    for s in steps:
        out.add_row(
            s.name, f"{s.vocab_size:,}",
            "" if s.predicted_milliseconds is None else f"{s.predicted_milliseconds:,.1f}", f"{s.milliseconds:,.1f}",
            f"{s.milliseconds_best:,.1f}-{s.milliseconds_worst:,.1f}", f"{s.tokens_per_second:,.0f}",
            *("" if share is None else f"{share:.1%}" for share in (s.mfu, s.mfu_full)),
            f"{s.host_milliseconds:,.1f}", "" if s.peak_bytes is None else f"{s.peak_bytes / 2**30:.1f}",
            f"{s.first_step_seconds:.1f}",
        )  # fmt: skip
    return out


def as_results(
    machine: dict[str, Any], title: str, steps: Sequence[StepTime], failures: dict[str, str]
) -> dict[str, Any]:
    """The content of a results file."""
    rows = [asdict(step) for step in steps]
    return {"kind": "steps", "machine": machine, "title": title, "rows": rows, "failures": failures}
