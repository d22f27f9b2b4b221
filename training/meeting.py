"""Where the processes of a launch find each other, and do not take those before them for one another.

torchrun's store lives as long as torchrun does, through all restarts of its processes. The addresses of processes that
have ended still stand in it, and each machine counts its restarts for itself.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import cache
from uuid import uuid4

import torch.distributed as dist


def meeting(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store, by torchrun's environment, through which `size` processes make their process group.

    Raises TimeoutError where one of them does not come.
    """
    store = _store(rank, size, timeout)
    return meet(store, rank, size, timeout) if _outlives_processes() else store


@cache
def started_before(rank: int, size: int, timeout: timedelta) -> bool:
    """Whether this launch has had a first process before this one, which asks, once, and counts itself.

    torchrun's own count says so only where it has restarted processes for their failure: on a machine that another one
    has come back to, it does not go up.
    """
    return _outlives_processes() and _store(rank, size, timeout).add("rooflight/first processes", 1) > 1


def _outlives_processes() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else rank 0 has it, and takes it along


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    return store


def meet(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that no process before has written to, once all `size` processes are there to share it.

    Each process comes under a name that is new with every start. The first one tells each name that it finds where to
    meet, and opens that place when of every other rank the last name that came has answered: a process that has ended
    does not.  Raises TimeoutError, which names a rank that has not come, as far as this one can know.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    me = uuid4().hex

    def wait(missing: str) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"of {size} processes {missing} has not come in {timeout.total_seconds():g} s")
        time.sleep(0.02)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank == 0:
        names = dict.fromkeys(range(1, size), "")
        while absent := [r for r, name in names.items() if not (name and store.check([f"{me}/{name}"]))]:
            wait(f"rank {absent[0]}")
            for r in names:  # of those who have answered too: they may have ended since, and come again
                if (name := read(f"rooflight/here/{r}")) != names[r]:
                    names[r] = name
                    store.set(f"rooflight/place/{name}", me)
        store.set(f"{me}/open", "")
        return dist.PrefixStore(me, store)

    place = ""
    store.set(f"rooflight/here/{rank}", me)
    while not (place and store.check([f"{place}/open"])):
        if (told := read(f"rooflight/place/{me}")) != place:  # again, where the first process came again
            place = told
            store.set(f"{place}/{me}", "")
        wait("rank 0, or one that it waits for," if place else "rank 0")
    return dist.PrefixStore(place, store)
