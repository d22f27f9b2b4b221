"""Counting pre-tokens: exact 64-bit counts, memory bounded by the number of different pre-tokens.

A pre-token of at most 7 bytes becomes one 64-bit key, of at most 15, 23 or 31 bytes two, three or four (wordkeys.py);
each number of keys has its table. Longer pre-tokens, rare in any text, are counted in a dict, and so are a slice's
pre-tokens of 8 bytes and more where they are few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..pretokenize import PADDING, SEPARATOR, Pretokens
from ..sizes import CACHE_BITS, FEW_COUNTED, MIN_COUNT_BITS, WORDS
from ..wordkeys import LONGER, KeyTable, loader, mix, pack, unpack


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
        self._tables = [_Table(width) for width in (1, 2, 3, 4)]
        self._long: Counter[bytes] = Counter()

    def add(self, pretokens: Pretokens, counts: np.ndarray | None = None) -> None:
        """Count every pre-token once, or counts[i] times. Separators count too; `words` leaves them out."""
        data, starts, lengths = pretokens
        for at in range(0, len(starts), WORDS):
            part = slice(at, at + WORDS)
            self._add(data, starts[part], lengths[part], None if counts is None else counts[part])

    def _add(self, data: bytes, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None) -> None:
        load, origin = loader(data, starts, lengths)
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
    """Counts of words of 8 * width - 8 to 8 * width - 1 bytes.

    Before the table stands a small one without probing that fits the processor's cache and serves most words: what
    comes first keeps its slot there, and its counts move to the large table at the end.
    """

    def __init__(self, width: int) -> None:
        self.max_length = 8 * width - 1
        self._width = width
        self._cache = KeyTable.of(width, CACHE_BITS, np.int64)
        self._table = KeyTable.of(width, MIN_COUNT_BITS, np.int64)
        # Words that are not in the cache wait until they are many: a round of probing costs much however few they are.
        self._waiting: list[tuple[list[np.ndarray], np.ndarray, np.ndarray]] = []
        self._n_waiting = 0

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
        keys = pack(load, starts, lengths, self._width, self._width - 1)
        for key in keys[:-1]:
            key[longer] = 0
        cache, mixed = self._cache, mix(keys)
        slots = cache.home(mixed)
        miss = np.flatnonzero(~cache.holds(slots, keys))
        # Most words are found: count them all and take the others back.
        missed = slots.take(miss)
        if counts is None:
            if 8 * len(slots) > len(cache.values):
                cache.values += np.bincount(slots, minlength=len(cache.values))
            else:
                np.add.at(cache.values, slots, 1)
            counts = np.ones(len(miss), np.int64)
        else:
            np.add.at(cache.values, slots, counts)
            counts = counts.take(miss)
        np.subtract.at(cache.values, missed, counts)
        if len(miss):
            self._waiting.append(([key.take(miss) for key in keys], mixed.take(miss), counts))
            self._n_waiting += len(miss)
            if self._n_waiting >= WORDS // 4:
                self._count_waiting()
        return longer

    def _count_waiting(self) -> None:
        """Puts words whose slots of the cache are empty there, and counts the others in the table."""
        if not self._waiting:
            return
        columns, hashes, amounts = zip(*self._waiting, strict=True)
        keys = [np.concatenate(column) for column in zip(*columns, strict=True)]
        mixed, counts = np.concatenate(hashes), np.concatenate(amounts)
        self._waiting, self._n_waiting = [], 0
        slots = self._cache.home(mixed)
        empty = np.flatnonzero(self._cache.keys[-1].take(slots) == 0)
        if len(empty):
            self._cache.put(slots.take(empty), [key.take(empty) for key in keys])
            here = self._cache.holds(slots, keys)
            np.add.at(self._cache.values, slots[here], counts[here])
            rest = np.flatnonzero(~here)
            keys, mixed, counts = [key.take(rest) for key in keys], mixed.take(rest), counts.take(rest)
        self._count(keys, mixed, counts)

    def _count(self, keys: list[np.ndarray], mixed: np.ndarray, counts: np.ndarray) -> None:
        # At most half of the slots used, so that what waits and a slice, a third of the smallest table, fit.
        if self._table.n > len(self._table.values) // 2:
            self._table.grow(len(self._table.values).bit_length())
        slots, _ = self._table.find(keys, mixed)
        np.add.at(self._table.values, slots, counts)

    def add_entries(self, keys: list[np.ndarray], counts: np.ndarray) -> None:
        """Adds the counts of different words, given by their keys."""
        for at in range(0, len(counts), WORDS):
            part = [key[at : at + WORDS] for key in keys]
            self._count(part, mix(part), counts[at : at + WORDS])

    def entries(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The keys of every word, and its counts."""
        self._count_waiting()
        self.add_entries(*self._cache.entries())
        self._cache = KeyTable.of(self._width, CACHE_BITS, np.int64)
        return self._table.entries()

    def words(self) -> Words:
        keys, counts = self.entries()
        table, lengths = unpack(keys)
        is_word = (table[:, 0] != SEPARATOR[0]) & (keys[-1] != LONGER)
        table, lengths, counts = table[is_word], lengths[is_word], counts[is_word]
        data = table[np.arange(self.max_length + 1) < lengths[:, None]]
        return Words(data.tobytes(), lengths, counts)
