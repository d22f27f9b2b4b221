"""Ids that come one at a time back to text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

import numpy as np


class DecodesBytes(Protocol):
    """Of a tokenizer, what a decoder needs."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...


class IncrementalDecoder:
    """Decodes a stream of ids, holding back bytes until they complete a character.

    "".join(decoder.push(i) for i in ids) + decoder.finish() == tokenizer.decode(ids)
    """

    def __init__(self, tokenizer: DecodesBytes) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """The characters that `ids` complete; may be empty. Raises ValueError on an id out of the vocabulary."""
        some = [ids] if isinstance(ids, (int, np.integer)) else ids
        return self._utf8.decode(self._tokenizer.decode_bytes(some))

    def finish(self) -> str:
        """What is left of a character that was never completed, as U+FFFD. The decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
