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

__all__ = ["DYNAMIC", "SCHEDULES", "STATIC", "TILE", "Schedule", "next_tile", "section_heads", "tile_counter"]

# Keys and values of the heads that run together; the L2 cache of H100 and H200 has 50 MB, for all that passes through.
L2_BYTES = 32 << 20

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


def section_heads(S: int, head_dim: int, itemsize: int, group: int, n_head: int) -> int:
    """Query heads of a section: those of as many key-value heads, `group` each, as the L2 cache keeps."""
    kept = max(1, L2_BYTES // (2 * S * head_dim * itemsize)) if S > 0 else 1
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
