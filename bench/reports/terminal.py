"""Tables for the terminal: every number and every name whole, however narrow it is.

A table that does not fit is shown a few columns at a time, each time beside its first one; where the first column is
itself too wide for that, or names several rows at once, its names become lines of their own. Prose that fits beside
nothing goes below. Into a pipe or a file goes one row a line.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.style import StyleType
from rich.table import Table

GAP = "  "
WIDE_KEY = 0.5  # of the width, from which on the first column's names are lines of their own


@dataclass(frozen=True)
class _Column:
    name: str
    cells: tuple[str, ...]
    right: bool

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.name, *self.cells))

    def cell(self, text: str) -> str:
        return text.rjust(self.width) if self.right else text.ljust(self.width)


def width_of(console: Console) -> int | None:
    """The columns to fit into; None, no limit, where no one looks at them: into a pipe or a file."""
    return console.width if console.is_terminal or os.environ.get("COLUMNS") else None


def show(console: Console, *tables: Table, wide: bool = False) -> None:
    """Print tables made for rich, with their titles and captions; wide: one row a line, whatever the width."""
    width = None if wide else width_of(console)
    for table in tables:
        for text, style in lines(table, width):
            console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def lines(table: Table, width: int | None) -> Iterator[tuple[str, StyleType]]:
    """The table's lines with their styles, none longer than `width` unless a single name or number is."""
    columns = [
        _Column(str(c.header), tuple(" ".join(str(cell).split("\n")) for cell in c.cells), c.justify == "right")
        for c in table.columns
    ]
    styles = [row.style or "" for row in table.rows]
    ends = {i for i, row in enumerate(table.rows) if row.end_section}
    yield from (("", ""), *((line, "bold") for line in fold(str(table.title or ""), width)))
    if width is None or _total(columns) <= width:
        yield from _block(columns, range(table.row_count), styles, ends)
    elif len(columns) > 2 and (columns[0].width > WIDE_KEY * width or "" in columns[0].cells):
        yield from _by_name(columns, styles, width)
    else:
        for i, group in enumerate(_groups(columns, width)):
            yield from [("", "")] * (i > 0)
            yield from _block(group, range(table.row_count), styles, ends)
        yield from _prose(columns, range(table.row_count), width)
    yield from ((line, "") for part in str(table.caption or "").split("\n") for line in fold(part, width))


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + len(GAP) * (len(columns) - 1)


def _groups(columns: Sequence[_Column], width: int) -> list[list[_Column]]:
    """The columns that go beside the first one together; without those that do not even alone."""
    key, *others = columns
    groups: list[list[_Column]] = [[key]]
    for column in others:
        if _total([key, column]) > width:
            continue
        if _total([*groups[-1], column]) > width:
            groups.append([key])
        groups[-1].append(column)
    return groups


def _block(
    columns: Sequence[_Column], rows: Sequence[int], styles: Sequence[StyleType], ends: Container[int] = ()
) -> Iterator[tuple[str, StyleType]]:
    if any(column.name for column in columns):
        yield GAP.join(column.cell(column.name) for column in columns).rstrip(), "bold"
    for i in rows:
        yield GAP.join(column.cell(column.cells[i]) for column in columns).rstrip(), styles[i]
        if i in ends and i != rows[-1]:
            yield "", ""


def _by_name(columns: Sequence[_Column], styles: Sequence[StyleType], width: int) -> Iterator[tuple[str, StyleType]]:
    """A line for each name of the first column, and below it the rows up to the next."""
    names, others = columns[0].cells, columns[1:]
    starts = [i for i, name in enumerate(names) if i == 0 or name]
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        yield from (("", ""), *((line, "bold") for line in fold(names[start], width)))
        for number, group in enumerate(_groups(others, width)):
            beside = group[1:]
            if beside and (number == 0 or any(column.cells[i] for column in beside for i in range(start, end))):
                yield from _block(group, range(start, end), styles)
        yield from _prose(others, range(start, end), width)


def _prose(columns: Sequence[_Column], rows: Sequence[int], width: int) -> Iterator[tuple[str, StyleType]]:
    """What fits beside no name: row by row, below."""
    key, *others = columns
    for column in others:
        if _total([key, column]) > width:
            if len(rows) > 1:
                yield from (("", ""), *[(column.name, "bold")] * bool(column.name))
            for i in rows:
                if column.cells[i]:
                    text = f"{key.cells[i]}: {column.cells[i]}"
                    yield from ((line, "") for line in _wrap(text, width, indent=GAP))


def fold(text: str, width: int | None) -> list[str]:
    """The text in lines of at most `width`, broken after a comma, semicolon or colon where one is there."""
    if width is None or len(text) <= width:
        return [text] if text else []
    folded = [""]
    for part in re.split(r"(?<=[,;:]) ", text):
        joined = f"{folded[-1]} {part}".strip()
        if len(joined) <= width:
            folded[-1] = joined
        else:
            *before, last = _wrap(part, width) or [""]
            folded += [*before, last]
    return [line for line in folded if line]


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
