"""The tiles that ship: chosen by head size, dtype and the GPU's shared memory, with no autotuning at run time.

Chosen from ahead-of-time compiles for sm_80, sm_90, sm_100 and gfx942 (triton 3.6 and 3.7.1, causal, bf16 and fp32):
tiles that fit in shared memory and spill no register and, of those, the ones whose inner loop has the best bound
(docs/artifacts.md). tests/kernels compiles every one again. Nothing here was timed on hardware: a user's own table
(tuned.py, written by `rooflight bench tune`) goes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton

from ...dispatch import INTERPRETED
from ..tuned import Tile, architecture, table_of

__all__ = ["Tile", "block_d", "candidates", "choose", "forget", "use", "version"]

# Shared memory that one block can use, bytes: sm_90 and sm_100; sm_80; sm_86, sm_89 and sm_120; CDNA and older.
HOPPER, AMPERE, CONSUMER, LEAST = 227 << 10, 163 << 10, 99 << 10, 0

# By kernel and bytes of an element; then by padded head size; then by shared memory, the first that suffices.
_TILES: dict[tuple[str, int], dict[int, dict[int, Tile]]] = {
    ("fwd", 2): {
        # On sm_80 four warps of 32 rows read a block of keys from shared memory half as often as eight of 16.
        64: {HOPPER: Tile(128, 128, 8, 3), CONSUMER: Tile(128, 64, 4, 3), LEAST: Tile(128, 64, 4, 2)},
        128: {HOPPER: Tile(128, 64, 8, 3), CONSUMER: Tile(128, 32, 8, 2), LEAST: Tile(64, 64, 4, 2)},
        256: {
            HOPPER: Tile(128, 32, 8, 2),
            AMPERE: Tile(64, 32, 8, 3),
            CONSUMER: Tile(64, 32, 8, 2),
            LEAST: Tile(64, 32, 4, 2),
        },
        512: {CONSUMER: Tile(32, 32, 8, 1), LEAST: Tile(16, 32, 4, 1)},
    },
    ("dkdv", 2): {
        64: {HOPPER: Tile(64, 128, 8, 2), CONSUMER: Tile(32, 128, 8, 2), LEAST: Tile(64, 64, 4, 2)},
        128: {HOPPER: Tile(32, 128, 8, 3), CONSUMER: Tile(32, 64, 8, 2), LEAST: Tile(32, 64, 4, 1)},
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

# Instead, on some architectures. sm_100 accumulates products in tensor memory and reads them back, which takes more
# registers at once; they fill its tensor core from 128 rows on, which in dK/dV are the keys.
_OWN: dict[str, dict[tuple[str, int], dict[int, Tile]]] = {
    "sm_10": {
        ("fwd", 2): {64: Tile(128, 64, 8, 3)},
        ("dkdv", 2): {64: Tile(64, 128, 8, 1), 128: Tile(32, 128, 8, 1)},
    },
    "sm_12": {("fwd", 2): {64: Tile(128, 64, 8, 3)}},
}


def block_d(head_dim: int) -> int:
    """The power of two, at least 16 (the least that tl.dot takes), that a head is padded to in registers."""
    return max(16, triton.next_power_of_2(head_dim))


@cache
def _shared_memory(device: torch.device) -> int:
    index = 0 if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


_asked: dict[str, Tile] = {}
_version = 0


def version() -> int:
    """Another number whenever `choose` may answer otherwise than before."""
    return _version


@contextmanager
def use(kernel: str, tile: Tile) -> Iterator[None]:
    """Within the block `kernel` ("fwd", "dkdv" or "dq") is launched with this tile; for the whole process."""
    global _version
    before = _asked.get(kernel)
    _asked[kernel] = tile
    _version += 1
    try:
        yield
    finally:
        _version += 1
        del _asked[kernel]
        if before is not None:
            _asked[kernel] = before


def choose(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `kernel`: "fwd", "delta", "dkdv" or "dq"."""
    return _asked.get(kernel) or _chosen(kernel, head_dim, dtype, device)


@cache
def _chosen(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    padded = block_d(head_dim)
    if kernel == "delta":
        return Tile(max(16, 8192 // padded), 16)  # 64 elements of a tile for each thread
    if INTERPRETED:
        return Tile(64, 64)
    mine = table_of(device).tiles.get((kernel, str(dtype).removeprefix("torch."), head_dim))
    return mine or shipped(kernel, head_dim, dtype, device)


def forget() -> None:
    """Read the user's table anew at the next launch."""
    global _version
    _version += 1
    table_of.cache_clear()
    _chosen.cache_clear()


def shipped(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of "fwd", "dkdv" or "dq" that ships. Raises ValueError where none fits."""
    padded = max(64, block_d(head_dim))
    own = _OWN.get(architecture()[:-1], {}).get((kernel, dtype.itemsize), {})
    if padded in own:
        return own[padded]
    rows = _TILES[kernel, dtype.itemsize][padded]
    available = _shared_memory(device)
    for least, tile in rows.items():
        if available >= least:
            return tile
    raise ValueError(
        f"q: the backward of head size {head_dim} in {dtype} does not fit {available >> 10} KiB of shared memory"
    )


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tile]:
    """What `rooflight bench tune` times: the tile that ships, then its neighbours, whether they fit or not."""
    first = shipped(kernel, head_dim, dtype, device)
    blocks = (16, 32, 64, 128) if dtype.itemsize > 2 else (32, 64, 128)
    near = [
        Tile(block_m, block_n, num_warps, num_stages)
        for block_m in blocks
        for block_n in blocks
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3)
        if first.block_m // 2 <= block_m <= 2 * first.block_m
        and first.block_n // 2 <= block_n <= 2 * first.block_n
        and first.block_m * first.block_n // 2 <= block_m * block_n <= 2 * first.block_m * first.block_n
    ]
    return [first, *(tile for tile in near if tile != first)]
