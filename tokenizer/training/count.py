"""Counting pre-tokens: exact 64-bit counts, memory bounded by the number of different pre-tokens.

No Python object is made per pre-token. A pre-token of at most 7 bytes becomes one 64-bit key, of at most 15, 23 or 31
bytes two, three or four: its bytes, loaded straight from the text, and in the last key's low byte the number of bits
left unused, which tells its length. Whole arrays of keys are looked up at once in an open hash table; those that find
another key in their slot go on to the next slot, a smaller array each time. Longer pre-tokens, rare in any text, are
counted in a dict, and so are a slice's pre-tokens of 8 bytes and more where they are few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..pretokenize import PADDING, SEPARATOR, Pretokens
from ..sizes import CACHE_BITS, FEW_COUNTED, MIN_COUNT_BITS, WORDS

_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth, multiplicative hashing)
_LONGER = np.uint64(72)  # instead of a word's shift
_NO_COUNTS = np.empty(0, np.int64)


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


class Tally(NamedTuple):
    """A WordCounter's counts as they are passed between processes: keys and counts of each table, and long words."""

    tables: list[tuple[list[np.ndarray], np.ndarray]]
    long: Counter[bytes]


class WordCounter:
    """Counts of pre-tokens."""

    def __init__(self) -> None:
        self._tables = [_Table(n_keys) for n_keys in (1, 2, 3, 4)]
        self._long: Counter[bytes] = Counter()

    def add(self, pretokens: Pretokens, counts: np.ndarray | None = None) -> None:
        """Count every pre-token once, or counts[i] times. Separators count too; `words` leaves them out."""
        data, starts, lengths = pretokens
        for at in range(0, len(starts), WORDS):
            part = slice(at, at + WORDS)
            self._add(data, starts[part], lengths[part], None if counts is None else counts[part])

    def _add(self, data: bytes, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None) -> None:
        origin, end = int(starts[0]), int(starts[-1] + lengths[-1])
        # load(i): the 8 bytes from offset i on, as a little-endian integer. Where words are dense a copy serves faster.
        loads = np.ndarray((end + len(PADDING) - 7 - origin,), "<u8", data, origin, (1,))
        load = loads.copy().take if end - origin < 16 * len(starts) else loads.__getitem__
        if origin:
            starts = starts - origin
        few = FEW_COUNTED if counts is None else 1
        for table in self._tables:
            longer = table.add(load, starts, lengths, counts)
            starts, lengths = starts.take(longer), lengths.take(longer)
            counts = None if counts is None else counts.take(longer)
            if len(longer) < few:
                break
        starts += origin
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        if counts is None:
            self._long.update([data[i:j] for i, j in spans])
        else:
            for (i, j), count in zip(spans, counts.tolist(), strict=True):
                self._long[data[i:j]] += count

    def _settle(self) -> None:
        """Moves words that a table holds too, but that were few, from the dict there."""
        longest = self._tables[-1].max_length
        short = {word: self._long.pop(word) for word in [word for word in self._long if len(word) <= longest]}
        data, lengths = b"".join(short), np.fromiter(map(len, short), np.int64, len(short))
        pretokens = Pretokens(data + PADDING, np.cumsum(lengths) - lengths, lengths)
        self.add(pretokens, np.fromiter(short.values(), np.int64, len(short)))

    def tally(self) -> Tally:
        self._settle()
        return Tally([table.entries() for table in self._tables], self._long)

    def add_tally(self, tally: Tally) -> None:
        """Adds the counts of another counter."""
        for table, (keys, counts) in zip(self._tables, tally.tables, strict=True):
            table.add_entries(keys, counts)
        self._long.update(tally.long)

    def words(self) -> Words:
        self._settle()
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

    Before it stands a small table without probing that fits the processor's cache and serves most words: what comes
    first keeps its slot there, and its counts move to the large table at the end.

    An empty slot's last key is 0, which is no word's: the low byte of a last key is 8 to 64, or _LONGER.
    """

    def __init__(self, n_keys: int) -> None:
        self.max_length = 8 * n_keys - 1
        self._n_keys = n_keys
        # By a word's length, the bits that its last key's load is shifted by, so that bytes past its end leave at the
        # top. 64 leaves 0, as does _LONGER. Words of lengths that would be shifted by more are in the tables before.
        self._shifts = np.minimum(np.arange(8 * n_keys, -1, -1) * 8, 64).astype(np.uint64)
        self._shifts[-1] = _LONGER
        self._clear_cache()
        self._allocate(MIN_COUNT_BITS)

    def _clear_cache(self) -> None:
        self._cache_keys = [np.zeros(1 << CACHE_BITS, np.uint64) for _ in range(self._n_keys)]
        self._cache_counts = np.zeros(1 << CACHE_BITS, np.int64)

    def _allocate(self, bits: int) -> None:
        self._bits = bits
        self._used = 0  # an upper bound
        self._keys = [np.zeros(1 << bits, np.uint64) for _ in range(self._n_keys)]
        self._counts = np.zeros(1 << bits, np.int64)

    def add(
        self,
        load: Callable[[np.ndarray], np.ndarray],
        starts: np.ndarray,
        lengths: np.ndarray,
        counts: np.ndarray | None,
    ) -> np.ndarray:
        """Count the words of at most max_length bytes; returns the indices of the longer ones.

        Those are counted too, as a word without bytes that `words` leaves out: that costs less than to take them out.
        """
        longer = np.flatnonzero(lengths > self.max_length)
        keys = [load(starts + 8 * k) for k in range(self._n_keys)]
        for key in keys[:-1]:
            key[longer] = 0
        shifts = self._shifts.take(lengths, mode="clip")
        keys[-1] <<= shifts
        keys[-1] |= shifts
        self._count_in_cache(keys, np.array(1) if counts is None else counts)
        return longer

    def _count_in_cache(self, keys: list[np.ndarray], counts: np.ndarray) -> None:
        """Counts words that have a slot of the cache, or find one empty, there and passes the others on."""
        mixed = self._mix(keys)
        slot = (mixed >> np.uint64(64 - CACHE_BITS)).view(np.int64)
        miss = np.flatnonzero(~_holds(self._cache_keys, slot, keys))
        # Most words are found: count them all and take the others back.
        np.add.at(self._cache_counts, slot, counts)
        if not len(miss):
            return
        slot = slot.take(miss)
        keys = [key.take(miss) for key in keys]
        counts = counts.take(miss) if counts.ndim else np.ones(len(miss), np.int64)
        np.subtract.at(self._cache_counts, slot, counts)
        empty = np.flatnonzero(self._cache_keys[-1].take(slot) == 0)
        if len(empty):
            _claim(self._cache_keys, slot, keys, empty)
            here = _holds(self._cache_keys, slot, keys)
            np.add.at(self._cache_counts, slot[here], counts[here])
            rest = np.flatnonzero(~here)
            miss, keys, counts = miss.take(rest), [key.take(rest) for key in keys], counts.take(rest)
        self._count(keys, mixed.take(miss), counts)

    def _count(self, keys: list[np.ndarray], mixed: np.ndarray, counts: np.ndarray) -> None:
        self._make_room()
        slot = (mixed >> np.uint64(64 - self._bits)).view(np.int64)
        while True:
            here = _holds(self._keys, slot, keys)
            np.add.at(self._counts, slot, counts * here)
            rest = np.flatnonzero(~here)
            if not len(rest):
                return
            slot, counts = slot.take(rest), counts.take(rest)
            keys = [key.take(rest) for key in keys]
            empty = self._keys[-1].take(slot) == 0
            claimed = np.flatnonzero(empty)
            self._used += len(claimed)
            _claim(self._keys, slot, keys, claimed)
            slot = (slot + ~empty) & (len(self._counts) - 1)

    def _mix(self, keys: list[np.ndarray]) -> np.ndarray:
        mixed = keys[0] * _HASH
        for key in keys[1:]:
            mixed ^= key
            mixed *= _HASH
        return mixed

    def _make_room(self) -> None:
        """At most half of the slots used, so that a slice of new words, a quarter of the smallest table, fits."""
        if self._used <= len(self._counts) // 2:
            return
        full = np.flatnonzero(self._keys[-1])
        self._used = len(full)
        if self._used <= len(self._counts) // 4:
            return
        keys, counts = [key[full] for key in self._keys], self._counts[full]
        self._keys, self._counts = [], _NO_COUNTS  # freed before the larger ones are made
        self._allocate(self._bits + 1)
        self.add_entries(keys, counts)

    def add_entries(self, keys: list[np.ndarray], counts: np.ndarray) -> None:
        """Adds the counts of different words, given by their keys."""
        for at in range(0, len(counts), WORDS):
            part = [key[at : at + WORDS] for key in keys]
            self._count(part, self._mix(part), counts[at : at + WORDS])

    def entries(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The keys of every word, and its counts."""
        cached = np.flatnonzero(self._cache_keys[-1])
        self.add_entries([key[cached] for key in self._cache_keys], self._cache_counts[cached])
        self._clear_cache()
        full = np.flatnonzero(self._keys[-1])
        return [key[full] for key in self._keys], self._counts[full]

    def words(self) -> Words:
        keys, counts = self.entries()
        shifts = keys[-1] & np.uint64(0xFF)
        keys[-1] >>= shifts
        lengths = self.max_length + 1 - (shifts // np.uint64(8)).view(np.int64)
        table = np.stack(keys, axis=1).astype("<u8").view(np.uint8)
        is_word = (table[:, 0] != SEPARATOR[0]) & (shifts < _LONGER)
        table, lengths, counts = table[is_word], lengths[is_word], counts[is_word]
        data = table[np.arange(self.max_length + 1) < lengths[:, None]]
        return Words(data.tobytes(), lengths, counts)


def _holds(table: list[np.ndarray], slot: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    """Whether table[slot[i]] holds keys[i]."""
    here = table[0].take(slot) == keys[0]
    for column, key in zip(table[1:], keys[1:], strict=True):
        here &= column.take(slot) == key
    return here


def _claim(table: list[np.ndarray], slot: np.ndarray, keys: list[np.ndarray], empty: np.ndarray) -> None:
    """Puts the keys at `empty` into their slots. Of several for one slot the last is kept, alike in every column."""
    slot = slot[empty]
    for column, key in zip(table, keys, strict=True):
        column[slot] = key[empty]
