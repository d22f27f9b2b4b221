"""This machine's ceilings, measured in seconds and kept for the estimates: never read from a table of device names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import flash_attention
from ..kernels.cost import flash_attention_cost
from ..model.ceilings import Ceilings
from ..training.throughput import measure_peak_flops
from .harness import machine, write_json

ATTENTION_LENGTHS = {"cpu": (128, 256, 512, 1024), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}
# (batch x heads x length) of the attention measurement: enough to fill the device, small enough to be quick
ATTENTION_TOKENS = {"cpu": 4096, "cuda": 16384 * 16}
ATTENTION_HEAD_DIM = {"cpu": 64, "cuda": 128}


def _best_seconds(call: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """The shortest time of the call within a budget: a ceiling is what the machine can do."""
    call()
    if device.type == "cuda":
        import triton

        return triton.testing.do_bench(call, return_mode="min") / 1e3
    best, deadline = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _copy_bandwidth(device: torch.device) -> float:
    size = 2**32 if device.type == "cuda" else 2**28  # far beyond any cache
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _exp_rate(device: torch.device) -> float | None:
    """Exponentials a second on data in cache; None on a GPU, where torch's own exp is bound by memory instead."""
    if device.type == "cuda":
        return None
    x = torch.randn(2**16)
    out = torch.empty_like(x)
    return x.numel() / _best_seconds(lambda: torch.exp(x, out=out), device)


def _attention_seconds(BH: int, T: int, D: int, device: torch.device) -> tuple[float, float]:
    """(forward, backward) seconds of the public function on causal attention in bf16."""
    q, k, v = (torch.randn(1, BH, T, D, device=device).to(torch.bfloat16).requires_grad_() for _ in range(3))
    out: Tensor = flash_attention(q, k, v)  # type: ignore[assignment]
    upstream = torch.randn_like(out)
    backward = _best_seconds(lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True), device)
    with torch.no_grad():
        return _best_seconds(lambda: flash_attention(q, k, v), device), backward


def _attention_rates(device: torch.device) -> tuple[dict[int, float], dict[int, float]]:
    """FLOP/s of attention, forward and backward, at each length."""
    rates: tuple[dict[int, float], dict[int, float]] = ({}, {})
    D = ATTENTION_HEAD_DIM[device.type]
    for T in ATTENTION_LENGTHS[device.type]:
        BH = max(1, ATTENTION_TOKENS[device.type] // T)
        for backward, seconds in enumerate(_attention_seconds(BH, T, D, device)):
            cost = flash_attention_cost(1, BH, BH, T, T, D, backward=bool(backward))
            rates[backward][T] = cost.flops / seconds
    return rates


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure every ceiling; about ten seconds on two CPU cores, less than a minute on a GPU."""
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    forward, backward = _attention_rates(device)
    where = machine(device)
    return Ceilings(
        gemm_flops={str(dtype).removeprefix("torch."): measure_peak_flops(device, dtype) for dtype in dtypes},
        copy_bandwidth=_copy_bandwidth(device),
        exp_rate=_exp_rate(device),
        attention_flops=forward,
        attention_backward_flops=backward,
        device=where["device"],
        date=where["date"],
        versions={key: str(where[key]) for key in ("torch", "triton", "cuda") if where[key]},
        memory_bytes=_memory_bytes(device),
    )


def _path(device: torch.device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "rooflight" / f"ceilings-{device.type}.json"


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
