"""Long texts, and many at once, through the arrays of text.py.

What other processes get of a tokenizer: it is pickled with its tables, which takes less time than to make them.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..definition import Options
from ..pretokenize import SEPARATOR, Cutter, Pattern, Specials, cut_stream, repair, utf8
from ..sizes import TASK
from .text import TextEncoder
from .words import WordEncoder

# Stands between texts that are encoded together; no vocabulary has such an id.
_END = np.iinfo(np.int32).max


class BulkEncoder:
    """Encodes by arrays, remembering words. missing: the bytes of UTF-8 that are no token."""

    def __init__(
        self, words: WordEncoder, pattern: Pattern, missing: re.Pattern[bytes] | None, options: Options
    ) -> None:
        self._words = words
        self._pattern = pattern
        self._missing = missing
        self._options = options
        self.prepares = options.nfc or options.prefix_space
        # One for each thread: its tables are written to by every call. No lock, which a fork might copy while held.
        self._local = threading.local()
        self._local.text_encoder = TextEncoder(words, pattern)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._local = threading.local()

    def encode_bytes(self, data: bytes, cutter: Cutter) -> np.ndarray:
        """Ids (int32) of UTF-8 text with the cutter's special tokens; invalid sequences are read as U+FFFD."""
        parts = [self.encode_piece(repair(piece), cutter.specials) for piece in cut_stream([data], cutter, TASK)]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def encode_piece(self, piece: bytes, allowed: Specials) -> np.ndarray:
        """Ids (int32) of UTF-8 text, a piece as cut_stream makes them."""
        return self._encode_masked(*allowed.mask_ids(piece))

    def encode_many(self, texts: Sequence[str], allowed: Specials) -> tuple[np.ndarray, list[int]]:
        """Ids (int32) of all texts, and how many each has: texts are encoded together, with separators between."""
        parts, counts = [], []
        together: list[bytes] = []
        special_ids: list[np.ndarray] = []
        size = 0
        for i, text in enumerate(texts):
            masked, ids = allowed.mask_ids(utf8(text))
            together.append(masked)
            special_ids += [ids, np.array([_END], np.int32)]
            size += len(masked)
            if size >= TASK or i == len(texts) - 1:
                encoded = self._encode_masked(SEPARATOR.join(together) + SEPARATOR, np.concatenate(special_ids))
                ends = np.flatnonzero(encoded == _END)
                counts += (np.diff(ends, prepend=-1) - 1).tolist()
                parts.append(np.delete(encoded, ends))
                together, special_ids, size = [], [], 0
        return np.concatenate(parts) if parts else np.empty(0, np.int32), counts

    def prepare(self, text: str) -> str:
        """What Options say of a text without special tokens."""
        if self._options.prefix_space and text and text[0] != " ":
            text = f" {text}"
        return unicodedata.normalize("NFC", text) if self._options.nfc else text

    def warm_up(self, data: bytes) -> None:
        """Encodes `data` without a look at bytes that are no token."""
        self._text_encoder().encode(data, np.empty(0, np.int32))

    def _encode_masked(self, data: bytes, special_ids: np.ndarray) -> np.ndarray:
        if self.prepares:
            data = SEPARATOR.join(self.prepare(part.decode()).encode() for part in data.split(SEPARATOR))
        check(data, self._missing)  # before any of its words has a number
        return self._text_encoder().encode(data, special_ids)

    def _text_encoder(self) -> TextEncoder:
        if not hasattr(self._local, "text_encoder"):
            self._local.text_encoder = TextEncoder(self._words, self._pattern)
        return self._local.text_encoder


def check(data: bytes, missing: re.Pattern[bytes] | None) -> None:
    """Raise ValueError where a byte of UTF-8 text is one of those that are no token."""
    if missing and (found := missing.search(data)):
        near = data[max(0, found.start() - 20) : found.end() + 20]
        raise ValueError(f"text: the byte {found[0]!r} has no token in this vocabulary, in {near!r}")
