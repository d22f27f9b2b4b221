"""Files in parts that are read by themselves, so that many processes, or jobs, share them.

The parts follow from the files' order, names and sizes alone, before any is opened. A part is several files, one file,
or a span of one that can be read from the middle: span k of n begins where the first document, line or place to cut
begins in the file's k-th n-th.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..inputs import COMPRESSED, is_regular, kind_of

# Of a folder these files are taken, and the first two compressed ones.
_TEXTS, _OTHERS = (".txt", ".jsonl", ".ndjson", ".json"), (".txt", ".jsonl", ".ndjson", ".parquet")
# A compressed file's text is taken to be so many times its size.
_EXPANSION = 3


class Span(NamedTuple):
    """Number k of n spans of a file; size: the bytes on disk."""

    path: str
    k: int = 0
    n: int = 1
    size: int = 0


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[Path]]:
    """The files given and those in the folders given, which are sorted; and what was left out of the folders.

    Of a folder, and the folders in it, by links too, .txt, .jsonl, .ndjson and .parquet are taken, and .txt, .jsonl,
    .ndjson and .json with .gz or .zst behind; hidden ones are not. Raises FileNotFoundError on what is not there,
    ValueError on a file given twice, a pipe, and a folder without any such file.
    """
    found: list[Path] = []
    left_out: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            files = list(_files_in(given))
            taken = [path for path in files if _is_taken(path)]
            if not taken:
                raise ValueError(f"input: {given} has no .txt, .jsonl, .ndjson or .parquet, expected one at least")
            found += taken
            left_out += [path for path in files if not _is_taken(path)]
        elif not is_regular(given):
            raise ValueError(f"input: {given} is a pipe or device, expected files, which can be read again")
        else:
            found.append(given)
    if not found:
        raise ValueError("input: got no file, expected one at least")
    seen: dict[str, Path] = {}
    for path in found:
        if (real := os.path.realpath(path)) in seen:
            raise ValueError(f"input: {path} is given twice, as {seen[real]} before")
        seen[real] = path
    return found, left_out


def _files_in(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # a link may lead back
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _is_taken(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[:-1] != [] and suffixes[-2] in _TEXTS
    return bool(suffixes) and suffixes[-1] in _OTHERS


def parts(files: Iterable[Path], size: int) -> list[list[Span]]:
    """The files in parts of about `size` bytes of text, in order. Files without bytes are in none."""
    made: list[list[Span]] = []
    room = 0
    for path in files:
        n_bytes = path.stat().st_size
        can_be_cut = path.suffix.lower() not in COMPRESSED
        text = n_bytes if can_be_cut and kind_of(path) != "rows" else n_bytes * _EXPANSION
        if not n_bytes:
            continue
        if text > size and can_be_cut:
            n = -(-text // size)
            made += [[Span(str(path), k, n, n_bytes * (k + 1) // n - n_bytes * k // n)] for k in range(n)]
            room = 0
        elif text <= room:
            made[-1].append(Span(str(path), 0, 1, n_bytes))
            room -= text
        else:
            made.append([Span(str(path), 0, 1, n_bytes)])
            room = size - text
    return made


def check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    """(i, n), of n jobs the one with number i, from 0. Raises ValueError when it is not one."""
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"shard: got {i}/{n}, expected I/N with 0 <= I < N")
    return shard
