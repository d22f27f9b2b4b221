"""Rows of strided tensors: how the row-wise kernels address (..., N) without copying it.

A row layout is (n1, n2, s0, s1, s2, sn): row r of the flattened leading dimensions starts at
(r / n2 / n1) s0 + (r / n2 mod n1) s1 + (r mod n2) s2, and its elements lie sn apart. Leading dimensions that merge to
one have n1 = n2 = 1, which Triton compiles as constants, so that the divisions vanish.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import INTERPRETED

__all__ = ["Layout", "is_blackwell", "most_warps", "multiprocessors", "row_layout", "statistics", "tile_offsets"]

Layout = tuple[int, int, int, int, int, int]


@triton.jit
def tile_offsets(row, layout, cols):
    """64-bit element offsets (ROWS, BLOCK_N) of the given rows and columns."""
    i2 = row % layout[1]
    outer = row // layout[1]
    start = (outer // layout[0]).to(tl.int64) * layout[2] + (outer % layout[0]).to(tl.int64) * layout[3]
    start += i2.to(tl.int64) * layout[4]
    return start[:, None] + cols.to(tl.int64)[None, :] * layout[5]


def row_layout(x: Tensor) -> tuple[Tensor, Layout]:
    """x (..., N) and its row layout; leading dimensions that do not merge to three or fewer are copied together."""
    N = x.shape[-1]
    if x.is_contiguous():
        return x, (1, 1, N, 0, 0, 1)
    groups: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 3:
        return x.contiguous(), (1, 1, N, 0, 0, 1)
    (_, s0), (n1, s1), (n2, s2) = groups + [(1, 0)] * (3 - len(groups))
    return x, (n1, n2, s0, s1, s2, x.stride(-1))


def statistics(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """What sums and statistics are kept in: fp32, or fp64 for fp64 (interpreted only: it is there for gradcheck)."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 for the interpreter: few programs, yet more than one partial sum."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def _target_of(device: int) -> Any:
    return triton.runtime.driver.active.get_current_target()


def _target() -> Any:
    """What Triton compiles for on the current GPU; asked once of each."""
    return _target_of(triton.runtime.driver.active.get_current_device())


def most_warps() -> int:
    """Warps of the largest block on the current GPU, 1024 threads: 32 of 32 lanes, or 16 of AMD's 64."""
    return 32 if INTERPRETED else 1024 // _target().warp_size


def is_blackwell() -> bool:
    """Whether the current GPU is of compute capability 10 or later."""
    return not INTERPRETED and most_warps() == 32 and _target().arch >= 100
