"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

Advance = Callable[[int], None]


@contextmanager
def progress_bars(shown: bool) -> Iterator[Callable[[str, int | None], Advance]]:
    """Gives a function that opens a bar of a name and a total and returns the function that advances it."""
    if not shown:
        yield lambda name, total: lambda n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(show_speed=True))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        yield lambda name, total: partial(bars.advance, bars.add_task(name, total=total))
