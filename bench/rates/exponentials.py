"""The rate of exponentials, attention's other ceiling: a GPU takes eight times as long for one as for a sum.

torch's own exp reads and writes every number, so that on a GPU memory bounds it. Here a number stays in its register
and goes through x <- 2^-x again and again; the fixed point 0.64 keeps it in range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..measure.clock import best_seconds

BLOCK = 1024  # 8 numbers a thread over 4 warps: enough independent ones to hide the latency of each
PROGRAMS = 132 * 16 * 8  # eight rounds of 16 resident programs on each multiprocessor of the largest GPU known here
STEPS = 2048  # so many that the load and the store around them take no time beside them


@triton.jit
def _exp_kernel(x_ptr, steps, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(x_ptr + at, x)


def iterate(x: Tensor, steps: int) -> None:
    """x <- 2^-x, `steps` times, in place. x: fp32, contiguous, a multiple of BLOCK numbers, where Triton runs."""
    _exp_kernel[(x.numel() // BLOCK,)](x, steps, BLOCK=BLOCK)


def exp_rate(device: torch.device) -> float:
    """Exponentials a second: of numbers in registers on a GPU, of numbers in cache by torch's exp on a CPU."""
    if device.type == "cuda":
        x = torch.rand(PROGRAMS * BLOCK, device=device)
        return x.numel() * STEPS / best_seconds(lambda: iterate(x, STEPS), device)
    x = torch.randn(2**16)
    out = torch.empty_like(x)
    return x.numel() / best_seconds(lambda: torch.exp(x, out=out), device)
