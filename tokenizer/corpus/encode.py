"""Blocks of text, JSON lines and rows to ids, in every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ..encoding import cutter_of
from ..files import token_dtype
from ..inputs import count_odd
from ..pretokenize import cut_stream, utf8
from ..sizes import TASK
from ..tokenizer import Tokenizer
from .documents import Block, Lines, Range, Rows, Text, documents


class Task(NamedTuple):
    """What is encoded at a time. number: in its part.  ends: whether the part ends with it.  n_read: bytes on disk."""

    part: int
    number: int
    ends: bool
    n_read: int
    blocks: list[Block]


class Result(NamedTuple):
    """Of a task. ids: as they are in a token file.  n_bytes: of text, without what became eod.  n_empty: documents
    without text.  n_odd: of text files, how many NUL and U+FFFD, and in how many bytes."""

    part: int
    number: int
    ends: bool
    n_read: int
    ids: bytes
    n_tokens: int
    n_bytes: int
    n_documents: int
    n_empty: int
    n_odd: np.ndarray


class EncodeWorker:
    """Encodes tasks. Documents that stand in a text one after another are told apart by eod, if there is one."""

    def __init__(self, tokenizer: Tokenizer, eod: str | None, field: str, allow_special: bool) -> None:
        self._tokenizer = tokenizer
        self._eod_id = None if eod is None else tokenizer.special_tokens[eod]
        self._eod_size = 0 if eod is None else len(utf8(eod))
        self._field = field
        every = set(tokenizer.special_tokens) if allow_special else set[str]()
        self._allowed_in_documents, self._allowed_in_text = every, every | ({eod} if eod is not None else set())
        # (Of all special tokens it would cut where a pattern of one's own must not: before one that is ordinary text.)
        self._cutter = cutter_of(tokenizer.definition, every)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def run(self, task: Task) -> Result:
        parts = [np.empty(0, np.int32)]
        n_bytes = n_documents = n_empty = 0
        n_odd = np.zeros(3, np.int64)
        for are_documents, blocks in groupby(task.blocks, lambda block: isinstance(block, Lines | Rows)):
            group = list(blocks)
            if are_documents:
                found = [text for block in group for text in documents(block, self._field)]  # type: ignore[arg-type]
                texts = list(filter(None, found))
                n_empty += len(found) - len(texts)
                size = sum(map(len, map(utf8, texts)))
                with _naming(group):
                    ids, counts = self._encode_documents(texts)
                ends = [True] * len(texts)
            else:
                texts, ends, size = self._read(group, n_odd)  # type: ignore[arg-type]
                with _naming(group):
                    ids, counts = self._tokenizer.encode_many(texts, allowed_special=self._allowed_in_text)
            ids, size, n = self._end(ids, np.cumsum(counts, dtype=np.int64)[ends], size)
            parts.append(ids)
            n_bytes += size
            n_documents += n
        # Of no text there are no tokens either, not even eod's: a token file cannot say how many bits a byte takes.
        ids = np.concatenate(parts if n_bytes else parts[:1]).astype(self._dtype)
        n_documents = n_documents if n_bytes else 0
        return Result(*task[:4], ids.tobytes(), len(ids), n_bytes, n_documents, n_empty, n_odd)

    def _encode_documents(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """As Tokenizer.encode_many, but long texts do not go through its arrays as a whole."""
        pieces: list[str] = []
        firsts = []
        for text in texts:
            firsts.append(len(pieces))
            if len(text) < TASK:
                pieces.append(text)
            else:
                pieces += (piece.decode() for piece in cut_stream([utf8(text)], self._cutter, TASK))
        ids, counts = self._tokenizer.encode_many(pieces, allowed_special=self._allowed_in_documents)
        return ids, np.add.reduceat(counts, firsts).tolist() if firsts else []

    def _read(self, blocks: Iterable[Range | Text], n_odd: np.ndarray) -> tuple[list[str], list[bool], int]:
        """The texts, whether a document ends with each, and their size in bytes."""
        texts, ends, size = [], [], 0
        for block in blocks:
            data = block.read()
            size += len(data)
            texts.append(data.decode("utf-8", "replace"))
            ends.append(block.ends)
            n_odd += [*count_odd(data if data.isascii() else utf8(texts[-1])), len(data)]
        return texts, ends, size

    def _end(self, ids: np.ndarray, ends: np.ndarray, size: int) -> tuple[np.ndarray, int, int]:
        """The ids with eod at each of the `ends` where there is none yet, the text's bytes without eod's, and the
        number of documents. size: the text's bytes."""
        ends = ends[np.diff(ends, prepend=0) > 0]  # a pattern of one's own may leave nothing of a document
        if self._eod_id is None:
            return ids, size, len(ends)
        written = int(np.count_nonzero(ids == self._eod_id))
        missing = ends[ids[ends - 1] != self._eod_id]
        return np.insert(ids, missing, self._eod_id), size - written * self._eod_size, written + len(missing)


@contextmanager
def _naming(blocks: list[Block]) -> Iterator[None]:
    """Says of which files a text is that cannot be encoded: a vocabulary may lack single bytes."""
    try:
        yield
    except ValueError as error:
        files = ", ".join(sorted({block.path for block in blocks}))
        raise ValueError(f"{files}: {error}") from None
