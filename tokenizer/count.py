"""Counting pre-tokens: exact 64-bit counts, memory bounded by the number of different pre-tokens.

No Python object is made per pre-token. A pre-token of at most 7 bytes becomes one 64-bit key, of at most 15, 23 or 31
bytes two, three or four: its bytes, loaded straight from the text, with its length in the last key's low byte. Whole
arrays of keys are looked up at once in an open hash table; those that find another key in their slot go on to the next
slot, a smaller array each time. Longer pre-tokens, rare in any text, are counted in a dict.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from .pretokenize import PADDING, SEPARATOR, Pretokens

_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth, multiplicative hashing)
_SLICE = 1 << 16
_MIN_BITS = 18


class Words(NamedTuple):
    """Different pre-tokens and how often each occurs, in no particular order.

    data: the words' bytes, end to end.  lengths: (n,) int64.  counts: (n,) int64.
    """

    data: bytes
    lengths: np.ndarray
    counts: np.ndarray

    def pretokens(self) -> Pretokens:
        return Pretokens(self.data + PADDING, np.cumsum(self.lengths) - self.lengths, self.lengths)

    def todict(self) -> dict[bytes, int]:
        return dict(zip(self.pretokens().tolist(), self.counts.tolist(), strict=True))

    def most_frequent(self, n: int) -> Words:
        """At most `n` words: those that occur more often than any word left out (equally frequent ones go together)."""
        if len(self.counts) <= n:
            return self
        keep = self.counts > np.partition(self.counts, len(self.counts) - n - 1)[len(self.counts) - n - 1]
        data = np.frombuffer(self.data, np.uint8)[np.repeat(keep, self.lengths)]
        return Words(data.tobytes(), self.lengths[keep], self.counts[keep])


class WordCounter:
    """Counts of pre-tokens."""

    def __init__(self) -> None:
        self._tables = [_Table(n_keys) for n_keys in (1, 2, 3, 4)]
        self._long: Counter[bytes] = Counter()

    def add(self, pretokens: Pretokens, counts: np.ndarray | None = None) -> None:
        """Count every pre-token once, or counts[i] times. Separators count too; `words` leaves them out."""
        data, starts, lengths = pretokens
        for at in range(0, len(starts), _SLICE):
            part = slice(at, at + _SLICE)
            self._add(data, starts[part], lengths[part], None if counts is None else counts[part])

    def _add(self, data: bytes, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None) -> None:
        # The 8 bytes from every offset on, as little-endian integers, without a copy.
        loads = np.ndarray((len(data) - 8,), "<u8", data, 0, (1,))
        for table in self._tables:
            fits = lengths <= table.max_length
            if table.max_length > 7 and not fits.all():
                table.add(loads, starts[fits], lengths[fits], None if counts is None else counts[fits])
            else:
                table.add(loads, starts, lengths, counts)
            longer = np.flatnonzero(~fits)
            if not len(longer):
                return
            starts, lengths = starts[longer], lengths[longer]
            counts = None if counts is None else counts[longer]
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        if counts is None:
            self._long.update([data[i:j] for i, j in spans])
        else:
            for (i, j), count in zip(spans, counts.tolist(), strict=True):
                self._long[data[i:j]] += count

    def words(self) -> Words:
        parts = [table.words() for table in self._tables]
        long = list(self._long)
        lengths = np.fromiter(map(len, long), np.int64, len(long))
        parts.append(Words(b"".join(long), lengths, np.fromiter(self._long.values(), np.int64, len(long))))
        return Words(
            b"".join(part.data for part in parts),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )


class _Table:
    """An open hash table from words of 8 * n_keys - 8 to 8 * n_keys - 1 bytes to counts, with linear probing.

    An empty slot's last key is 0, which is no word's: the low byte of a last key is the word's length.
    """

    def __init__(self, n_keys: int) -> None:
        self.max_length = 8 * n_keys - 1
        self._n_keys = n_keys
        self._allocate(_MIN_BITS)

    def _allocate(self, bits: int) -> None:
        self._bits = bits
        self._used = 0  # an upper bound
        self._keys = [np.zeros(1 << bits, np.uint64) for _ in range(self._n_keys)]
        self._counts = np.zeros(1 << bits, np.int64)

    def add(self, loads: np.ndarray, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None) -> None:
        """Count words of at most max_length bytes; in the table of one key, longer ones too, as a word without bytes.

        (That costs less than to leave them out. `words` leaves it out.)
        """
        keys = [loads[starts + 8 * k] for k in range(self._n_keys)]
        # Bytes past the word's end leave at the top; a shift of 64 or more leaves 0.
        lengths = np.minimum(lengths, self.max_length + 1)
        keys[-1] <<= ((self.max_length + 1 - lengths) * 8).view(np.uint64)
        keys[-1] |= lengths.view(np.uint64)
        self._count(keys, np.int64(1) if counts is None else counts)

    def _count(self, keys: list[np.ndarray], counts: np.ndarray) -> None:
        self._make_room()
        slot = self._home(keys)
        here = self._holds(slot, keys)
        # Nearly all keys are found at once: count them all and take the others back.
        np.add.at(self._counts, slot, counts)
        rest = np.flatnonzero(~here)
        if len(rest):
            slot = slot[rest]
            keys = [key[rest] for key in keys]
            counts = counts[rest] if counts.ndim else np.ones(len(rest), np.int64)
            np.subtract.at(self._counts, slot, counts)
        while len(rest):
            empty = self._keys[-1].take(slot) == 0
            free = slot[empty]
            self._used += len(free)
            # Of several keys that claim one slot the last is kept, in every array alike; the others go on.
            for table, key in zip(self._keys, keys, strict=True):
                table[free] = key[empty]
            here = self._holds(slot, keys)
            np.add.at(self._counts, slot[here], counts[here])
            rest = np.flatnonzero(~here)
            keys = [key[rest] for key in keys]
            counts = counts[rest]
            slot = (slot[rest] + 1) & (len(self._counts) - 1)

    def _home(self, keys: list[np.ndarray]) -> np.ndarray:
        mixed = keys[0] * _HASH
        for key in keys[1:]:
            mixed ^= key
            mixed *= _HASH
        mixed >>= np.uint64(64 - self._bits)
        return mixed.view(np.int64)

    def _holds(self, slot: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        here = self._keys[0].take(slot) == keys[0]
        for table, key in zip(self._keys[1:], keys[1:], strict=True):
            here &= table.take(slot) == key
        return here

    def _make_room(self) -> None:
        """At most half of the slots used, so that a slice of new words, a quarter of the smallest table, fits."""
        if self._used <= len(self._counts) // 2:
            return
        full = np.flatnonzero(self._keys[-1])
        self._used = len(full)
        if self._used <= len(self._counts) // 4:
            return
        keys, counts = [key[full] for key in self._keys], self._counts[full]
        self._allocate(self._bits + 2)
        for at in range(0, len(full), _SLICE):
            self._count([key[at : at + _SLICE] for key in keys], counts[at : at + _SLICE])

    def words(self) -> Words:
        full = np.flatnonzero(self._keys[-1])
        keys = [key[full] for key in self._keys]
        counts = self._counts[full]
        lengths = (keys[-1] & np.uint64(0xFF)).view(np.int64)
        keys[-1] >>= ((self.max_length + 1 - lengths) * 8).view(np.uint64)
        table = np.stack(keys, axis=1).astype("<u8").view(np.uint8)
        is_word = (table[:, 0] != SEPARATOR[0]) & (lengths <= self.max_length)
        table, lengths, counts = table[is_word], lengths[is_word], counts[is_word]
        data = table[np.arange(self.max_length + 1) < lengths[:, None]]
        return Words(data.tobytes(), lengths, counts)
