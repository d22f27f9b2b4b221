"""Measured peak rate, model FLOPs utilisation (MFU), peak memory, and memory that stays."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from functools import cache
from pathlib import Path

import torch

# Square GEMMs. On two Zen 4 cores, 512 and up reach one rate (bf16 about 400 GFLOP/s, 2026-11); on CUDA they must fill
# every SM many times over.
_CPU_SIZES = (512, 1024)
_CUDA_SIZES = (4096, 8192)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def measure_peak_flops(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, *, seconds: float = 0.5
) -> float:
    """The best rate, in FLOP/s, of an n x n x n matrix product (2 n^3 FLOPs) on `device` in `dtype`.

    Measured for about `seconds` in all, after a warm-up; the best of a few sizes and every repetition counts, since a
    peak is what the machine can do. On CUDA the products are timed by events.
    Raises ValueError unless seconds > 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    device = torch.device(device)
    sizes = _CUDA_SIZES if device.type == "cuda" else _CPU_SIZES
    return max(_gemm_rate(device, dtype, size, seconds / len(sizes)) for size in sizes)


@torch.no_grad()
def _gemm_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    c = torch.empty_like(a)
    torch.matmul(a, b, out=c)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:
        best = min(best, _time_cuda(a, b, c) if device.type == "cuda" else _time_cpu(a, b, c))
    return 2 * size**3 / best


def _time_cpu(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.matmul(a, b, out=c)
    return time.perf_counter() - start


def _time_cuda(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, repeats: int = 8) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        torch.matmul(a, b, out=c)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def mfu(flops_per_step: float, step_seconds: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of the peak that the model's own FLOPs, forward and backward, make use of.

    Recomputation and the optimizer are not the model's (Chowdhery et al. 2022, appendix B).
    """
    return flops_per_step / step_seconds / peak_flops


class PeakMemory:
    """The most memory in use since construction: on CUDA what torch allocated there, on the CPU resident memory of the
    process beyond what it held at construction (Linux; elsewhere, growth of the process's peak).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew (man 5 proc)
            self._before = _proc_status("VmRSS")
        except OSError:
            self._before = _resident_peak()

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _resident_peak() - self._before)  # the kernel's counts lag a few pages


def device_memory(device: torch.device) -> int:
    """Bytes that this process may hold: on CUDA the free ones and its own; on a CPU the machine's with its swap, or
    the control group's limit (Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        match = re.search(r"^SwapTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        size += int(match[1]) * 1024 if match else 0
    except OSError:
        pass
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # version 2, 1
        try:
            size = min(size, int(Path(limit).read_text()))
        except (OSError, ValueError):  # "max"
            continue
    return size


def _resident_peak() -> int:
    try:
        return _proc_status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _proc_status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(match[1]) * 1024


@cache
def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed: on a CPU the next operation takes what the last one left.

    By itself it gives more than 64 MiB of it back to the system, which a step of training faults in again, page after
    page: 6 to 11 % of the step of the demo's model (one thread, fp32, 2026-11-27), half the time of a norm's backward.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # where its own adaptation ends
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
