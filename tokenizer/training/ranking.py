"""The pairs of tokens that the trainer watches, and the order in which it will merge them (see merge.py)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from ..sizes import FRONT, MAX_BATCH, MAX_PLACES, NEAR, PASSED
from ..tokens import ranges
from ..wordkeys import KeyTable, mix

_NOWHERE = np.empty(0, np.int32)

Context = Callable[[np.ndarray, tuple[int, int], int], list[int] | None]
Entry = tuple[int, bytes, bytes, int]  # count, the pair's bytes, its index: the order of the ranking


class Groups(NamedTuple):
    """Pairs, how often they occur and where.

    The i-th pair (first[i], second[i]) occurs at positions[order[starts[i]:stops[i]]] - shifts[i], and counts[i] times
    when the words' counts are heeded. Made by a merge, it takes the place of the pair (lost_first[i], lost_second[i]).
    """

    first: np.ndarray
    second: np.ndarray
    lost_first: np.ndarray
    lost_second: np.ndarray
    shifts: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    order: np.ndarray
    positions: np.ndarray


class Pairs:
    """The pairs watched: by index their tokens (names), counts and places, and a table from tokens to index.

    Index 0 stands for every pair that is not watched.
    """

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.names: list[tuple[int, int]] = [(0, 0)]
        self.positions: list[np.ndarray] = [_NOWHERE]
        self.counts = np.zeros(1 << 12, np.int64)
        self._index_of = KeyTable.of(1, 14, np.int32)

    def __len__(self) -> int:
        return len(self.names) - 1

    def watch(self, groups: Groups) -> np.ndarray:
        """Watches the pairs that reach the threshold; returns their indices."""
        hot = np.flatnonzero(groups.counts >= self.threshold)
        if not len(hot):
            return hot
        starts = groups.starts[hot]
        sizes = groups.stops[hot] - starts
        bounds = np.append(0, np.cumsum(sizes))
        positions = groups.positions.take(groups.order.take(ranges(starts, sizes)))
        positions -= np.repeat(groups.shifts[hot], sizes)
        return self.add(groups.first[hot], groups.second[hot], groups.counts[hot], positions.astype(np.int32), bounds)

    def add(
        self, first: np.ndarray, second: np.ndarray, counts: np.ndarray, positions: np.ndarray, bounds: np.ndarray
    ) -> np.ndarray:
        """Watches new pairs, the i-th at positions[bounds[i]:bounds[i + 1]]; returns their indices."""
        added = range(len(self.names), len(self.names) + len(first))
        self.names += zip(first.tolist(), second.tolist(), strict=True)
        self.positions += [positions[start:stop] for start, stop in pairwise(bounds.tolist())]
        while len(self.counts) < added.stop:
            self.counts = np.append(self.counts, np.zeros_like(self.counts))
        self.counts[added.start : added.stop] = counts
        if 4 * added.stop > len(self._index_of.values):
            self._index_of.grow((4 * added.stop).bit_length() + 1)
        keys, indices = _keys(first, second), np.arange(added.start, added.stop)
        slots, _ = self._index_of.find(keys, mix(keys))
        self._index_of.values[slots] = indices
        return indices

    def retire(self, indices: list[int]) -> None:
        """Forgets pairs that are merged."""
        self.counts[indices] = 0
        for index in indices:
            self.positions[index] = _NOWHERE

    def subtract(self, groups: Groups) -> np.ndarray:
        """Takes the groups' counts off the pairs that they replace; returns the indices of those watched."""
        keys = _keys(groups.lost_first, groups.lost_second)
        index = self._index_of.get(keys, mix(keys))
        np.subtract.at(self.counts, index, groups.counts)
        return index[index > 0]


