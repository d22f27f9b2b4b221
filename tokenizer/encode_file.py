"""Many texts and whole files, encoded by several processes; token files.

A token file is x.bin, the ids as little-endian uint16 or uint32 and nothing else, and x.bin.json, which says which
type, how many, of how much text, and the hash of the tokenizer that made them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .chunks import file_ranges
from .encode import SpecialIds
from .progress import progress_bars
from .workers import Crew, check_num_workers

if TYPE_CHECKING:
    from .bpe import Tokenizer

FORMAT, VERSION = "rooflight-tokens", 1
# Bytes of text that a process encodes at a time.
_TASK = 1 << 22


def encode_file(
    tokenizer: Tokenizer, path: Path, out_path: Path, *, num_workers: int | None = None, progress: bool = False
) -> int:
    """See Tokenizer.encode_file."""
    num_workers = check_num_workers(num_workers)
    dtype = token_dtype(tokenizer.vocab_size)
    tasks = [(path, *span) for span in file_ranges(path, tokenizer.special_ids.cutter, _TASK)]
    n_bytes = tasks[-1][2] if tasks else 0
    n_tokens = 0
    make = partial(_FileWorker, tokenizer, dtype)
    # A reader refuses a token file without a header, but could not tell that the header is of another.
    with progress_bars(progress) as bar, atomic(out_path, replaces_first=header_path(out_path)) as out:
        advance = bar("Encoding", n_bytes)
        with Crew(make, num_workers) as crew:
            for (_, start, stop), ids in zip(tasks, crew.map(tasks), strict=True):
                out.write(ids)
                n_tokens += len(ids) // dtype.itemsize
                advance(stop - start)
    write_json(
        header_path(out_path),
        {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "n_tokens": n_tokens,
            "n_bytes": n_bytes,
        },
    )
    return n_tokens


def encode_batch(
    tokenizer: Tokenizer, texts: Iterable[str], allowed: SpecialIds, *, num_workers: int | None = None
) -> Iterator[list[int]]:
    """See Tokenizer.encode_batch."""
    make = partial(_BatchWorker, tokenizer, list(allowed.id_of))
    with Crew(make, check_num_workers(num_workers)) as crew:
        for ids, counts in crew.map(_groups(texts)):
            flat = ids.tolist()
            end = 0
            for count in counts:
                yield flat[end : end + count]
                end += count


def read_token_file(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids (read-only, not loaded) and the header. Raises ValueError when the two do not belong together."""
    header = read_json(header_path(path))
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"path: {header_path(path)} is no header of a token file of version {VERSION}")
    dtype = token_dtype(header["vocab_size"])
    if header["dtype"] != dtype.name or path.stat().st_size != header["n_tokens"] * dtype.itemsize:
        raise ValueError(f"path: {path} does not hold the {header['n_tokens']} {header['dtype']} ids of its header")
    if not header["n_tokens"]:
        return np.empty(0, dtype), header
    return np.memmap(path, dtype, mode="r"), header


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def header_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


@contextmanager
def atomic(path: Path, replaces_first: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `path` when the block ends without an exception, and vanishes otherwise.

    replaces_first: a file about `path` as it was before, removed just before.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if replaces_first is not None:
            replaces_first.unlink(missing_ok=True)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as out:
        out.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError when there is no such file, ValueError when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is no JSON: {error}") from None


class _FileWorker:
    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype

    def run(self, task: tuple[Path, int, int]) -> bytes:
        path, start, stop = task
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) < stop - start:
            raise OSError(f"{path} became shorter while it was read")
        return self._tokenizer.encode_bytes(data).astype(self._dtype).tobytes()

    def finish(self) -> None:
        pass


class _BatchWorker:
    def __init__(self, tokenizer: Tokenizer, allowed: list[str]) -> None:
        self._tokenizer = tokenizer
        self._allowed = set(allowed)

    def run(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        return self._tokenizer.encode_many(texts, allowed_special=self._allowed)

    def finish(self) -> None:
        pass


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: got {type(text).__name__}, expected str")
        group.append(text)
        size += len(text)
        if size >= _TASK:
            yield group
            group, size = [], 0
    if group:
        yield group
