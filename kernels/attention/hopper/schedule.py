"""Which program computes which tile of the Hopper forward, and when: the schedule, apart from the kernel that walks it.

Tiles are numbered by `tile_of` (blocks.py): heads in sections whose keys and values stay in the L2 cache together, in a
section the tiles with the most keys first. A schedule says how programs take them:

    TILE      a program for each tile, in that order; the hardware starts one whenever another has ended
    STATIC    a program for each multiprocessor, which takes one tile of every round of `n_program`, back and forth:
              in 3 programs tiles 0 1 2, then 5 4 3, then 6 7 8, so that no program always has the longest
    DYNAMIC   a program for each multiprocessor, which takes the next tile when it has started the last loads of its own

Programs of the last two go on: the queries and first keys of their next tile load while they finish this one.
Only the producer knows of any of this; it tells the consumers where each tile stands (loads.py).

The number of the next tile is an atomic counter. It must be zero when a launch begins, and the launch itself leaves it
so: a program adds to it until it gets no tile, which makes one addition for each tile, and who made the last resets it.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import gl, gluon

__all__ = [
    "CHOICES",
    "DYNAMIC",
    "SCHEDULES",
    "STATIC",
    "TILE",
    "Choice",
    "Schedule",
    "choose",
    "next_tile",
    "order",
    "section_heads",
    "static_round",
    "tile_counter",
]

# Keys and values of the heads that run together, by head size. The L2 cache has 50 MB, for all that passes through.
# Measured, TFLOP/s with 8, 16, 32, 64 MB (NVIDIA H200, 2026-11-27, bf16, causal): head size 128, T = 8192: 699, 697,
# 695, 682; T = 2048: 577, 571, 570, 541; head size 64, T = 8192: 449, 451, 454, 450.
SECTION_BYTES = {64: 32 << 20, 128: 8 << 20, 256: 8 << 20}

COUNTERS = 4096  # launches of a process that may be under way before a counter is used again


class Schedule(NamedTuple):
    """How programs take tiles: kind "tile", "static" or "dynamic".  n_program: at most; None: one a multiprocessor."""

    kind: str
    n_program: int | None = None

    def programs(self, n_tile: int, device: torch.device) -> int:
        """How many programs compute n_tile tiles."""
        if self.kind == "tile":
            return n_tile
        return min(n_tile, self.n_program or multiprocessors(device))


TILE, STATIC, DYNAMIC = SCHEDULES = (Schedule("tile"), Schedule("static"), Schedule("dynamic"))


class Choice(NamedTuple):
    """What more tiles than multiprocessors take, and what chose it."""

    schedule: Schedule
    why: str


# By head size. Measured: TFLOP/s, NVIDIA H200, 2026-11-27, torch 2.11, triton 3.6, bf16, causal, cold L2.
CHOICES = {
    64: Choice(DYNAMIC, "T = 8192, 2048, 1024, 512: 454, 376, 312, 223; a program a tile: 423, 306, 229, 146"),
    # dynamic was measured at 695, 570, 459, 315 here, but of its results hardware has seen too few: TILE's were right
    128: Choice(TILE, "T = 8192, 2048, 1024, 512: 671, 505, 371, 240; results checked on hardware"),
    256: Choice(TILE, "not measured: with one slot for queries the next tile's wait for the output"),
}


def choose(head_dim: int, n_tile: int, device: torch.device) -> Schedule:
    """The schedule of a launch of n_tile tiles."""
    return CHOICES[head_dim].schedule if n_tile > multiprocessors(device) else TILE


@gluon.jit
def next_tile(n_taken, n_tile, counter, KIND: gl.constexpr):
    """The tile that a program takes after its first n_taken (the first is its own number); n_tile or more: none."""
    p = gl.program_id(0)
    n_program = gl.num_programs(0)
    if KIND == "static":
        t = n_taken * n_program + gl.where(n_taken % 2 == 1, n_program - 1 - p, p)
    elif KIND == "dynamic":
        n_added = gl.atomic_add(counter, 1, sem="relaxed")
        if n_added == n_tile - 1:
            gl.store(counter, 0)
        t = n_program + n_added
    else:
        t = n_tile
    return t


def order(n_row_tile: int, n_head: int, section: int) -> list[tuple[int, int]]:
    """`tile_of` for every t, on the host.

    >>> order(2, 3, 2)  # a section of heads 0 and 1, then one of head 2
    [(0, 1), (1, 1), (0, 0), (1, 0), (2, 1), (2, 0)]
    """
    sections = [range(first, min(first + section, n_head)) for first in range(0, n_head, section)]
    return [(head, row) for heads in sections for row in reversed(range(n_row_tile)) for head in heads]


def static_round(n_taken: int, n_program: int) -> list[int]:
    """The tile that each program of a static schedule takes after its first n_taken.

    >>> static_round(0, 3), static_round(1, 3)
    ([0, 1, 2], [5, 4, 3])
    """
    tiles = list(range(n_taken * n_program, (n_taken + 1) * n_program))
    return tiles[::-1] if n_taken % 2 else tiles


def section_heads(S: int, head_dim: int, itemsize: int, group: int, n_head: int) -> int:
    """Query heads of a section: those of as many key-value heads, `group` each, as the L2 cache keeps."""
    kept = max(1, SECTION_BYTES[head_dim] // (2 * S * head_dim * itemsize)) if S > 0 else 1
    return min(kept * group, n_head)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _counters(device: torch.device) -> Any:
    """Zeroed counters for ever, 128 bytes each."""
    zeros = torch.zeros(COUNTERS, 32, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # other streams use them too
    return itertools.cycle(zeros.unbind(0))


def tile_counter(device: torch.device) -> Tensor:
    """A counter that is zero when the launch that gets it begins, and is no other launch's until it has ended.

    A CUDA graph keeps its counters for as long as it lives, so it gets its own, zeroed by the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return next(_counters(device))
