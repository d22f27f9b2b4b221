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


# Fitted to the times below by least squares of the relative error; they give the causal ones back within 3 %.
COSTS = {64: Costs(1.14, 4.48, 1.93), 128: Costs(1.445, 5.37, 3.11)}

# Microseconds by schedule: one NVIDIA H200, 2026-11-27, torch 2.11, triton 3.6, bf16, device time on a cold L2.
# Sections of 32 MB, the next tile's first product not yet under this one's epilogue, packed tiles not yet counted.
MEASURED: dict[str, dict[str, float]] = {
    "32 heads, T = 8192, D = 128": {"tile": 819.3, "dynamic": 790.7},
    "64 heads, T = 4096, D = 128": {"tile": 452.5, "dynamic": 423.8},
    "128 heads, T = 2048, D = 128": {"tile": 272.1, "dynamic": 241.1},
    "256 heads, T = 1024, D = 128": {"tile": 185.6, "dynamic": 149.7},
    "512 heads, T = 512, D = 128": {"tile": 143.4, "dynamic": 109.2},
    "32 heads, T = 8192, D = 64": {"tile": 650.5, "dynamic": 606.0},
    "128 heads, T = 2048, D = 64": {"tile": 224.9, "dynamic": 182.7},
    "400 heads, T = 1024, D = 64": {"tile": 234.2, "dynamic": 172.5},
    "512 heads, T = 512, D = 64": {"tile": 117.7, "dynamic": 77.2},
    "16 heads, T = 16384, D = 128": {"tile": 1553.1, "dynamic": 1526.3},
    "the same, window 1024": {"tile": 281.3, "dynamic": 254.3},
    "12 documents in 16384, D = 128": {"tile": 360.7, "dynamic": 285.7},
}


class Problem(NamedTuple):
    """n_head heads (of all batches) of T queries and keys; window: keys a query sees, itself among them."""

    n_head: int
    T: int
    head_dim: int
    window: int | None = None
    lengths: tuple[int, ...] = ()  # of packed documents; n_head heads each

    def tiles(self) -> list[int]:
        """Blocks of keys of each tile, in the order of the schedule."""
        documents = self.lengths or (self.T,)
        rows = sorted((first, T) for T in documents for first in range(0, T, BLOCK))  # of a head
        section = section_heads(max(documents), self.head_dim, 2, 1, self.n_head)
        return [self._blocks(T, first) for _, row in order(len(rows), self.n_head, section) for first, T in [rows[row]]]

    def _blocks(self, T: int, first: int) -> int:
        lowest = 0 if self.window is None else max(0, first - self.window + 1) // BLOCK
        return -(-min(first + BLOCK, T) // BLOCK) - lowest

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
    times = [own + costs.block * n for n in tiles]
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
    """TFLOP/s of every schedule, as the costs give them and as measured, in Markdown."""
    kinds = [schedule.kind for schedule in SCHEDULES]
    lines = ["| | " + " | ".join((*kinds, "measured: tile", "dynamic")) + " |", "|" + "---|" * (len(kinds) + 3)]
    for name, problem in PROBLEMS.items():
        given = [f"{rate(schedule, problem):.0f}" for schedule in SCHEDULES]
        times = MEASURED.get(name, {})
        found = [
            f"{problem.flops() / times[kind] / 1e6:.0f}" if kind in times else "not measured yet"
            for kind in ("tile", "dynamic")
        ]
        lines.append(f"| {name} | " + " | ".join(given + found) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