def _keys(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    """A pair's key, which is not 0."""
    return [((first.astype(np.int64) + 1) << 32 | second).view(np.uint64)]


class Ranking:
    """The order in which watched pairs will be merged: the front, sorted, holds all pairs with counts above a bound."""

    def __init__(self, pairs: Pairs, tokens: list[bytes], context: Context) -> None:
        self._pairs = pairs
        self._tokens = tokens
        self._context = context
        self._bound = self._near_bound = 1 << 63
        self._near = np.empty(0, np.int64)  # the other pairs with counts above a lower bound, where the next are sought
        self._front: list[Entry] = []  # the first to merge comes last
        self._entries: dict[int, Entry] = {}  # the front's entries by index
        self._by_left: dict[int, dict[int, Entry]] = defaultdict(dict)  # ... and by left token
        self._by_right: dict[int, dict[int, Entry]] = defaultdict(dict)

    def add(self, indices: np.ndarray) -> None:
        """Puts those of the pairs that belong there into the front, where they are not yet."""
        counts = self._pairs.counts[indices]
        above = counts > self._bound
        near = indices[~above & (counts > self._near_bound)]
        if len(near):
            self._near = np.append(self._near, near)
        entries = []
        for index, count in zip(indices[above].tolist(), counts[above].tolist(), strict=True):
            a, b = self._pairs.names[index]
            entry = (count, self._tokens[a], self._tokens[b], index)
            entries.append(entry)
            self._by_left[a][index] = self._by_right[b][index] = entry
        self._entries.update((entry[3], entry) for entry in entries)
        if 8 * len(entries) < len(self._front):
            for entry in entries:
                insort(self._front, entry)
        else:
            self._front += entries
            self._front.sort()

    def first(self) -> Entry | None:
        """The pair that ranks first, None when no watched pair is left."""
        if len(self._front) <= FRONT // 4:
            self._lower_bound()
        return self._front[-1] if self._front else None

    def take(self, least: Entry) -> list[Entry]:
        """Takes out pairs to merge at once, none that ranks below `least`; none when no watched pair is left.

        They are the first of the ranking, and of the next ones those that may be merged before their turn (merge.py).
        """
        if self.first() is None:
            return []
        batch: list[Entry] = []
        passed: list[Entry] = []
        lefts: set[int] = set()
        rights: set[int] = set()
        n_places = 0
        for entry in islice(reversed(self._front), MAX_BATCH):
            a, b = self._pairs.names[entry[3]]
            if not batch or (a not in rights and b not in lefts and a != b and self._outranks_ties(entry, a, b)):
                if batch and entry < least:
                    break
                batch.append(entry)
                n_places += len(self._pairs.positions[entry[3]])
                if a == b or n_places > MAX_PLACES:
                    break
            else:
                passed.append(entry)
                if len(passed) == PASSED:
                    break
            lefts.add(a)
            rights.add(b)
        self._front[len(self._front) - len(batch) - len(passed) :] = passed[::-1]
        for entry in batch:
            self._forget(entry)
        return batch

    def _outranks_ties(self, entry: Entry, a: int, b: int) -> bool:
        """The theorem's second condition, for the pair (a, b) that meets the first.

        In the one word hdgc, gc outranks dg, with which it conflicts; but hd goes first, and then hdg takes its g:

        >>> from .merge import Words, _Corpus
        >>> corpus = _Corpus(Words(b"hdgc", np.array([4]), np.array([1])))
        >>> pairs = corpus.pairs(lambda counts: 1)
        >>> ranking = Ranking(pairs, [bytes([byte]) for byte in range(256)], corpus.context)
        >>> ranking.first()[1:3]
        (b'h', b'd')
        >>> {entry[1] + entry[2]: ranking._outranks_ties(entry, *entry[1], *entry[2]) for entry in ranking._front}
        {b'dg': False, b'gc': False, b'hd': True}
        """
        count, left = entry[:2]
        before = [tie for tie in self._by_right[a].values() if tie[0] == count] if a in self._by_right else ()
        after = [tie for tie in self._by_left[b].values() if tie[0] == count] if b in self._by_left else ()
        if not (before or after):
            return True

        def is_less(token: bytes) -> bool:
            return token < left and not left.startswith(token)

        def is_apart(token: bytes) -> bool:
            return not (token.startswith(left) or left.startswith(token))

        return self._all_beside(before, 0, is_less) and self._all_beside(after, 1, is_apart)

    def _all_beside(self, ties: Sequence[Entry], side: int, fits: Callable[[bytes], bool]) -> bool:
        """Whether the tokens before (0) or after (1) the middle of each of these pairs fit."""
        if not all(fits(tie[1:3][side]) for tie in ties):
            return False  # the nearest token is the pair's own
        for _, _, _, index in ties:
            tokens = self._context(self._pairs.positions[index], self._pairs.names[index], side)
            if tokens is None or not all(fits(self._tokens[token]) for token in tokens):
                return False
        return True

    def update(self, indices: np.ndarray) -> None:
        """Ranks again those of the pairs that are in front, their counts having fallen."""
        moved = [index for index in set(indices.tolist()) if index in self._entries]
        for index in moved:
            entry = self._entries[index]
            del self._front[bisect_left(self._front, entry)]
            self._forget(entry)
        self.add(np.array(moved, np.int64))

    def _forget(self, entry: Entry) -> None:
        index = entry[3]
        del self._entries[index]
        a, b = self._pairs.names[index]
        del self._by_left[a][index], self._by_right[b][index]

    def _lower_bound(self) -> None:
        """Puts the FRONT greatest counts into the front, and all that equal the least of them."""
        threshold = self._pairs.threshold
        near = self._near
        near = near[self._pairs.counts[near] > self._near_bound]  # others have fallen
        if len(near) < FRONT and self._near_bound >= threshold:
            counts = self._pairs.counts[: len(self._pairs.names)]
            self._near_bound = _greatest(counts[counts <= self._bound], NEAR, threshold) - 1
            near = np.flatnonzero((counts > self._near_bound) & (counts <= self._bound))
        counts = self._pairs.counts[near]
        lowest = _greatest(counts, FRONT, threshold)
        self._near = near[counts < lowest]
        self._bound = lowest - 1
        self.add(near[counts >= lowest])


def _greatest(counts: np.ndarray, rank: int, least: int) -> int:
    """The rank-th greatest count, `least` when that is less or there are not so many."""
    return max(least, int(np.partition(counts, -rank)[-rank])) if len(counts) >= rank else least


class Turns:
    """Merges done out of turn, given out in the order in which one at a time would be done.

    Among merges whose tokens are both there, the one that ranks first goes first.
    """

    def __init__(self) -> None:
        self._ready: list[Entry] = []  # the first to go comes last
        self._waiting: dict[int, list[tuple[Entry, tuple[int, int]]]] = {}  # by a token that is not there yet

    def add(self, batch: list[Entry], names: list[tuple[int, int]], first_id: int) -> None:
        for new, ((count, left, right, _), name) in enumerate(zip(batch, names, strict=True), first_id):
            self._waiting[new] = []
            self._put((count, left, right, new), name)

    def release(self, first: Entry | None) -> list[tuple[bytes, bytes]]:
        """The merges that go before the pair `first` and what may come of it; None: all."""
        released = []
        while self._ready and (first is None or self._ready[-1] > first):
            _, left, right, token = self._ready.pop()
            released.append((left, right))
            for entry, name in self._waiting.pop(token):
                self._put(entry, name)
        return released

    def _put(self, entry: Entry, name: tuple[int, int]) -> None:
        for token in name:
            if token in self._waiting:
                self._waiting[token].append((entry, name))
                return
        insort(self._ready, entry)
