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


def test_a_timing_has_its_spread(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch)
    call = machine.call("a", 9.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0)
    assert clock.timings([call], CPU, seconds=100.0, rounds=(3, 6)) == [clock.Timing(1.0, 2.0, 3.5, 5.0, "clock")]
    (one,) = clock.timings([machine.call("b", 7.0)], CPU, seconds=0.0, rounds=(1, 1))
    assert (one.low, one.median, one.high) == (7.0, 7.0, 7.0)


def test_a_ceiling_is_the_shortest_time(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch)
    call = machine.call("a", 9.0, 3.0, 2.0, 4.0)
    assert clock.best_seconds(call, CPU, 8.0) == 2.0
    assert machine.log.count("a") == 1 + 3


@pytest.mark.parametrize(("host", "device"), [(3.0, 1.0), (1.0, 3.0)], ids=["host-bound", "device-bound"])
def test_launches_and_calls_are_timed_apart(host: float, device: float, monkeypatch: pytest.MonkeyPatch):
    """A host that issues in `host` seconds, a device that works off each call in `device` when it has it."""
    now = idle_at = 0.0

    def call() -> None:
        nonlocal now, idle_at
        now += host
        idle_at = max(idle_at, now) + device

    def synchronize(_: torch.device) -> None:
        nonlocal now
        now = max(now, idle_at)

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    issued, ended = clock.launch_times(call, torch.device("cuda"), 0.0002)
    assert issued == pytest.approx(host)
    assert ended == pytest.approx(max(host, device), rel=0.05)


def test_one_thread_is_timed_by_its_own_time(monkeypatch: pytest.MonkeyPatch):
    import time

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock.clock() is time.thread_time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock.clock() is time.perf_counter
