"""The pairs of tokens that the trainer watches, and the order in which it will merge them (see merge.py)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

_FRONT = 512  # pairs kept sorted: several batches, at a cost well below one
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth, multiplicative hashing)
_NOWHERE = np.empty(0, np.int32)

_Entry = tuple[int, bytes, bytes, int]  # count, the pair's bytes, its index: the order of the ranking


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
    """The pairs watched: by index their tokens (names), counts and places, and an open hash table from tokens to index.

    Index 0 stands for every pair that is not watched.
    """

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.names: list[tuple[int, int]] = [(0, 0)]
        self.positions: list[np.ndarray] = [_NOWHERE]
        self.counts = np.zeros(1 << 12, np.int64)
        self._bits = 14
        self._codes = np.zeros(1 << self._bits, np.uint64)
        self._indices = np.zeros(1 << self._bits, np.int32)

    def watch(self, groups: Groups) -> np.ndarray:
        """Watches the pairs that reach the threshold; returns their indices."""
        hot = np.flatnonzero(groups.counts >= self.threshold)
        if not len(hot):
            return hot
        first, second = groups.first[hot], groups.second[hot]
        added = range(len(self.names), len(self.names) + len(hot))
        self.names += zip(first.tolist(), second.tolist(), strict=True)
        starts = groups.starts[hot]
        sizes = groups.stops[hot] - starts
        stops = np.cumsum(sizes)
        chosen = np.arange(stops[-1])
        chosen += np.repeat(starts - stops + sizes, sizes)
        positions = groups.positions[groups.order[chosen]]
        positions -= np.repeat(groups.shifts[hot], sizes)
        positions = positions.astype(np.int32)
        bounds = [0, *stops.tolist()]
        self.positions += [positions[start:stop] for start, stop in pairwise(bounds)]
        while len(self.counts) < added.stop:
            self.counts = np.append(self.counts, np.zeros_like(self.counts))
        self.counts[added.start : added.stop] = groups.counts[hot]
        if 4 * added.stop > len(self._codes):
            while 4 * added.stop > 1 << self._bits:
                self._bits += 2
            self._codes = np.zeros(1 << self._bits, np.uint64)
            self._indices = np.zeros(1 << self._bits, np.int32)
            names = np.array(self.names)
            self._insert(_code(names[1:, 0], names[1:, 1]), np.arange(1, added.stop, dtype=np.int32))
        else:
            self._insert(_code(first, second), np.arange(added.start, added.stop, dtype=np.int32))
        return np.arange(added.start, added.stop)

    def retire(self, indices: list[int]) -> None:
        """Forgets pairs that are merged."""
        self.counts[indices] = 0
        for index in indices:
            self.positions[index] = _NOWHERE

    def subtract(self, groups: Groups) -> np.ndarray:
        """Takes the groups' counts off the pairs that they replace; returns the indices of those watched."""
        code = _code(groups.lost_first, groups.lost_second)
        slot = self._home(code)
        index = np.zeros(len(code), np.int32)
        rest = np.arange(len(code))
        while len(rest):
            held = self._codes[slot]
            hit = held == code[rest]
            index[rest[hit]] = self._indices[slot[hit]]
            on = np.flatnonzero(~hit & (held != 0))
            rest, slot = rest[on], (slot[on] + 1) & (len(self._codes) - 1)
        np.subtract.at(self.counts, index, groups.counts)
        return index[index > 0]

    def _home(self, code: np.ndarray) -> np.ndarray:
        return ((code * _HASH) >> np.uint64(64 - self._bits)).view(np.int64)

    def _insert(self, code: np.ndarray, index: np.ndarray) -> None:
        slot = self._home(code)
        while len(code):
            free = self._codes[slot] == 0
            self._codes[slot[free]] = code[free]
            self._indices[slot[free]] = index[free]
            on = np.flatnonzero(self._codes[slot] != code)  # of several that claim a slot, the last is kept
            code, index, slot = code[on], index[on], (slot[on] + 1) & (len(self._codes) - 1)


