"""RMSNorm's tiles: rows and columns of a program, its warps and stages, each with what chose it (bench/NOTES.md).

`use` puts another one in a tile's place: `python -m rooflight.bench.measure.norms` times those that may be faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import triton

from .rows import is_blackwell, most_warps

__all__ = [
    "BACKWARD_LONGEST", "BACKWARD_TILE", "FORWARD_BYTES", "FORWARD_TILE", "LOOP_TILE", "LOOP_WARPS", "REDUCE_ROWS",
    "REDUCE_WARPS", "RESIDENT_WARPS", "Tile", "backward_tile", "forward_tile", "reduced_columns", "use",
]  # fmt: skip

# Elements of a tile of short rows: 16 a thread over 4 warps, two 16-byte loads of a 2-byte type.
SHORT_TILE = 2048
# The longest row that one tile of the forward holds, the largest that compiles for sm_80 and sm_90 without a spill
# (docs/artifacts.md); longer rows are looped over.
FORWARD_TILE, LOOP_TILE, LOOP_WARPS = 32768, 4096, 16
# Bytes of x in the tiles of the forward's resident programs on one multiprocessor: 32 warps at up to 64 registers.
FORWARD_BYTES = 32768
# The backward's tile, 16 elements a thread. Its program fills a multiprocessor: at up to 128 registers a thread no
# second is resident, and one that started late would end late, as each has the same share of the rows. A tile of h and
# dy is 32 KiB on its way; a multiprocessor of an H200 needs 17 (bench/NOTES.md).
BACKWARD_TILE, RESIDENT_WARPS = 8192, 16
# The longest row that one tile of the backward holds, of a 2-byte type: 16 elements a thread again, 32 warps.
BACKWARD_LONGEST = 16384
# Rows of partial sums of dw that one program of the reduction reads at once.
REDUCE_ROWS, REDUCE_WARPS = 256, 8


class Tile(NamedTuple):
    """What a program works on. stages: of its loop over tiles; one: a program a tile, in the forward.

    scale_first, once: of the forward's program a tile, whether it fetches the weight before its rows, not after their
    sum, and whether it marks the rows as read once.  resident: warps of the backward's programs on a multiprocessor.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    scale_first: bool = False
    once: bool = True
    resident: int = RESIDENT_WARPS


_asked: dict[str, Tile] = {}  # by pass


@contextmanager
def use(pass_: str, tile: Tile) -> Iterator[None]:
    """Within the block a pass ("forward" or "backward") has this tile whatever its rows; for the whole process.

    A row must fit the tile. Raises ValueError on another pass.
    """
    if pass_ not in ("forward", "backward"):
        raise ValueError(f"pass_: expected forward or backward, got {pass_!r}")
    before = _asked.get(pass_)
    _asked[pass_] = tile
    try:
        yield
    finally:
        _asked.pop(pass_)
        if before is not None:
            _asked[pass_] = before


def asked(pass_: str) -> Tile | None:
    """The tile that `use` gave a pass."""
    return _asked.get(pass_)


def forward_tile(N: int, element_size: int, residual: bool) -> Tile:
    """The forward's tile for rows of N elements of which the widest tensor has so many bytes each."""
    return _asked["forward"] if "forward" in _asked else _forward_tile(N, element_size, residual, most_warps())


@cache
def _forward_tile(N: int, element_size: int, residual: bool, most: int) -> Tile:
    """most: warps of a program."""
    columns = max(triton.next_power_of_2(N), 16)
    if columns > (FORWARD_TILE // 2 if residual else FORWARD_TILE):  # a residual is a second row in registers
        return Tile(1, LOOP_TILE, LOOP_WARPS, 1)
    rows = max(1, SHORT_TILE // columns)
    warps = min(max(rows * columns // 512, 4), most)
    if most < 32 or columns * element_size > FORWARD_BYTES:
        return Tile(rows, columns, warps, 1)
    return Tile(rows, columns, warps, 2 if residual or element_size > 2 else 3)


def backward_tile(M: int, N: int, processors: int, element_size: int, residual: bool) -> Tile:
    """The backward's for M rows of N, as forward_tile."""
    if "backward" in _asked:
        return _asked["backward"]
    many = processors * BACKWARD_TILE <= M * N
    return _backward_tile(N, many, element_size, residual, most_warps(), is_blackwell())


@cache
def _backward_tile(N: int, many: bool, element_size: int, residual: bool, most: int, blackwell: bool) -> Tile:
    """many: elements for a whole tile on every multiprocessor.  most: warps of a program."""
    two_bytes, amd = element_size <= 2, most < 32
    columns = max(triton.next_power_of_2(N), 16)
    fits = two_bytes and not amd and not (residual and blackwell)  # where it compiles without a spill
    if columns > (BACKWARD_LONGEST if fits else BACKWARD_TILE):
        columns = BACKWARD_TILE
    rows = max(1, (BACKWARD_TILE if many else SHORT_TILE) // columns)
    warps = min(max(rows * columns // 512, 4), most)
    # The buffers fit the shared memory of every GPU, with a residual 96 KiB of 99, and of AMD's 64 KiB a half.
    stages = (2 if two_bytes else 1) if amd else 3 if two_bytes and columns <= BACKWARD_TILE else 2
    return Tile(rows, columns, warps, stages)


@cache
def reduced_columns(N: int) -> int:
    """Columns of dw that one program sums: from a sector of memory, 32 bytes, to a line, for about 256 programs."""
    return min(32, max(8, triton.next_power_of_2(N) // 256))
