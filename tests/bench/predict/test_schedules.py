"""The simulation of the Hopper forward's schedules, and that its orders are those of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rooflight.bench.predict import schedules
from rooflight.bench.predict.schedules import COSTS, MEASURED, PROBLEMS, Costs, Problem, microseconds
from rooflight.kernels.attention.hopper import blocks as hopper_blocks
from rooflight.kernels.attention.hopper import schedule as hopper_schedule
from rooflight.kernels.attention.hopper.schedule import DYNAMIC, SCHEDULES, STATIC, TILE, order, static_round
from support.gluon_emulator import on_cpu
from support.gluon_scheduler import Program, current
from support.gluon_values import Int

pytestmark = pytest.mark.cpu


def device(function: Any, program: int = 0, n_program: int = 1) -> Callable[..., Any]:
    """A function of the kernel, run as that program of a grid."""

    def call(*args: Any) -> Any:
        current.program = Program((program,), (n_program, 1, 1), "0")
        try:
            return on_cpu(function)(*(Int(x) if isinstance(x, int) else x for x in args))
        finally:
            current.program = None

    return call


@pytest.mark.parametrize("n_row_tile", [1, 2, 5])
@pytest.mark.parametrize("n_head", [1, 7, 12])
@pytest.mark.parametrize("section", [1, 3, 12])
def test_the_order_is_the_kernels(n_row_tile: int, n_head: int, section: int) -> None:
    expected = [
        device(hopper_blocks.tile_of)(t, n_row_tile, n_head, min(section, n_head)) for t in range(n_row_tile * n_head)
    ]
    assert order(n_row_tile, n_head, min(section, n_head)) == expected
    assert len(set(expected)) == n_row_tile * n_head


@pytest.mark.parametrize("n_program", [1, 4, 7])
def test_a_static_round_is_the_kernels(n_program: int) -> None:
    for n_taken in range(1, 5):
        taken = [
            device(hopper_schedule.next_tile, p, n_program)(n_taken, 100, None, "static") for p in range(n_program)
        ]
        assert static_round(n_taken, n_program) == taken
    assert device(hopper_schedule.next_tile)(1, 100, None, "tile") == 100


def test_tiles() -> None:
    assert Problem(1, 300, 64).tiles() == [3, 2, 1]
    assert Problem(1, 512, 64, window=129).tiles() == [2, 2, 2, 1]
    assert Problem(1, 0, 64, lengths=(300, 100)).tiles() == [3, 2, 1, 1]
    assert sum(Problem(32, 8192, 128).tiles()) == 32 * 65 * 32
    assert Problem(1, 4, 1, window=2).flops() == 4 * (1 + 2 + 2 + 2)
    assert Problem(1, 0, 1, lengths=(1, 2)).flops() == 4 * (1 + 3)


def test_who_takes_which_tile() -> None:
    costs = Costs(block=1, tile=10, next_tile=1, launch=0)
    lengths = [4, 3, 2, 1]
    assert microseconds(TILE, lengths, costs, 2) == (10 + 3) + (10 + 2)
    assert microseconds(DYNAMIC, lengths, costs, 2) == 5 + 2
    assert microseconds(STATIC, lengths, costs, 2) == 5 + 2  # the first and the last, the second and the third
    assert microseconds(DYNAMIC, [1, 1, 1, 9], costs, 2) == 12  # the longest last


@pytest.mark.parametrize("name", [name for name in MEASURED if "heads" in name])
def test_costs_give_the_measured_times_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_schedule, "SECTION_BYTES", {64: 32 << 20, 128: 32 << 20})  # as they were then
    problem = PROBLEMS[name]
    for schedule in (TILE, DYNAMIC):
        predicted = microseconds(schedule, problem.tiles(), COSTS[problem.head_dim])
        assert predicted == pytest.approx(MEASURED[name][schedule.kind], rel=0.05 if problem.T > 8192 else 0.03)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_schedule_is_faster_than_its_work(name: str) -> None:
    problem = PROBLEMS[name]
    tiles, costs = problem.tiles(), COSTS[problem.head_dim]
    for schedule in SCHEDULES:
        own = costs.tile if schedule.kind == "tile" else costs.next_tile
        work = sum(own + costs.block * n for n in tiles) / schedules.PROGRAMS
        assert work < microseconds(schedule, tiles, costs)
        assert schedule.kind == "static" or microseconds(schedule, tiles, costs) < 1.1 * work


def test_the_table_in_the_notes() -> None:
    notes = Path(schedules.__file__).parents[1] / "NOTES.md"
    text = notes.read_text(encoding="utf-8")
    assert all(line in text for line in schedules.table())