def _code(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A non-zero number for each pair."""
    return ((first.astype(np.int64) + 1) << 32 | second).view(np.uint64)


class Ranking:
    """The order in which watched pairs will be merged: the front, sorted, holds all pairs with counts above a bound."""

    def __init__(self, pairs: Pairs, tokens: list[bytes]) -> None:
        self._pairs = pairs
        self._tokens = tokens
        self._bound = 1 << 63
        self._front: list[_Entry] = []  # the first to merge comes last
        self._entries: dict[int, _Entry] = {}  # the front's entries by index
        self._by_left: dict[int, set[int]] = defaultdict(set)  # the front's indices by left token
        self._by_right: dict[int, set[int]] = defaultdict(set)

    def add(self, indices: np.ndarray) -> None:
        """Puts those of the pairs that belong there into the front, where they are not yet."""
        counts = self._pairs.counts[indices]
        above = counts > self._bound
        entries = []
        for index, count in zip(indices[above].tolist(), counts[above].tolist(), strict=True):
            a, b = self._pairs.names[index]
            entries.append((count, self._tokens[a], self._tokens[b], index))
            self._by_left[a].add(index)
            self._by_right[b].add(index)
        self._entries.update((entry[3], entry) for entry in entries)
        if 8 * len(entries) < len(self._front):
            for entry in entries:
                insort(self._front, entry)
        else:
            self._front += entries
            self._front.sort()

    def take(self, room: int) -> list[int]:
        """Takes out the next pairs to merge, in order, at most `room`; none when no watched pair is left."""
        if len(self._front) <= _FRONT // 4:
            self._lower_bound()
        batch: list[_Entry] = []
        names: list[tuple[int, int]] = []
        lefts: dict[int, list[int]] = defaultdict(list)
        rights: dict[int, list[int]] = defaultdict(list)
        for entry in islice(reversed(self._front), room):
            a, b = self._pairs.names[entry[3]]
            if batch and (a in rights or b in lefts or a == b):
                break
            lefts[a].append(len(batch))
            rights[b].append(len(batch))
            batch.append(entry)
            names.append((a, b))
            if a == b:
                break
        batch = batch[: self._safe(batch, lefts, rights)]
        for entry in batch:
            self._remove(entry)
        return [entry[3] for entry in batch]

    def _safe(self, batch: list[_Entry], lefts: dict[int, list[int]], rights: dict[int, list[int]]) -> int:
        """How many of the batch can be merged together although counts are equal: see the module's proof."""
        size = len(batch)
        if size < 2:
            return size
        count = batch[-1][0]
        taken = {entry[3] for entry in batch}
        touching = {index for b in rights for index in self._by_left.get(b, ())}
        touching |= {index for a in lefts for index in self._by_right.get(a, ())}
        for index in touching - taken:
            entry = self._entries[index]
            if entry[0] != count:
                continue
            x, y = self._pairs.names[index]
            # What x and y can have become, and after which of the batch's merges.
            new_x = [(-1, entry[1])] + [(i, batch[i][1] + batch[i][2]) for i in rights.get(x, ())]
            new_y = [(-1, entry[2])] + [(i, batch[i][1] + batch[i][2]) for i in lefts.get(y, ())]
            for i, left in new_x:
                for j, right in new_y:
                    made = max(i, j)
                    if made < 0:
                        continue
                    for later in range(made + 1, size):
                        if (count, left, right) > batch[later][:3]:
                            size = later
                            break
        return size

    def update(self, indices: np.ndarray) -> None:
        """Ranks again those of the pairs that are in front, their counts having fallen."""
        moved = [index for index in set(indices.tolist()) if index in self._entries]
        for index in moved:
            self._remove(self._entries[index])
        self.add(np.array(moved, np.int64))

    def _remove(self, entry: _Entry) -> None:
        del self._front[bisect_left(self._front, entry)]
        index = entry[3]
        del self._entries[index]
        a, b = self._pairs.names[index]
        self._by_left[a].discard(index)
        self._by_right[b].discard(index)

    def _lower_bound(self) -> None:
        """Puts the _FRONT greatest counts into the front, and all that equal the least of them."""
        counts = self._pairs.counts[: len(self._pairs.names)]
        lowest = self._pairs.threshold
        if len(counts) > _FRONT:
            lowest = max(lowest, int(np.partition(counts, -_FRONT)[-_FRONT]))
        more = np.flatnonzero((counts >= lowest) & (counts <= self._bound))
        self._bound = lowest - 1
        self.add(more)
