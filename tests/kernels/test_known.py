"""What is written down of a kind of call: what its launcher does, no more and no less, and for such calls alone."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import known
from rooflight.kernels.known import Known, prepared
from rooflight.kernels.launching import TENSOR, Handle, Made, Plan, launch

pytestmark = pytest.mark.cpu


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, one_ptr, BLOCK: tl.constexpr):
    """out = x + one, or x + 2 y + one."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at) + tl.load(one_ptr)
    if y_ptr is not None:
        x += 2 * tl.load(y_ptr + at)
    tl.store(out_ptr + at, x)


ONE = torch.ones(1)
ADD = Plan(_add_kernel, (1,), TENSOR, TENSOR, TENSOR, Made(lambda: ONE), BLOCK=16)


class Launcher:
    """(x + 2 y + 1, None, that + x + 1), in two launches; how often it ran."""

    def __init__(self) -> None:
        self.n_run = 0

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, None, Tensor]:
        self.n_run += 1
        first, unused, second = (torch.empty_like(x) for _ in range(3))
        assert unused.shape == x.shape
        ADD(x, y, first)
        ADD(first, x, second)
        return first, None, second


def numbers(seed: int, *, shift: int = 0) -> Tensor:
    return torch.randint(-9, 9, (16 + shift,), generator=torch.Generator().manual_seed(seed)).float()[shift:]


def check(run: Known, x: Tensor, y: Tensor | None) -> None:
    first, nothing, second = run(x, y)
    expected = x + 1 if y is None else x + 2 * y + 1
    assert torch.equal(first, expected)
    assert nothing is None
    assert torch.equal(second, expected + 2 * x + 1)


def test_what_the_launcher_does_is_done_without_it():
    launcher = Launcher()
    run = Known(launcher)
    x = numbers(0)
    for _ in range(2):  # the second is watched
        check(run, x, x)  # one tensor in two places is none of the kind
    check(run, x, numbers(1))
    check(run, numbers(2), x)
    assert launcher.n_run == 2
    run = Known(launcher)
    for seed in range(4):
        check(run, numbers(seed), None)
    assert launcher.n_run == 4


def test_the_launcher_runs_where_what_was_written_does_not_hold():
    launcher = Launcher()
    run = Known(launcher)
    for seed in range(9):  # an address that is no multiple of 16: the kernels' variants are others
        check(run, numbers(seed, shift=1), numbers(seed))
    assert launcher.n_run == 9
    for seed in range(4):
        check(run, numbers(seed), numbers(seed))
    assert launcher.n_run == 11
    run._run = lambda *tensors: 1 / 0
    for seed in range(3):
        check(run, numbers(seed), numbers(seed))
    assert launcher.n_run == 12


def test_what_was_written_may_fail_anywhere():
    launcher = Launcher()
    run = Known(launcher)
    run._n_calls = known.WATCHED.stop

    def calls(*outcomes: Any) -> None:
        """One call, in which what was written does this in turn: fails, or does not hold (None)."""
        left = iter(outcomes)

        def written(*tensors: Tensor | None) -> None:
            if (outcome := next(left)) is not None:
                raise outcome

        run._run = written
        check(run, numbers(0), numbers(1))
        assert next(left, left) is left
        assert (run._run is written) == (not isinstance(outcomes[-1], ZeroDivisionError))

    calls(ZeroDivisionError())
    calls(None, ZeroDivisionError())  # on another GPU, or in a new thread, it is tried twice
    full = torch.OutOfMemoryError()
    calls(full, full)  # the next call may have the memory
    assert launcher.n_run == 3


def test_what_a_launch_makes_lives_until_it_is_launched():
    alive: list[Any] = []

    def make() -> Tensor:
        x = torch.zeros(1)
        alive.append(weakref.ref(x))
        return x

    found = []
    plan = Plan(_add_kernel, (1,), TENSOR, Made(make), Made(make))
    handle = Handle(lambda *args: found.append([x() is not None for x in alive]), (0,), [], 0, False)
    fixed: dict[str, Any] = {"at0": 0}
    exec(f"def run(stream):\n    {known._start(0, plan, handle, (torch.zeros(1),), ['t0'], fixed)}", fixed)
    fixed["run"](0)
    assert found == [[True, True]]


def zeroes(x: Tensor) -> Tensor:
    return torch.empty_like(x).zero_()


