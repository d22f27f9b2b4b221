"""This machine's ceilings, measured in seconds and kept for the estimates: never read from a table of device names.

Three rates make a roofline: products, copies, exponentials. Beside them every kernel that a training step launches is
timed by itself, forward and backward, at a few sizes of its own (bench/rates/kernel_rates.py); no step, layer or model
is timed. What the estimate takes for a kernel at other sizes lies between those points.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from ...model.ceilings import Ceilings, Sizes
from ...model.parts import BACKWARD
from ...training.files import write_json
from ...training.throughput import measure_peak_flops
from ..measure.clock import best_seconds
from ..measure.harness import machine
from .exponentials import exp_rate
from .kernel_rates import KERNELS, kernel_rates

DTYPES = (torch.float32, torch.bfloat16)


def _copy_bandwidth(device: torch.device) -> float:
    size = 2**32 if device.type == "cuda" else 2**28  # far beyond any cache
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_ceilings(
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    progress: Callable[[str], object] = lambda what: None,
) -> Ceilings:
    """Measure every ceiling, in less than a minute; progress is told what comes next."""
    progress("products, copies, exponentials")
    peaks = {_name(dtype): measure_peak_flops(device, dtype) for dtype in dtypes}
    where = machine(device)
    return Ceilings(
        gemm_flops=peaks,
        copy_bandwidth=_copy_bandwidth(device),
        exp_rate=exp_rate(device),
        kernels={
            f"{kernel} {_name(dtype)}": rates
            for dtype in dtypes
            for kernel, rates in kernel_rates(dtype, device, progress=progress).items()
        },
        device=where["device"],
        date=where["date"],
        versions={key: str(where[key]) for key in ("torch", "triton", "cuda") if where[key]},
        memory_bytes=_memory_bytes(device),
    )


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


def _sizes(sizes: Sizes) -> str:
    return " x ".join(f"{size:,}" for size in sizes)


def _path(device: torch.device) -> Path:
    """One file for each kind of device; a CPU's rates depend on the threads that torch may use."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = device.type if device.type == "cuda" else f"{device.type}-{torch.get_num_threads()}"
    return root / "rooflight" / f"ceilings-{kind}.json"


def save_ceilings(ceilings: Ceilings, device: torch.device) -> Path:
    """Keep them for load_ceilings, one file per kind of device in the user's cache folder; returns the file."""
    write_json(_path(device), ceilings.to_dict())
    return _path(device)


def load_ceilings(device: torch.device) -> Ceilings | None:
    """What was last measured on this very device with these versions; None when nothing was."""
    try:
        ceilings = Ceilings.from_dict(json.loads(_path(device).read_text()))
    except (FileNotFoundError, json.JSONDecodeError, ValueError):
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


def ceilings_of(device: torch.device, dtype: str) -> Ceilings:
    """The ones kept from an earlier measurement on this machine; what is not among them is measured now and kept."""
    known = load_ceilings(device)
    if known is not None and dtype in known.gemm_flops:
        return known
    measured = measure_ceilings(device, dtypes=(getattr(torch, dtype),))
    if known is not None:
        peaks, kernels = known.gemm_flops | measured.gemm_flops, known.kernels | measured.kernels
        measured = replace(measured, gemm_flops=peaks, kernels=kernels)
    save_ceilings(measured, device)
    return measured
