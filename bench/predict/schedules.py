"""What a schedule of the Hopper attention forward's tiles takes: a simulation, its costs fitted to measured times.

    python -m rooflight.bench.predict.schedules      # the table in NOTES.md, "Hopper forward: the tile schedule"

A program takes `block` microseconds for each block of keys that a tile visits and a tile's own cost beside them; the
launch takes `launch`. Everything the schedule decides (which program takes which tile, and when) is followed tile by
tile, in the order of kernels/attention/hopper/schedule.py. What the simulation does not know: the L2 cache, the clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from ...kernels.attention.hopper.schedule import SCHEDULES, Schedule, order, section_heads, static_round

BLOCK = 128  # rows of queries of a tile, and keys of a block
PROGRAMS = 132  # multiprocessors of an H100 or H200


class Costs(NamedTuple):
    """Microseconds. tile: of a tile that has a program to itself.  next_tile: in a program that goes on to the next."""

    block: float
    tile: float
    next_tile: float
    launch: float = 3.0


# block and tile: fitted to the times below, which they give back within 2 %. A program that went on waited for its
# output to leave, then for the next queries: 2.8 us at head size 64 (202 us at T = 1024), 5.9 at 128 (937 us at 8192).
# What is left where neither is waited for is not measured: next_tile is an assumption.
COSTS = {64: Costs(1.16, 4.36, 1.5), 128: Costs(1.435, 5.5, 3.0)}

# (heads of all batches, T, head size): microseconds, a program for each tile. NVIDIA H200, 2026-11-26, commit f517274.
MEASURED = {
    (32, 8192, 128): 823.4,
    (128, 2048, 128): 275.5,
    (512, 512, 128): 148.2,
    (32, 8192, 64): 651.0,
    (400, 1024, 64): 237.0,
}


class Problem(NamedTuple):
    """n_head heads (of all batches) of T queries and keys; window: keys a query sees, itself among them."""

    n_head: int
    T: int
    head_dim: int
    window: int | None = None
    lengths: tuple[int, ...] = ()  # of packed documents; n_head heads each

    def tiles(self) -> list[int]:
        """Blocks of keys of each tile, in the order of the schedule; no tile: 0."""
        documents = self.lengths or (self.T,)
        longest = max(documents)
        n_head = self.n_head * len(documents)
        section = section_heads(longest, self.head_dim, 2, 1, n_head)
        return [
            self._blocks(documents[head // self.n_head], row * BLOCK)
            for head, row in order(-(-longest // BLOCK), n_head, section)
        ]

    def _blocks(self, T: int, first: int) -> int:
        lowest = 0 if self.window is None else max(0, first - self.window + 1) // BLOCK
        return -(-min(first + BLOCK, T) // BLOCK) - lowest if first < T else 0

    def flops(self) -> float:
        """Of the pairs that are visible."""
        total = 0.0
        for T in self.lengths or (self.T,):
            hidden = max(0, T - self.window) if self.window else 0
            total += T * (T + 1) / 2 - hidden * (hidden + 1) / 2
        return 4 * self.n_head * self.head_dim * total


def microseconds(schedule: Schedule, tiles: Sequence[int], costs: Costs, n_program: int = PROGRAMS) -> float:
    """When the last program ends."""
    own = costs.tile if schedule.kind == "tile" else costs.next_tile
    times = [own + costs.block * n if n else 0.3 for n in tiles]  # a tile past its document's end is passed over
    if schedule.kind == "static":
        ends = [0.0] * n_program
        for n_taken in range(-(-len(times) // n_program)):
            for p, t in enumerate(static_round(n_taken, n_program)):
                ends[p] += times[t] if t < len(times) else 0.0
    else:  # whoever is free takes the next
        ends = [0.0] * n_program
        for time in times:
            heapq.heapreplace(ends, ends[0] + time)
    return costs.launch + max(ends)


def rate(schedule: Schedule, problem: Problem) -> float:
    """TFLOP/s."""
    return problem.flops() / microseconds(schedule, problem.tiles(), COSTS[problem.head_dim]) / 1e6


PROBLEMS: dict[str, Problem] = {
    f"{heads} heads, T = {T}, D = {D}": Problem(heads, T, D)
    for D, rows in {
        128: ((32, 8192), (64, 4096), (128, 2048), (256, 1024), (512, 512)),
        64: ((32, 8192), (64, 4096), (128, 2048), (400, 1024), (512, 512)),
    }.items()
    for heads, T in rows
} | {
    "16 heads, T = 16384, D = 128": Problem(16, 16384, 128),
    "the same, window 1024": Problem(16, 16384, 128, window=1024),
    "12 documents in 16384, D = 128": Problem(
        16, 0, 128, lengths=(4096, 2500, 2000, 1700, 1400, 1200, 1000, 900, 700, 500, 250, 138)
    ),
}


def table() -> list[str]:
    """Predicted TFLOP/s of every schedule, in Markdown."""
    lines = ["| | " + " | ".join(s.kind for s in SCHEDULES) + " | measured |", "|" + "---|" * (len(SCHEDULES) + 2)]
    for name, problem in PROBLEMS.items():
        cells = [f"{rate(schedule, problem):.0f}" for schedule in SCHEDULES]
        lines.append(f"| {name} | " + " | ".join(cells) + " | not measured yet |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
