"""Whole texts to token ids: special tokens, then pre-tokens, then words. Short texts go word by word through a
dictionary, long ones through the arrays of encode_text.py; the ids are the same."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np

from .chunks import Cutter
from .decode import TokenBytes
from .encode_text import TextEncoder
from .encode_words import Merges
from .pretokenize import SEPARATOR, Specials, compile_pattern, is_vectorised, pretokenize, utf8

# Bytes of text encoded at a time; what the arrays hold for them is some ten times as much.
PIECE = 1 << 20
# Characters below which a dictionary look-up for each word costs less than starting up the arrays.
SHORT_TEXT = 3 << 10
# Words that short texts left behind; past it all are forgotten, so that no text makes the memory grow without bound.
MAX_WORDS = 1 << 16
# Longer words than this are rarely met again and are not remembered.
MAX_WORD_CHARACTERS = 1 << 8

# Stands between texts that are encoded together; no vocabulary has such an id.
_END = np.iinfo(np.int32).max

# GPT-2's pattern on ASCII text, for Python's own engine, which takes half the time of `regex`.
_ASCII_WORDS = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^ \t-\rA-Za-z0-9]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+"
)


class SpecialIds:
    """The special tokens that stand for themselves in a text, with their ids."""

    def __init__(self, id_of: Mapping[str, int], pattern: str) -> None:
        self.id_of = id_of
        self.specials = Specials(id_of)
        self.cutter = Cutter(self.specials, pattern)
        self._id_of_bytes = dict(zip(self.specials.encoded, id_of.values(), strict=True))
        longest_first = sorted(id_of, key=lambda token: len(token.encode()), reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if id_of else None

    def split(self, text: str) -> list[str]:
        """The text's parts: ordinary text and special tokens, alternating."""
        # Looking for each token by itself is the faster, and mostly there is none.
        if self._pattern is None or not any(token in text for token in self.id_of):
            return [text]
        return self._pattern.split(text)

    def mask(self, data: bytes) -> tuple[bytes, np.ndarray]:
        """The text with a SEPARATOR for each special token, and the special tokens' ids."""
        masked = self.specials.mask(data)
        if masked is data or SEPARATOR not in masked:
            return data, np.empty(0, np.int32)
        if len(self._id_of_bytes) == 1:
            return masked, np.full(masked.count(SEPARATOR), next(iter(self.id_of.values())), np.int32)
        return masked, np.array([self._id_of_bytes[token] for token in self.specials.findall(data)], np.int32)


class Encoder:
    """Encodes texts, remembering words.

    tokens: the bytes of every id.  whole: words that are one token whatever the merges make of them.
    """

    def __init__(self, merges: Merges, pattern: str, tokens: TokenBytes, whole: Mapping[bytes, int]) -> None:
        self.pattern = pattern
        self._sizes = tokens.sizes
        self._compiled = compile_pattern(pattern)
        self._vectorised = is_vectorised(pattern)
        self._words = _Words(merges, whole)
        self._make_text_encoder = lambda: TextEncoder(merges, tokens, whole)
        # One for each thread: its tables are written to by every call. No lock, which a fork might copy while held.
        self._local = threading.local()

    def encode_short(self, text: str, allowed: SpecialIds) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(allowed.split(text)):
            if i % 2:
                ids.append(allowed.id_of[part])
            else:
                ids.extend(chain.from_iterable(map(self._words.__getitem__, self._split(part))))
        return ids

    def encode_long(self, data: bytes, allowed: SpecialIds) -> np.ndarray:
        """Ids (int32) of UTF-8 text."""
        parts = [self._encode_masked(*allowed.mask(piece)) for piece in cut_stream([data], allowed.cutter)]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def encode_many(self, texts: list[bytes], allowed: SpecialIds) -> tuple[np.ndarray, list[int]]:
        """Ids (int32) of all texts, and how many each has: texts are encoded together, with separators between."""
        parts, counts = [], []
        together: list[bytes] = []
        special_ids: list[np.ndarray] = []
        size = 0
        for i, text in enumerate(texts):
            masked, ids = allowed.mask(text)
            together.append(masked)
            special_ids += [ids, np.array([_END], np.int32)]
            size += len(masked)
            if size >= PIECE or i == len(texts) - 1:
                encoded = self._encode_masked(SEPARATOR.join(together) + SEPARATOR, np.concatenate(special_ids))
                ends = np.flatnonzero(encoded == _END)
                counts += np.diff(ends, prepend=-1).tolist()
                parts.append(np.delete(encoded, ends))
                together, special_ids, size = [], [], 0
        return np.concatenate(parts) if parts else np.empty(0, np.int32), [count - 1 for count in counts]

    def _encode_masked(self, data: bytes, special_ids: np.ndarray) -> np.ndarray:
        if not hasattr(self._local, "text_encoder"):
            self._local.text_encoder = self._make_text_encoder()
        return self._local.text_encoder.encode(pretokenize(data, self.pattern), special_ids)

    def encode_with_offsets(self, text: str, allowed: SpecialIds) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the (start, end) of each one's characters in `text`."""
        sizes = self._sizes.tolist()
        data = utf8(text)
        masked, special_ids = allowed.mask(data)
        special_id = iter(special_ids.tolist())
        ids: list[int] = []
        spans: list[tuple[int, int]] = []  # in bytes
        longer = 0  # by so much are the special tokens so far longer than their separators
        padded, starts, lengths = pretokenize(masked, self.pattern)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            word = padded[start : start + length]
            tokens = [next(special_id)] if word == SEPARATOR else self._words[word.decode()]
            start += longer
            for token in tokens:
                ids.append(token)
                spans.append((start, start + sizes[token]))
                start = spans[-1][1]
            if word == SEPARATOR:
                longer += sizes[tokens[0]] - 1
        if not text.isascii():
            # The character that each byte belongs to: as many have started as there are bytes that continue none.
            lead = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
            character = (np.cumsum(lead) - 1).tolist()
            spans = [(character[start], character[end - 1] + 1) for start, end in spans]
        return ids, spans

    def _split(self, text: str) -> list[str]:
        if not self._vectorised:
            return [match[0] for match in self._compiled.finditer(text)]
        return (_ASCII_WORDS if text.isascii() else self._compiled).findall(text)


class _Words(dict[str, list[int]]):
    """Words and their ids, filled as words are asked for."""

    def __init__(self, merges: Merges, whole: Mapping[bytes, int]) -> None:
        super().__init__()
        self._merges = merges
        self._whole = whole

    def __missing__(self, word: str) -> list[int]:
        data = utf8(word)
        ids = [self._whole[data]] if data in self._whole else self._merges.encode_word(data)
        if len(word) <= MAX_WORD_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def cut_stream(blocks: Iterable[bytes], cutter: Cutter, size: int = PIECE) -> Iterator[bytes]:
    """b"".join(blocks) in pieces that encode apart as they do together, of `size` bytes or little more if they can."""
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