def computes(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    ADD(x * 0, None, out)
    return out - 1


def launches_without_a_plan(x: Tensor) -> Tensor:
    out = torch.zeros(16)
    kept = torch.empty_like(x)
    launch(_add_kernel, (1,), x, None, kept, ONE, BLOCK=16)
    return out


KEPT = torch.zeros(16)


def fills_what_is_kept(x: Tensor) -> Tensor:
    ADD(x, None, KEPT)
    return torch.zeros(16)


@pytest.mark.parametrize("function", [zeroes, computes, launches_without_a_plan, fills_what_is_kept])
def test_a_launcher_that_does_more_runs_every_time(function):
    ran = []
    run = Known(lambda x: (ran.append(1), function(x))[1])
    for seed in range(6):
        assert torch.equal(run(numbers(seed)), torch.zeros(16))
    assert len(ran) == 6 > known.WATCHED.stop


def test_what_launches_nothing_is_not_written():
    """On which GPU memory is to be is told by the first launch."""
    ran = []
    run = Known(lambda x: (ran.append(1), torch.empty_like(x))[1])
    for _ in range(6):
        assert run(torch.empty(0, 8)).shape == (0, 8)
    assert len(ran) == 6 > known.WATCHED.stop


def test_a_call_that_fills_a_cache_is_no_measure():
    launcher, cache = Launcher(), []

    def caching(x: Tensor, y: Tensor | None) -> Any:
        if len(cache) < 2:
            cache.append(torch.zeros(1) + 1)
        return launcher(x, y)

    run = Known(caching)
    for seed in range(5):
        check(run, numbers(seed), None)
    assert launcher.n_run == 3


X = torch.ones(4, 4)
CALLS: dict[str, tuple[Any, ...]] = {
    "plain": (X, None, X, 1, 0.5),
    "another number": (X, None, X, 2, 0.5),
    "another type": (X, None, X, True, 0.5),
    "another place": (X, X, None, 1, 0.5),
    "dtype": (X, None, X.double(), 1, 0.5),
    "shape": (X, None, X[:2], 1, 0.5),
    "strides": (X, None, torch.ones(4, 8)[:, ::2], 1, 0.5),
    "first strides": (torch.ones(4, 8)[:, ::2], None, X, 1, 0.5),
    "device": (X, None, X.to("meta"), 1, 0.5),
}


@pytest.mark.parametrize("guards", [True, False])
def test_kinds_are_told_apart(guards, monkeypatch):
    assert known.GUARDS_WORK
    monkeypatch.setattr(known, "GUARDS_WORK", guards)
    find = prepared(lambda *args: object())
    found = {name: find(None, *args) for name, args in CALLS.items()}
    assert len(set(found.values())) == len(CALLS)
    for _ in range(4):
        for name, args in CALLS.items():
            assert find(None, *args) is found[name], name
    assert find("another state", *CALLS["plain"]) not in found.values()
    for same in (torch.nn.Parameter(X), X.clone().requires_grad_()):
        for _ in range(3):
            assert find(None, same, None, X, 1, 0.5) is found["plain"]
    with torch.inference_mode():
        for _ in range(3):
            assert find(None, X, None, X, 1, 0.5) is found["plain"]
    with FlopCounterMode(display=False):
        assert find(None, *CALLS["plain"]) is None
    assert find(None, X, None, torch._neg_view(X), 1, 0.5) is None
    assert find(None, X, None, X.as_subclass(torch.nn.parameter.Buffer), 1, 0.5) is None
    assert find(None, X, None, X, 1, [0.5]) is None


def test_a_tensor_in_two_places_is_told_without_guards():
    """They refuse it, and making one in every call takes longer than the call."""
    find = prepared(lambda *args: object())
    guarded = inspect.getclosurevars(find).nonlocals["guarded"]
    assert len({find(None, X, X) for _ in range(4)}) == 1
    assert not guarded
    assert find(None, X, X.clone()) is find(None, X, X)
    assert guarded


def test_importing_asks_nothing_of_the_default_device():
    with torch.device("meta"):
        assert known._guards_work()


def test_a_torch_with_other_guards_is_told_without(monkeypatch):
    for error in (AttributeError, RuntimeError):
        monkeypatch.setattr(known, "_guard", mock.Mock(side_effect=error))
        assert not known._guards_work()


def test_another_thread_may_forget_all_kinds_meanwhile():
    find = prepared(lambda *args: object())
    kinds = inspect.getclosurevars(find).nonlocals["known"]

    class State:
        n_asked = 0

        def __hash__(self) -> int:
            self.n_asked += 1
            if self.n_asked == 3:  # after both look-ups
                kinds.clear()
            return 0

    state = State()
    made = find(state, X)
    assert kinds
    state.n_asked = 0
    assert find(state, X) is made
    assert not kinds


def test_more_ways_of_one_kind_than_are_guarded_are_still_found():
    find = prepared(lambda *args: object())
    calls = [(torch.ones(4, 4), torch.ones(n, 4)) for n in range(1, 3 * known.MOST_GUARDS)]
    found = [find(None, *args) for args in calls]
    for _ in range(3):
        assert [find(None, *args) for args in calls] == found


def test_nothing_is_kept_of_the_tensors():
    run = Known(Launcher())
    find = prepared(lambda *args: run)
    gone = []
    for seed in range(4):
        x, y = numbers(seed), numbers(seed)
        outputs = find(None, x, y)(x, y)
        gone += [weakref.ref(x) for x in (x, y, *outputs) if x is not None]
        del x, y, outputs
    gc.collect()
    assert not any(x() is not None for x in gone)
