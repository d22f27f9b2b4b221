"""This machine's ceilings, measured in seconds and kept for the estimates: never read from a table of device names.

Three rates make a roofline: products, copies, exponentials. Beside them every kernel that a training step launches is
timed by itself, forward and backward, at a few sizes of its own (bench/rates/kernel_rates.py); no step, layer or model
is timed. What the estimate takes for a kernel at other sizes lies between those points.

All of it has a budget of seconds: the most telling sizes come first (bench/rates/schedule.py), and what is measured is
kept at once, so that an interrupt loses nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from ...kernels import fp8
from ...model.ceilings import Ceilings, Sizes
from ...model.parts import BACKWARD
from ...training.files import write_json
from ...training.throughput import measure_peak_flops
from ..measure.clock import best_seconds
from ..measure.harness import machine
from .exponentials import exp_rate
from .kernel_rates import KERNELS, Rates, grids, has_fp8, host_seconds, kernel_rates
from .schedule import left_out

SECONDS = 30.0  # the budget: with imports and the kernel that is running when it ends, under 45
DTYPES = (torch.bfloat16,)
FP8_SIDE, FP8_SECONDS = 8192, 0.2  # of a product in fp8: its rate is that of measure_peak_flops's largest
# What is asked of kept rates before they are trusted: products, and a kernel that memory bounds. Three probes gave
# 1.02 to 1.07 times the rates kept just before, on a busy machine (2026-11-27).
PROBED, PROBE_SECONDS, BUSY = ("gemm", "rms_norm"), 0.3, 1.15
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far beyond any cache


def _copy_bandwidth(device: torch.device) -> float:
    size = min(COPY_BYTES[device.type], _memory_bytes(device) // 8)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # as it is called: in a CUDA graph the copy engine does it, at two thirds of the rate (H200, 2026-11-27)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, capture=False)


def fp8_flops(device: torch.device) -> dict[str, float]:
    """{"forward", "backward": FLOP/s of a large square product in fp8}, as kernels/fp8.py has each pass's summed."""
    n = FP8_SIDE
    low = [torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
    dy, one = low[0].to(torch.float32).to(torch.float8_e5m2), torch.ones((), device=device)

    def rate(a: torch.Tensor, fast: bool) -> float:
        def call() -> torch.Tensor:
            return fp8.product(a, low[1], one, one, torch.bfloat16, fast=fast)

        return 2 * n**3 / best_seconds(call, device, FP8_SECONDS)

    return {"forward": rate(low[0], fast=True), "backward": rate(dy, fast=False)}


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_ceilings(
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    names: Container[str] = KERNELS,
    seconds: float = SECONDS,
    progress: Callable[[str], object] = lambda what: None,
    keep: Callable[[Ceilings], object] = lambda ceilings: None,
) -> Ceilings:
    """Measure the three rates and those of the named kernels, in about `seconds`; on a GPU the host's part too.

    progress is told what comes next; keep gets what is measured so far, after the three rates and after each kernel.
    Raises ValueError unless seconds > 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected > 0, got {seconds}")
    deadline = time.perf_counter() + seconds
    progress("products, copies, exponentials")
    where = machine(device)
    ceilings = Ceilings(
        gemm_flops={
            _name(dtype): measure_peak_flops(device, dtype, seconds=min(0.5, seconds / 20)) for dtype in dtypes
        },
        copy_bandwidth=_copy_bandwidth(device),
        exp_rate=exp_rate(device),
        device=where["device"],
        date=where["date"],
        versions={key: str(where[key]) for key in ("torch", "triton", "cuda") if where[key]},
        memory_bytes=_memory_bytes(device),
        fp8_flops=fp8_flops(device) if has_fp8(device) else {},
    )
    keep(ceilings)
    for i, dtype in enumerate(dtypes):
        now = time.perf_counter()
        beside = partial(_with_rates, ceilings, _name(dtype))

        def keep_rates(rates: Rates, beside: Callable[[Rates], Ceilings] = beside) -> None:
            keep(beside(rates))

        rates = kernel_rates(
            dtype,
            device,
            names=names,
            deadline=now + max(0.0, deadline - now) / (len(dtypes) - i),
            peak=ceilings.gemm_flops[_name(dtype)],
            progress=progress,
            keep=keep_rates,
        )
        ceilings = beside(rates)
        if device.type == "cuda":
            progress(f"the host's part of each kernel, {_name(dtype)}")
            host = {f"{name} {_name(dtype)}": took for name, took in host_seconds(dtype, device, names).items()}
            ceilings = replace(ceilings, host=ceilings.host | host)
            keep(ceilings)
    return ceilings


def _with_rates(ceilings: Ceilings, dtype: str, rates: Rates) -> Ceilings:
    return replace(ceilings, kernels=ceilings.kernels | {f"{name} {dtype}": rates[name].copy() for name in rates})


def keep_ceilings(
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    names: Container[str] = KERNELS,
    seconds: float = SECONDS,
    progress: Callable[[str], object] = lambda what: None,
) -> Ceilings:
    """measure_ceilings, saved as they come beside what was kept of other dtypes and kernels; returns all of it.

    Until a kernel is done, its earlier rates stand at the sizes that are still to come. Where they cannot be saved,
    standard error says so, once, and they are measured all the same.
    """
    known = load_ceilings(device)
    unsaved: list[str] = []

    def save(ceilings: Ceilings) -> None:
        try:
            save_ceilings(ceilings, device)
        except OSError as error:
            if not unsaved:
                why = f"{error}; set XDG_CACHE_HOME to a folder that can be written"
                print(f"rooflight: this machine's rates are not kept for the next run: {why}", file=sys.stderr)
            unsaved.append(str(error))

    def keep(measured: Ceilings) -> None:
        earlier = known.kernels if known else {}
        kernels = {name: earlier.get(name, {}) | points for name, points in measured.kernels.items()}
        save(_beside(known, replace(measured, kernels=kernels)))

    measured = measure_ceilings(device, dtypes=dtypes, names=names, seconds=seconds, progress=progress, keep=keep)
    ceilings = _beside(known, measured)
    save(ceilings)
    return ceilings


def _beside(known: Ceilings | None, measured: Ceilings) -> Ceilings:
    if known is None:
        return measured
    peaks, kernels = known.gemm_flops | measured.gemm_flops, known.kernels | measured.kernels
    host, low = known.host | measured.host, known.fp8_flops | measured.fp8_flops
    return replace(measured, gemm_flops=peaks, kernels=kernels, host=host, fp8_flops=low)


def sizes_left_out(ceilings: Ceilings, device: torch.device) -> dict[str, list[Sizes]]:
    """{"gemm bfloat16": sizes without a rate} for each dtype with a peak: time was up, or memory did not suffice."""
    wanted = {
        f"{kernel} {dtype}": grid
        for dtype in ceilings.gemm_flops
        for kernel, grid in grids(getattr(torch, dtype), device).items()
    }
    return left_out(wanted, ceilings.kernels)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ceilings_table(ceilings: Ceilings) -> Table:
    """For rich.print: the three rates, then each kernel's slowest and fastest."""
    table = Table(title=f"{ceilings.device}, {ceilings.date}")
    table.add_column("ceiling")
    for column in ("rate, or lowest", "highest", "at"):
        table.add_column(column, justify="right")
    for dtype, rate in ceilings.gemm_flops.items():
        table.add_row(f"products, {dtype}", f"{rate / 1e12:.3f} TFLOP/s")
    for pass_, rate in ceilings.fp8_flops.items():
        table.add_row(f"products, fp8 {pass_}", f"{rate / 1e12:.3f} TFLOP/s")
    table.add_row("copies", f"{ceilings.copy_bandwidth / 1e9:.1f} GB/s")
    if ceilings.exp_rate is not None:
        table.add_row("exponentials", f"{ceilings.exp_rate / 1e9:.2f} G/s")
    table.add_section()
    for kernel, points in ceilings.kernels.items():
        unit = KERNELS[kernel.rpartition(" ")[0].removesuffix(BACKWARD)].unit
        best = max(points, key=points.__getitem__)
        table.add_row(
            kernel, *(f"{rate / 1e9:,.2f} G {unit}/s" for rate in (min(points.values()), points[best])), _sizes(best)
        )
    return table


def left_out_lines(ceilings: Ceilings, device: torch.device) -> list[str]:
    """For each kernel that lacks sizes of its grid, how many and the first few."""
    lines = []
    for kernel, sizes in sizes_left_out(ceilings, device).items():
        named = ", ".join(map(_sizes, sizes[:4]))
        first = f"{named}, and {len(sizes) - 4} more" if len(sizes) > 4 else named
        lines.append(f"left out: {kernel}, {len(sizes)} sizes ({first})")
    return lines


def _sizes(sizes: Sizes) -> str:
    return " x ".join(f"{size:,}" for size in sizes)


def cache_folder() -> Path:
    """The user's, XDG_CACHE_HOME/rooflight or ~/.cache/rooflight; OSError for a user without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "rooflight"
    try:
        return Path.home() / ".cache" / "rooflight"
    except RuntimeError as error:  # a container's user that no password file knows
        raise OSError(str(error)) from None


def path_of(device: torch.device) -> Path:
    """One file for each kind of device; a CPU's rates depend on the threads that torch may use."""
    kind = device.type if device.type == "cuda" else f"{device.type}-{torch.get_num_threads()}"
    return cache_folder() / f"ceilings-{kind}.json"


def save_ceilings(ceilings: Ceilings, device: torch.device) -> Path:
    """Keep them for load_ceilings, one file per kind of device in the user's cache folder; returns the file.

    Raises OSError where that cannot be written.
    """
    write_json(path_of(device), ceilings.to_dict())
    return path_of(device)


def load_ceilings(device: torch.device) -> Ceilings | None:
    """What was last measured on this very device with these versions; None when nothing was, or its file is broken."""
    try:
        ceilings = Ceilings.from_dict(json.loads(path_of(device).read_bytes()))
    except (OSError, ValueError):
        return None
    here = machine(device)
    same = ceilings.device == here["device"] and ceilings.versions.get("torch") == here["torch"]
    return ceilings if same else None


def require_ceilings(device: torch.device) -> Ceilings:
    """load_ceilings; ValueError when nothing was measured here."""
    ceilings = load_ceilings(device)
    if ceilings is None:
        raise ValueError(
            f"no ceilings measured on this {device.type} with torch {torch.__version__}: run `rooflight bench ceilings`"
        )
    return ceilings


def unmeasured(ceilings: Ceilings, device: torch.device, dtype: str) -> list[str]:
    """The kernels without any rate in that dtype: an interrupt came before them. Their roof stands in."""
    return [name for name in grids(getattr(torch, dtype), device) if f"{name} {dtype}" not in ceilings.kernels]


def ceilings_of(device: torch.device, dtype: str, seconds: float = SECONDS) -> Ceilings:
    """The ones kept from an earlier measurement on this machine; what is not among them is measured now and kept.

    So is all of that dtype where the machine is faster now than what is kept says: it was taken in a busy hour.
    """
    known, dtypes = load_ceilings(device), (getattr(torch, dtype),)
    if known is None or dtype not in known.gemm_flops or faster_now(known, device, dtype) > BUSY:
        return keep_ceilings(device, dtypes=dtypes, seconds=seconds)
    names = unmeasured(known, device, dtype)
    return keep_ceilings(device, dtypes=dtypes, names=names, seconds=seconds) if names else known


def faster_now(known: Ceilings, device: torch.device, dtype: str) -> float:
    """How many times as fast as they are kept to be a few kernels are now, in the median of their sizes.

    They are measured as they were then. 1 where none of them is kept; a machine that is busy now has less than 1.
    """
    kept = {name: known.kernels.get(f"{name} {dtype}", {}) for name in (*PROBED, *(n + BACKWARD for n in PROBED))}
    if not any(kept.values()):
        return 1.0
    now = kernel_rates(
        getattr(torch, dtype), device, names=PROBED, deadline=time.perf_counter() + PROBE_SECONDS,
        peak=known.gemm_flops[dtype],
    )  # fmt: skip
    ratios = [rate / kept[name][at] for name, points in now.items() for at, rate in points.items() if at in kept[name]]
    return statistics.median(ratios) if ratios else 1.0
