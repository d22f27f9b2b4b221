"""Files of word counts, so that many jobs count the words of a corpus and one merges them.

A file is a zip archive of arrays (numpy's .npz): `header`, JSON, {"format", "version", "pattern", "special_tokens",
"n_bytes"}; `data`, the words' bytes end to end, in the order of their lengths and then of their bytes; `lengths` and
`counts`, int64. Equal counts are equal files.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import atomic
from ..pretokenize import PATTERNS, Pattern
from .count import WordCounter, Words

FORMAT, VERSION = "rooflight-counts", 1


def write_counts(path: Path, words: Words, special_tokens: Sequence[str], pattern: Pattern, n_bytes: int) -> None:
    """n_bytes: of the text that was counted."""
    words = _sorted(words)
    header = {"format": FORMAT, "version": VERSION, "pattern": pattern, "special_tokens": list(special_tokens)}
    encoded = json.dumps(header | {"n_bytes": n_bytes}).encode()
    with atomic(path) as out:
        np.savez(
            out,
            header=np.frombuffer(encoded, np.uint8),
            data=np.frombuffer(words.data, np.uint8),
            lengths=words.lengths,
            counts=words.counts,
        )


def read_counts(
    paths: Sequence[str | os.PathLike[str]], special_tokens: Sequence[str], pattern: Pattern
) -> tuple[Words, int]:
    """The counts of all files together, and of how many bytes of text they are.

    Raises ValueError, which names the file, on one given twice, damaged, or counted with another pattern or other
    special tokens.
    """
    counter = WordCounter()
    total = 0
    seen: set[str] = set()
    for path in paths:
        name = os.fspath(path)
        if os.path.realpath(name) in seen:
            raise ValueError(f"counts: {name} is given twice, its words would count double")
        seen.add(os.path.realpath(name))
        words, header = _read(name)
        for key, expected in (("pattern", pattern), ("special_tokens", list(special_tokens))):
            if (found := header[key]) != json.loads(json.dumps(expected)):
                raise ValueError(f"counts: {name} was made with the {key} {_named(found)}, expected {_named(expected)}")
        if len(words.counts):
            counter.add(words.pretokens(), words.counts)
        total += header["n_bytes"]
    return counter.words(), total


def _named(value: Pattern | list[str]) -> str:
    """A pattern's name, if it has one, or what it is."""
    return next((name for name, pattern in PATTERNS.items() if pattern == value), repr(value))


def _read(path: str) -> tuple[Words, dict]:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if (header["format"], header["version"]) != (FORMAT, VERSION):
                raise ValueError(f"version {header['version']}")
            words = Words(file["data"].tobytes(), file["lengths"], file["counts"])
            if len(words.lengths) != len(words.counts) or words.lengths.sum() != len(words.data):
                raise ValueError("arrays of other lengths")
            return words, header
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(
            f"counts: {path} is no file of counts of version {VERSION}, expected one that `rooflight tokenizer count` "
            f"wrote: {e}"
        ) from None


def _sorted(words: Words) -> Words:
    """In the order of lengths, then of bytes."""
    order = np.argsort(words.lengths, kind="stable")
    starts, lengths = (np.cumsum(words.lengths) - words.lengths)[order], words.lengths[order]
    counts = words.counts[order]
    data = np.frombuffer(words.data, np.uint8)
    parts = []
    for length in np.unique(lengths):
        here = slice(*np.searchsorted(lengths, [length, length + 1]))
        matrix = data[starts[here, None] + np.arange(length)]
        by_bytes = np.argsort(matrix.view(f"S{length}").ravel(), kind="stable")
        parts.append(matrix[by_bytes].tobytes())
        counts[here] = counts[here][by_bytes]
    return Words(b"".join(parts), lengths, counts)
