"""The processes of a run, which save and load together: what one of them cannot do, none has done."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from ..files import new_folder

T = TypeVar("T")


class Ranks:
    """Those of torch.distributed's process group, or this process alone where there is none.

    group: another than the default one.
    Every method is called by all of them, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if joined else 0
        self.size = dist.get_world_size(group) if joined else 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; what it returned, by rank. What the first rank raised that failed, all raise."""
        if self.size == 1:
            return [work()]
        result: T | None = None
        mine: Exception | None = None
        try:
            result = work()
        except Exception as error:
            mine = error
        told: list[tuple[T, Exception | None]] = [None] * self.size  # type: ignore[list-item]
        dist.all_gather_object(told, (result, _portable(mine)), group=self.group)
        for rank, (_, failed) in enumerate(told):
            if failed is not None:
                raise failed from (mine if rank == self.rank else None)
        return [each for each, _ in told]

    def each(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; what it returned on this one. Errors as in `together`."""
        mine: list[T] = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; its result, or what it raised, on every rank."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    @contextmanager
    def new_folder(self, final: Path) -> Iterator[Path]:
        """files.new_folder for all of them, on a file system that they share: rank 0 makes it and renames it."""
        with ExitStack() as held:
            yield self.first(lambda: held.enter_context(new_folder(final)))
            self.first(held.close)


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one of its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
