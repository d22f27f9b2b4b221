"""Cutting files and documents into chunks that can be pre-tokenised apart, so that memory and parallelism are free.

    Cutter(specials, pattern).find(data, at)            the first safe cut
    file_ranges(path, cutter, size) -> [(start, stop)]  a file in pieces for several processes
    cut_stream(blocks, cutter, size)                    any bytes in pieces
    document_chunks(documents, cutter, size)            documents in chunks: valid UTF-8, special tokens as separators

A cut is safe when the pre-tokens of the two sides, put end to end, are those of the whole. With the GPT-2 pattern that
holds between an ASCII letter or digit and an ASCII character that is neither: no pre-token crosses such a place, and
the pattern looks ahead only inside white space. With its descendants it holds where that character is a space or line
end. With any other pattern nothing is known, so cuts fall only where a special token starts. Either way no special
token may lie across the cut, and both sides decode alike, since a byte that starts a character ends every invalid
sequence before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import IO

from ..inputs import open_text
from ..sizes import CHUNK, TASK, WINDOW
from .patterns import GPT2_PATTERN, Pattern, compile_pattern, is_gpt2, is_vectorised
from .specials import Specials
from .text import SEPARATOR, repair, utf8

_WORD_END = re.compile(rb"(?<=[0-9A-Za-z])[^0-9A-Za-z\x80-\xff]")
_WORD_BEFORE_SPACE = re.compile(rb"(?<=[0-9A-Za-z])[ \n]")
_WORD_BEFORE_BLANK = re.compile(rb"(?<=[0-9A-Za-z]) ")


class Cutter:
    """Finds safe cuts for one set of special tokens and one pattern."""

    def __init__(self, specials: Specials, pattern: Pattern = GPT2_PATTERN, *, only_at_spaces: bool = False) -> None:
        compile_pattern(pattern)
        self.specials = specials
        self.pattern = pattern
        self.inside_documents = is_vectorised(pattern)
        self._word_end = _WORD_END if is_gpt2(pattern) else _WORD_BEFORE_SPACE
        if only_at_spaces:
            self._word_end = _WORD_BEFORE_BLANK
        # Bytes needed on both sides of a cut to tell that it is safe.
        self.margin = max(1, specials.max_length)

    def find(self, data: bytes, at: int) -> int:
        """The first safe cut of `data` at or after `at`, or -1 when `data` shows none.

        data: starts at a safe cut, or at least `margin` bytes before `at`.
        """
        limit = len(data) - self.margin
        for cut in self._candidates(data, at):
            if cut > limit:
                break
            if not self.specials.across(data[max(0, cut - self.margin) : cut], data[cut : cut + self.margin]):
                return cut
        return -1

    def _candidates(self, data: bytes, at: int) -> Iterator[int]:
        if self.inside_documents:
            return (match.start() for match in self._word_end.finditer(data, at))
        return self.specials.starts(data, at)

    def mask(self, data: bytes) -> bytes:
        """`data` as valid UTF-8 with a SEPARATOR for each special token: what pretokenize takes."""
        return self.specials.mask(repair(data))


def file_ranges(
    path: str | os.PathLike[str], cutter: Cutter, size: int = TASK, part: int = 0, n_parts: int = 1
) -> list[tuple[int, int]]:
    """The file as consecutive (start, stop) in bytes, each about `size` long, with safe cuts between.

    part, n_parts: of so many parts of the file, about equal, the one with this number, from 0.
    Raises FileNotFoundError when there is no such file, ValueError when it is no text.
    """
    size = max(size, cutter.margin)
    with open_text(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        cuts = [_cut_after(file, n_bytes * part // n_parts, n_bytes, cutter)]
        end = _cut_after(file, n_bytes * (part + 1) // n_parts, n_bytes, cutter)
        while (cut := _cut_after(file, cuts[-1] + size, n_bytes, cutter)) < end:
            cuts.append(cut)
    cuts.append(end)
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]


def _cut_after(file: IO[bytes], at: int, n_bytes: int, cutter: Cutter) -> int:
    """The file's first safe cut at or after `at`: its beginning and its end are cuts too."""
    at = max(at, cutter.margin) if at else 0
    while 0 < at < n_bytes:
        file.seek(at - cutter.margin)
        window = file.read(cutter.margin + WINDOW)
        cut = cutter.find(window, cutter.margin)
        if cut >= 0:
            return at - cutter.margin + cut
        at += max(1, len(window) - 2 * cutter.margin)
    return min(at, n_bytes)


def cut_stream(blocks: Iterable[bytes], cutter: Cutter, size: int) -> Iterator[bytes]:
    """b"".join(blocks) in pieces with safe cuts between, of `size` bytes or little more where there are any.

    Whatever is cut is cut here: files in chunks of arrays' sizes, streams in bounded memory, long documents.
    """
    held: list[bytes] = []
    n, wanted = 0, size
    for block in blocks:
        held.append(block)
        n += len(block)
        if n <= wanted:
            continue
        data = b"".join(held)
        start = 0
        while (cut := cutter.find(data, start + size)) >= 0:
            yield data[start:cut]
            start = cut
        data = data[start:]
        held, n = [data], len(data)
        # Text without a place to cut is not searched again for every block.
        wanted = max(size, 2 * n)
    data = b"".join(held)
    if data:
        yield data


def document_chunks(documents: Iterable[str], cutter: Cutter, size: int = CHUNK) -> Iterator[bytes]:
    """The documents, each a str, in chunks of about `size` bytes, ready for pretokenize: a SEPARATOR between documents.

    And at cuts in long ones, where it changes nothing.
    """
    pack: list[bytes] = []
    packed = 0
    for document in documents:
        if not isinstance(document, str):
            raise ValueError(f"documents: got {type(document).__name__}, expected str")
        for piece in cut_stream([utf8(document)], cutter, size):
            pack.append(cutter.specials.mask(piece))
            packed += len(piece)
            if packed >= size:
                yield SEPARATOR.join(pack)
                pack, packed = [], 0
    if pack:
        yield SEPARATOR.join(pack)
