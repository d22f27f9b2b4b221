"""What spans of files hold, in blocks of a few megabytes that any process can take apart.

blocks(span, cutter, size, field)     text, raw JSON lines and rows of Parquet, in order: next to no work
documents(block, field)               the texts of lines and rows: JSON is read here
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import IO, NamedTuple, TypeVar

from ..inputs import is_cuttable, kind_of, open_text, place
from ..pretokenize import Cutter, cut_stream, file_ranges
from .parts import Span

# Rows of a Parquet file that become Python objects at a time.
_ROWS = 64
_BOM = b"\xef\xbb\xbf"

Item = TypeVar("Item")


class Range(NamedTuple):
    """Bytes start to stop of a text file, which whoever gets this reads. ends: whether the file's text ends there."""

    path: str
    start: int
    stop: int
    ends: bool

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} became shorter while it was read")
        return data


class Text(NamedTuple):
    """A piece of a text file. ends: whether the file's text ends with it."""

    path: str
    data: bytes
    ends: bool

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


class Lines(NamedTuple):
    """Whole lines of JSON, and where they stand: from `offset` on in what the file holds, where `line` begins.

    line: from 1, or None in a file's later spans, which know only the offset.
    """

    data: bytes
    path: str
    offset: int
    line: int | None

    @property
    def size(self) -> int:
        return len(self.data)


class Rows(NamedTuple):
    """Texts of a Parquet file, None where it has none. size: in bytes."""

    path: str
    texts: list[str | None]
    size: int


Block = Range | Text | Lines | Rows


def blocks(span: Span, cutter: Cutter, size: int, field: str = "") -> Iterator[tuple[Block, int]]:
    """What the span holds, in blocks of about `size` bytes, and how many bytes of the file each took.

    cutter: for text.  field: the column, of a Parquet file.
    Raises ValueError on a file that is not what its name says, and ImportError without a module that reads it.
    """
    kind = kind_of(span.path)
    if kind == "rows":
        return _rows(span, size, field)
    if not (cuttable := is_cuttable(span.path)) and span.n > 1:  # each of the spans would be all of it
        raise ValueError(f"path: {span.path!r} is compressed, expected a name that ends in .gz or .zst")
    if kind == "lines":
        return _lines(span, size)
    return _ranges(span, cutter, size) if cuttable else _pieces(span, cutter, size)


def _ranges(span: Span, cutter: Cutter, size: int) -> Iterator[tuple[Block, int]]:
    n_bytes = os.stat(span.path).st_size
    for start, stop in file_ranges(span.path, cutter, size, span.k, span.n):
        yield Range(span.path, start, stop, stop == n_bytes), stop - start


def _pieces(span: Span, cutter: Cutter, size: int) -> Iterator[tuple[Block, int]]:
    with open_text(span.path) as file:
        pieces = cut_stream(iter(partial(file.read, size), b""), cutter, size)
        read = _progress(file, 0)
        for piece, is_last in with_last(pieces):
            yield Text(span.path, piece, is_last), read()


def _lines(span: Span, size: int) -> Iterator[tuple[Block, int]]:
    stop = None
    if span.n > 1:
        n_bytes = os.stat(span.path).st_size
        start, stop = (n_bytes * k // span.n for k in (span.k, span.k + 1))
    with open_text(span.path) as file:
        offset, line = 0, 1 if span.k == 0 else None
        if span.k:
            file.seek(start - 1)
            offset = start - 1 + len(file.readline())  # the line that begins before belongs to the span before
        read = _progress(file, offset)
        while (left := size if stop is None else min(size, stop - offset)) > 0:
            data = file.read(left)
            if not data.endswith(b"\n"):
                data += file.readline()
            if not data:
                break
            yield Lines(data, span.path, offset, line), read()
            offset += len(data)
            line = None if line is None else line + data.count(b"\n")


def _progress(file: IO[bytes], before: int) -> Callable[[], int]:
    """Gives, each time, how many bytes of the file on disk were read since the last, at first since `before`."""

    def read() -> int:
        nonlocal before
        last, before = before, place(file)
        return before - last

    return read


def _rows(span: Span, size: int, field: str) -> Iterator[tuple[Block, int]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            f"{span.path!r} is a Parquet file, which pyarrow reads: pip install 'rooflight[data]'"
        ) from None
    try:
        # Without a buffer's size, or with pre_buffer, a group's whole column is read at once, often the file's.
        with pq.ParquetFile(span.path, buffer_size=1 << 20, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(f"has no column {field!r}, but {', '.join(map(repr, file.schema_arrow.names))}")
            n = file.num_row_groups
            groups = range(n * span.k // span.n, n * (span.k + 1) // span.n)
            n_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            done = n_bytes = 0
            texts: list[str | None] = []
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=[field]):
                for value in batch.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise ValueError(f"has {type(value).__name__} in the column {field!r}, expected text")
                    texts.append(value)
                    n_bytes += len((value or "").encode())
                    if n_bytes >= size:
                        before, done = done, done + len(texts)
                        yield Rows(span.path, texts, n_bytes), span.size * done // n_rows - span.size * before // n_rows
                        texts, n_bytes = [], 0
            if texts:
                yield Rows(span.path, texts, n_bytes), span.size - span.size * done // n_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"path: {span.path!r}: {error}") from None


def documents(block: Lines | Rows, field: str) -> list[str]:
    """The documents, those without text as "". A lone surrogate in JSON is read as U+FFFD, as invalid UTF-8 in text.

    Raises ValueError, which names the file and line, on a line that is no JSON object with a text in `field`.
    """
    if isinstance(block, Rows):
        return [text or "" for text in block.texts]
    data = block.data.removeprefix(_BOM) if block.offset == 0 else block.data
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise _wrong(block, data.count(b"\n", 0, error.start), f"is no UTF-8, expected JSON: {error}") from None
    found = []
    for n, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, RecursionError) as error:
            raise _wrong(block, n, f"is no JSON, expected an object on each line: {error}") from None
        except (KeyError, TypeError, IndexError):
            content = json.loads(line)
            keys = ", ".join(map(repr, islice(content, 20))) if isinstance(content, dict) else type(content).__name__
            raise _wrong(
                block, n, f"has no field {field!r}, expected an object with it, got {keys or 'none'}"
            ) from None
        if text is not None and not isinstance(text, str):
            raise _wrong(block, n, f"has {type(text).__name__} in the field {field!r}, expected text")
        found.append(_repaired(text or ""))
    return found


def _repaired(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _wrong(block: Lines, n: int, what: str) -> ValueError:
    """What is wrong with the n-th of the lines."""
    line = block.line
    if line is None:
        with open(block.path, "rb") as file:
            left, line = block.offset, 1
            while left and (data := file.read(min(left, 1 << 20))):
                left -= len(data)
                line += data.count(b"\n")
    return ValueError(f"{block.path}, line {line + n}: {what}")


def with_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether it is the last."""
    missing = object()
    iterator = iter(items)
    item = next(iterator, missing)
    while item is not missing:
        following = next(iterator, missing)
        yield item, following is missing  # type: ignore[misc]
        item = following
