"""Processes of a launch meet in a store that those before them have used too."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from rooflight.training import meeting
from rooflight.training.distributed import World, restarted
from rooflight.training.meeting import meet

SOON = timedelta(seconds=0.3)
LATER = timedelta(seconds=20)


def started(pool: ThreadPoolExecutor, store: dist.Store, ranks: list[int], timeout: timedelta = LATER) -> list[Future]:
    return [pool.submit(meet, store, rank, 3, timeout) for rank in ranks]


def assert_together(futures: list[Future]) -> dist.Store:
    """What each writes the others read; the place where they are."""
    stores = [future.result(timeout=LATER.total_seconds()) for future in futures]
    for i, store in enumerate(stores):
        store.set(f"address {i}", str(i))
    assert all(store.get(f"address {i}") == str(i).encode() for store in stores for i in range(len(stores)))
    return stores[0]


def test_every_start_has_a_place_of_its_own() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        first = assert_together(started(pool, store, [0, 1, 2]))
        again = assert_together(started(pool, store, [2, 1, 0]))
    again.set("address", "new")
    assert not first.check(["address"])
    assert again.check(["address"])


@pytest.mark.parametrize("dead", [[0], [1], [0, 2], [1, 2]])
def test_a_process_that_ended_before_all_had_come_is_not_met(dead: list[int]) -> None:
    """It has left its name, and perhaps a place; those of its time that live meet the one that takes its rank."""
    store = dist.HashStore()
    alive = [rank for rank in range(3) if rank not in dead]
    with ThreadPoolExecutor(6) as pool:
        ended = started(pool, store, dead, SOON)
        for future in ended:
            with pytest.raises(TimeoutError, match=r"of 3 processes rank \d.* has not come in 0.3 s"):
                future.result()
        waiting = started(pool, store, alive)
        time.sleep(0.1)  # they have found what the dead have left
        assert not any(future.done() for future in waiting)
        assert_together(waiting + started(pool, store, dead))


@pytest.mark.parametrize("ends", [0, 1])
def test_one_that_had_answered_and_ended_is_waited_for(ends: int) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        (first,) = started(pool, store, [1 - ends])
        (ended,) = started(pool, store, [ends], SOON)
        error = ended.exception(timeout=5)  # of rank 2: both had told each other the place
        assert isinstance(error, TimeoutError)
        assert str(error).startswith(f"of 3 processes {'rank 0, or one that it waits for,' if ends else 'rank 2'} has")
        (second,) = started(pool, store, [ends])
        time.sleep(0.1)
        assert not any(future.done() for future in (first, second))
        assert_together([first, second, *started(pool, store, [2])])


def test_a_launch_knows_its_second_start_whatever_the_processes_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the others never came, or there are none: machines come and go, and one may be left."""
    store = dist.HashStore()
    monkeypatch.setattr(meeting, "_store", lambda *_: store)

    def starts(world: World) -> list[bool]:
        meeting.started_before.cache_clear()  # another process
        return [restarted(world), restarted(world)]

    assert starts(World(launch="a")) == [False, False]  # no torchrun
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert starts(World(0, 2, launch="a")) == [False, False]
    assert starts(World(0, 1, launch="a")) == [True, True]
    assert starts(World(0, 2, launch="a")) == [True, True]
    store = dist.HashStore()
    assert starts(World(0, 2, launch="b")) == [False, False]
    assert starts(World(0, 2, restarts=1, launch="b")) == [True, True]
    meeting.started_before.cache_clear()
