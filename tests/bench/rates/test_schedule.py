"""Any number of a grid's first sizes can be interpolated between, and a deadline costs sizes, never a kernel."""

import time
from itertools import product

import pytest
import torch

from rooflight.bench.rates import kernel_rates
from rooflight.bench.rates.kernel_rates import KERNELS, grids
from rooflight.bench.rates.schedule import Budget, Task, left_out, plan, ranks

CUDA = torch.device("cuda")  # a name: nothing runs there


def test_the_middle_is_first_then_the_ends():
    assert ranks([(1,), (2,), (4,), (8,), (16,)]) == {
        (1,): (1, 1),
        (2,): (2, 2),
        (4,): (0, 0),
        (8,): (2, 2),
        (16,): (1, 1),
    }
    assert ranks([(7,)]) == {(7,): (0, 0)}
    corner = ranks([*product((1, 2, 4), (3, 5, 9))])
    assert (corner[2, 5], corner[1, 5], corner[1, 9]) == ((0, 0), (1, 1), (1, 2))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_sizes_up_to_a_level_are_a_whole_grid(name: str, kind: str):
    sizes = KERNELS[name].sizes[kind]
    if name == "muon" or not sizes:  # whose sizes depend on one another; which that device does not run
        assert (name, kind) in {("muon", "cpu"), ("muon", "cuda"), ("fp8_cast", "cpu")}
        return
    places = ranks(sizes)
    assert min(places.values()) == (0, 0)
    for level in (0, 1, 2):
        first = {size for size, place in places.items() if place[0] <= level}
        assert first == set(product(*map(set, zip(*first, strict=True))))
    ends = {size for size, place in places.items() if place[0] <= 1}
    for axis, column in enumerate(zip(*places, strict=True)):  # nothing lies beyond them
        assert {min(column), max(column)} <= {size[axis] for size in ends}


@pytest.mark.parametrize("together", [False, True])
def test_every_size_is_planned_once_and_every_kernel_before_any_comes_again(
    together: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernel_rates, "has_fp8", lambda device: True)
    wanted = grids(torch.bfloat16, CUDA)
    tasks = plan(wanted, lambda name, sizes: 1.0, together=together)
    first = [task for task in tasks if task.first]
    assert [task.kernel for task in first] == list(wanted)
    assert tasks[: len(first)] == first
    for name, grid in wanted.items():
        planned = [sizes for task in tasks if task.kernel == name for sizes in task.sizes]
        assert sorted(planned) == sorted(grid)
        levels = [ranks(grid)[sizes][0] for sizes in planned]
        assert levels == sorted(levels)
    assert together or all(len(task.sizes) == 1 for task in tasks)


@pytest.mark.parametrize("together", [False, True])
def test_a_kernel_whose_middle_is_dear_begins_with_its_least_size(together: bool):
    grid = [*product((2, 4, 8), (3, 9, 27))]
    tasks = plan(
        {"a": grid, "b": grid}, lambda name, s: s[0] * s[1], together=together, dear=lambda name, w: name == "b"
    )
    assert [(task.kernel, task.sizes, task.work) for task in tasks[:2]] == [("a", ((4, 9),), 36), ("b", ((2, 3),), 6)]
    assert sorted(sizes for task in tasks if task.kernel == "b" for sizes in task.sizes) == sorted(grid)


def test_of_a_kernel_whose_middle_is_dear_the_middle_of_what_is_not_comes_first():
    """Muon's rate at 64 x 64, all that the demo's 15 seconds left, is a twentieth of that at 256 x 1,024."""
    sizes = kernel_rates.KERNELS["muon"].sizes["cpu"]
    tasks = plan({"muon": sizes}, lambda name, s: s[0] ** 2 * s[1], together=True, dear=lambda name, w: w > 1e8)
    assert tasks[0].sizes == ((128, 512),)
    assert sorted(at for task in tasks for at in task.sizes) == sorted(sizes)


def test_a_task_must_be_expected_to_end_in_time():
    budget = Budget(time.perf_counter() + 10, runs=8)
    first, larger = Task("gemm", ((1,),), True, 1.0), Task("gemm", ((2,),), False, 100.0)
    budget.took(first, seconds=1.0, running=0.009)
    assert budget.allows(larger)  # 8 runs of 0.9 s, and 0.93 s to make and compile what runs
    budget.took(first, seconds=4.0, running=0.009)
    assert not budget.allows(larger)  # 7.2 + 3.93
    budget.took(first, seconds=1.0, running=0.0125)
    assert not budget.allows(larger)  # 10 + 0.9
    assert budget.allows(first)


def test_what_is_left_out_is_named():
    assert left_out({"a": [(1,), (2,)], "b": [(3,)], "c": [(4,)]}, {"a": [(1,)], "b": [(3,)]}) == {
        "a": [(2,)],
        "c": [(4,)],
    }
