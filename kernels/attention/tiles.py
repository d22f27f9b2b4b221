"""The tiles that ship: chosen by head size, dtype and the GPU's shared memory, with no autotuning at run time.

Chosen from ahead-of-time compiles for sm_80, sm_90 and gfx942 (triton 3.7.1, causal, bf16 and fp32): the largest tiles
that fit in shared memory and spill no register, or next to none. tests/kernels compiles every one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from ..dispatch import INTERPRETED

__all__ = ["Tile", "block_d", "choose"]


@dataclass(frozen=True)
class Tile:
    """BLOCK_M queries by BLOCK_N keys, and how the program is compiled."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


# Shared memory that one block can use, bytes: sm_90 and sm_100; sm_80; sm_86, sm_89 and sm_120; CDNA and older.
HOPPER, AMPERE, CONSUMER, LEAST = 227 << 10, 163 << 10, 99 << 10, 0

# By kernel and bytes of an element; then by padded head size; then by shared memory, the first that suffices.
_TILES: dict[tuple[str, int], dict[int, dict[int, Tile]]] = {
    ("fwd", 2): {
        64: {CONSUMER: Tile(128, 128, 8, 3), LEAST: Tile(128, 64, 4, 2)},
        128: {HOPPER: Tile(128, 64, 8, 3), CONSUMER: Tile(128, 32, 8, 2), LEAST: Tile(64, 64, 4, 2)},
        256: {
            HOPPER: Tile(128, 32, 8, 2),
            AMPERE: Tile(64, 64, 8, 2),
            CONSUMER: Tile(64, 32, 8, 2),
            LEAST: Tile(64, 32, 4, 2),
        },
        512: {CONSUMER: Tile(32, 32, 8, 1), LEAST: Tile(16, 32, 4, 1)},
    },
    ("dkdv", 2): {
        64: {HOPPER: Tile(64, 128, 8, 2), CONSUMER: Tile(32, 128, 8, 2), LEAST: Tile(64, 64, 4, 2)},
        128: {HOPPER: Tile(32, 128, 8, 2), CONSUMER: Tile(32, 64, 8, 2), LEAST: Tile(32, 64, 4, 1)},
        256: {CONSUMER: Tile(32, 32, 8, 1), LEAST: Tile(16, 32, 4, 1)},
        512: {CONSUMER: Tile(16, 16, 8, 1), LEAST: Tile(16, 16, 4, 1)},
    },
    ("dq", 2): {
        64: {LEAST: Tile(128, 64, 8, 2)},
        128: {HOPPER: Tile(128, 64, 8, 2), CONSUMER: Tile(64, 64, 8, 2), LEAST: Tile(64, 32, 4, 2)},
        256: {HOPPER: Tile(64, 32, 8, 2), CONSUMER: Tile(64, 32, 8, 1), LEAST: Tile(32, 32, 4, 1)},
        512: {CONSUMER: Tile(16, 32, 8, 1), LEAST: Tile(16, 16, 4, 1)},
    },
    ("fwd", 4): {
        64: {LEAST: Tile(64, 16, 8, 1)},
        128: {LEAST: Tile(32, 16, 8, 1)},
        256: {LEAST: Tile(32, 16, 8, 1)},
        512: {LEAST: Tile(16, 16, 8, 1)},
    },
    ("dkdv", 4): {
        64: {LEAST: Tile(16, 32, 4, 1)},
        128: {LEAST: Tile(16, 16, 8, 1)},
        256: {LEAST: Tile(16, 16, 8, 1)},
        512: {AMPERE: Tile(16, 16, 8, 1)},
    },
    ("dq", 4): {
        64: {LEAST: Tile(32, 16, 4, 1)},
        128: {LEAST: Tile(16, 16, 8, 1)},
        256: {LEAST: Tile(16, 16, 8, 1)},
        512: {AMPERE: Tile(16, 16, 8, 1)},
    },
}


def block_d(head_dim: int) -> int:
    """The power of two, at least 16 (the least that tl.dot takes), that a head is padded to in registers."""
    return max(16, triton.next_power_of_2(head_dim))


@cache
def _shared_memory(device: torch.device) -> int:
    index = 0 if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@cache
def choose(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `kernel`: "fwd", "delta", "dkdv" or "dq"."""
    padded = block_d(head_dim)
    if kernel == "delta":
        return Tile(max(16, 8192 // padded), 16)  # 64 elements of a tile for each thread
    if INTERPRETED:
        return Tile(64, 64)
    rows = _TILES[kernel, dtype.itemsize][max(64, padded)]
    available = _shared_memory(device)
    for least, tile in rows.items():
        if available >= least:
            return tile
    raise ValueError(
        f"q: the backward of head size {head_dim} in {dtype} does not fit {available >> 10} KiB of shared memory"
    )
