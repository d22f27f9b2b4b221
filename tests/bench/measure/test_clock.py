"""Calls are timed in turn, each as often as its share of the time allows, and the median is what counts."""

import pytest
import torch

from rooflight.bench.measure import clock

CPU = torch.device("cpu")


class Machine:
    """A clock that only the calls move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, []
        monkeypatch.setattr(clock, "clock", lambda: lambda: self.now)

    def call(self, name: str, *seconds: float):
        times = iter(seconds)
        last = seconds[-1]

        def run() -> None:
            self.log.append(name)
            self.now += next(times, last)

        return run


def test_the_median_leaves_out_the_first_call_and_a_slow_moment(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch)
    call = machine.call("a", 100.0, 1.0, 50.0, 1.0)
    assert clock.median_seconds([call], CPU, seconds=0.0) == [1.0]


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch)
    calls = [machine.call(name, 1.0) for name in "ab"]
    clock.median_seconds(calls, CPU, seconds=0.0, rounds=(3, 5))
    assert "".join(machine.log) == "ab" + 3 * "ab"


def test_a_short_call_is_timed_more_often_than_a_long_one(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch)
    calls = [machine.call("a", 1.0), machine.call("b", 10.0)]
    assert clock.median_seconds(calls, CPU, seconds=100.0, rounds=(3, 25)) == [1.0, 10.0]
    assert (machine.log.count("a"), machine.log.count("b")) == (1 + 25, 1 + 5)


def test_one_thread_is_timed_by_its_own_time(monkeypatch: pytest.MonkeyPatch):
    import time

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock.clock() is time.thread_time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock.clock() is time.perf_counter
