"""Which sizes come first when there are only so many seconds: out of time, a grid is coarser and no kernel missing.

>>> ranks([(1, 8), (1, 64), (2, 8), (2, 64), (4, 8), (4, 64)])[2, 64]
(0, 0)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from ...model.ceilings import Sizes


def ranks(grid: Sequence[Sizes]) -> dict[Sizes, tuple[int, int]]:
    """(level, distance) of each size: on an axis 0 is its middle, 1 an end, 2 what lies between them.

    The level is the largest over the axes, so that the sizes up to any level are a whole grid, and the rates between
    them can be interpolated; the distance is the sum.
    """
    axes = []
    for column in zip(*grid, strict=True):
        values = sorted(set(column))
        axis = dict.fromkeys(values, 2) | {values[0]: 1, values[-1]: 1}
        axes.append(axis | {values[len(values) // 2]: 0})
    places = {sizes: [axis[size] for axis, size in zip(axes, sizes, strict=True)] for sizes in grid}
    return {sizes: (max(place), sum(place)) for sizes, place in places.items()}


@dataclass
class Task:
    """Some sizes of one kernel, timed in turn.  first: the kernel's first, which no deadline leaves out.

    work: what one run of all of them comes to, in units that make the kernel's tasks comparable.
    """

    kernel: str
    sizes: tuple[Sizes, ...]
    first: bool
    work: float


def plan(
    grids: Mapping[str, Sequence[Sizes]],
    work: Callable[[str, Sizes], float],
    *,
    together: bool,
    dear: Callable[[str, float], bool] = lambda kernel, work: False,
) -> list[Task]:
    """All sizes of all kernels, the most telling first; together: a kernel's sizes of one level in one task.

    dear: whether so much work is too much to begin a kernel with: then the middle one of the sizes that are not comes
    first, or the least. It may remain the only one, and a rate says most of sizes that are near.
    """
    order: list[tuple[tuple[int, int], Task]] = []
    for kernel, grid in grids.items():
        groups: dict[tuple[int, int], list[Sizes]] = {}
        for sizes, (level, distance) in ranks(grid).items():
            groups.setdefault((level, 0 if together else distance), []).append(sizes)
        tasks = [(place, part) for place in groups for part in ([groups[place]] if together else _each(groups[place]))]
        tasks.sort(key=lambda task: task[0])
        if dear(kernel, sum(work(kernel, sizes) for sizes in tasks[0][1])):
            by_work = sorted(grid, key=lambda sizes: work(kernel, sizes))
            cheap = [sizes for sizes in by_work if not dear(kernel, work(kernel, sizes))] or by_work[:1]
            first = cheap[len(cheap) // 2]
            tasks = [((0, 0), [first]), *((place, [s for s in part if s != first]) for place, part in tasks)]
        for i, (place, part) in enumerate((place, part) for place, part in tasks if part):
            order.append((place, Task(kernel, tuple(part), i == 0, sum(work(kernel, sizes) for sizes in part))))
    order.sort(key=lambda pair: (not pair[1].first, pair[0]))  # stable: kernels stay in their own order
    return [task for _, task in order]


def _each(sizes: Sequence[Sizes]) -> list[list[Sizes]]:
    return [[one] for one in sizes]


@dataclass
class Budget:
    """Seconds until the deadline, and what a kernel's next task will take by what its last one took."""

    deadline: float  # of time.perf_counter
    runs: int  # of a call, for its time
    overhead: dict[str, float] = field(default_factory=dict)  # of the last task: to make the tensors, to compile
    pace: dict[str, float] = field(default_factory=dict)  # seconds a unit of work

    def allows(self, task: Task) -> bool:
        """Whether the task is expected to end in time; a kernel's first always may run."""
        if task.first:
            return True
        expected = self.overhead[task.kernel] + self.runs * task.work * self.pace[task.kernel]
        return time.perf_counter() + expected <= self.deadline

    def took(self, task: Task, seconds: float, running: float) -> None:
        """The task took so many seconds, in which one run of everything took `running`."""
        self.pace[task.kernel] = running / task.work
        self.overhead[task.kernel] = max(0.0, seconds - self.runs * running)


def left_out(grids: Mapping[str, Sequence[Sizes]], measured: Mapping[str, Container[Sizes]]) -> dict[str, list[Sizes]]:
    """{kernel: the sizes of its grid that have no rate}, of those that lack any."""
    missing = {name: [sizes for sizes in grid if sizes not in measured.get(name, ())] for name, grid in grids.items()}
    return {name: sizes for name, sizes in missing.items() if sizes}
