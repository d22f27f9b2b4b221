"""The trainer: merges of the most frequent pair of neighbouring tokens, on whole arrays at a time.

All words lie end to end in one array of tokens (_Corpus). For every pair worth watching, its count and the places where
it occurs are kept (_Pairs); a merge rewrites its places, and what happens around them changes the counts: a place
whose left neighbour was L loses a pair (L, a) and gains a pair (L, ab), and likewise on the right. One sort of
(neighbour, place) groups the gains and the losses alike.

A merge alone would be too small for an array operation, so merges are done in batches: the longest run of pairs from
the top of the ranking that cannot disturb each other. The ranking is by count, and by the pair of bytes where counts
are equal, greatest first. Let p_1, ..., p_k be its first pairs.

    Invariant. Suppose that no p_j's left token is a p_i's right token (a pair of twice the same token is a batch of its
    own), and that no pair which merging p_1, ..., p_i can create ranks above any of p_{i+1}, ..., p_k. Then merging one
    pair at a time merges p_1, ..., p_k in this order, and merging them at once leaves the same tokens.

    Proof. Occurrences of different p_i do not overlap, so none of these merges changes another one's count, and counts
    of other old pairs only fall. A new pair holds a new token, so it comes from an old pair q = (b, y), (x, a) or
    (b, c), where p_i = (a, b) and p_j = (c, d). It occurs at most as often as q, which is not one of the p_i and so
    ranks below p_k. Hence it can rank above a p_j only if q, p_j and p_k have equal counts, and by its bytes.
    _Ranking._safe looks for such q and ends the batch before the first p_j at risk.

Pairs below a threshold count are not watched. When the watched ones are used up, the array is compacted and the pairs
are counted again with a lower threshold: a new epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from .count import Words

MAX_TOKENS = 1 << 21
_MAX_BATCH = 1 << 11
_FRONT = 512
_BOUNDARY = np.int32(2**31 - 1)  # between words
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth, multiplicative hashing)

_Entry = tuple[int, bytes, bytes, int]  # count, the pair's bytes, its index: the order of the ranking


def learn_merges(
    words: Words, n_merges: int, advance: Callable[[int], None] = lambda n: None
) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges, fewer when no pair is left.

    Each takes the most frequent pair of neighbouring tokens within words, of equally frequent ones the greatest pair of
    bytes, and joins its occurrences from the left. `advance` is told of merges as they are done.
    Raises ValueError when the words are too long in all for 31-bit positions.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    corpus = _Corpus(words, len(tokens) + n_merges)
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        found = corpus.pairs()
        if not len(found.counts):
            break
        threshold = _threshold(found.counts, n_merges, len(merges))
        pairs = _Pairs(threshold)
        ranking = _Ranking(pairs, tokens)
        pairs.watch(found)
        del found
        while batch := ranking.take(min(_MAX_BATCH, n_merges - len(merges))):
            names = [pairs.names[index] for index in batch]
            first_id = len(tokens)
            merges += [(tokens[a], tokens[b]) for a, b in names]
            tokens += [tokens[a] + tokens[b] for a, b in names]
            made = corpus.merge([pairs.positions[index] for index in batch], np.array(names).T, first_id)
            pairs.retire(batch)
            ranking.update(np.concatenate([pairs.subtract(groups) for groups in made]))
            for groups in made:
                ranking.add(pairs.watch(groups))
            advance(len(batch))
        if len(merges) < n_merges:
            corpus.compact()
    return merges


def _threshold(counts: np.ndarray, n_merges: int, n_done: int) -> int:
    """From which count on pairs are watched for the merges still to do. It bears on speed and memory alone.

    Too low, pairs are watched in vain; too high, there is one more epoch. The first epoch sees pairs of bytes, few and
    frequent; its rank is one that took 32,000 merges of English, code and text in ten scripts in one epoch or two.
    """
    watched = 2 * (n_merges - n_done) + 500
    if not n_done:
        watched = min(watched, 3500 + n_merges // 20, 7 * len(counts) // 10)
    return int(np.partition(counts, -watched)[-watched]) if 0 < watched < len(counts) else 1


class _Groups(NamedTuple):
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


class _Corpus:
    """All words end to end in one array of tokens, with a boundary between words and at both ends.

    A token that spans i to j - 1 has its id at i and, when longer than 1, ~id at j - 1; between them stands anything
    negative. So a token can be told from either end, and its neighbours are found next to its ends.
    """

    def __init__(self, words: Words, n_tokens: int) -> None:
        keep = words.lengths > 1
        lengths = words.lengths[keep]
        size = int(lengths.sum()) + len(lengths) + 1
        if size >= _BOUNDARY:
            raise ValueError(f"words: got {size} bytes of different words, expected fewer than 2^31; give max_words")
        counts = words.counts[keep]
        # Half the memory where the counts allow it; sums are taken in 64 bits.
        narrow = np.int32 if len(counts) and counts.max() < 2**31 else np.int64
        self.weights = np.append(np.repeat(counts.astype(narrow), lengths + 1), narrow(0))
        self.tokens = np.full(size, _BOUNDARY, np.int32)
        inside = np.ones(size, bool)
        inside[np.cumsum(lengths + 1) - lengths - 1] = False
        inside[-1] = False
        self.tokens[inside] = np.frombuffer(words.data, np.uint8)[np.repeat(keep, words.lengths)]
        self.span = np.ones(n_tokens, np.int32)

    def pairs(self) -> _Groups:
        """Every pair; every token must span 1."""
        inside = self.tokens != _BOUNDARY
        inside = inside[:-1] & inside[1:]
        n_tokens = int(self.tokens[:-1][inside].max(initial=0)) + 1
        n_tokens = max(n_tokens, int(self.tokens[1:][inside].max(initial=0)) + 1)
        wide = np.uint16 if n_tokens <= 1 << 8 else np.uint32 if n_tokens <= 1 << 16 else np.uint64
        code = self.tokens[:-1][inside].astype(wide)
        code *= wide(n_tokens)
        code += self.tokens[1:][inside].astype(wide)
        order = _stable_order(code)
        code, *groups = _group(code, order, self.weights[:-1][inside])
        first, second = np.divmod(code.astype(np.int64), n_tokens)
        positions = np.flatnonzero(inside).astype(np.int32)
        return _Groups(first, second, first, second, np.zeros_like(first), *groups, order, positions)

    def merge(self, positions: list[np.ndarray], names: np.ndarray, first_id: int) -> list[_Groups]:
        """Joins the pairs names[:, i] into tokens first_id + i wherever they occur: among positions[i].

        Returns the pairs that this makes with left and with right neighbours.
        """
        tokens, span = self.tokens, self.span
        a, b = names
        new = np.arange(first_id, first_id + len(a), dtype=np.int32)
        span[new] = span[a] + span[b]
        places, sizes = self._occurrences(positions, a, b)
        end = places + _repeat(span[new], sizes)
        right_before = tokens[end]
        tokens[places + _repeat(span[a], sizes)] = -1
        tokens[end - 1] = _repeat(~new, sizes)
        tokens[places] = _repeat(new, sizes)
        left = tokens[places - 1]
        left ^= left >> 31  # ~id where the neighbour is longer than 1
        right = tokens[end]
        member = np.repeat(np.arange(len(new), dtype=np.int16), sizes)
        weights = self.weights[places]

        i = np.flatnonzero(left != _BOUNDARY)
        neighbour, member_, *groups = _group_neighbours(left[i], member[i], weights[i])
        # Where the left neighbour is itself new, the second part of its pair stood there before.
        before = np.where(neighbour < first_id, neighbour, b[np.maximum(neighbour - first_id, 0)])
        lefts = _Groups(neighbour, new[member_], before, a[member_], span[neighbour], *groups, places[i])
        # A new token on the right sees this place on its left: the pair of the two is met once, there.
        i = np.flatnonzero((right == right_before) & (right != _BOUNDARY))
        neighbour, member_, *groups = _group_neighbours(right[i], member[i], weights[i])
        no_shift = np.zeros_like(neighbour)
        return [lefts, _Groups(new[member_], neighbour, b[member_], neighbour, no_shift, *groups, places[i])]

    def _occurrences(self, positions: list[np.ndarray], a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a[i] and b[i] meet now: the places by i, and how many for each i."""
        sizes = np.array([len(part) for part in positions])
        places = np.concatenate(positions).astype(np.int64)
        here = self.tokens[places] == _repeat(a, sizes)
        after = places + _repeat(self.span[a], sizes)
        after *= here  # a place that a has left may be too near the end
        here &= self.tokens[after] == _repeat(b, sizes)
        places = places[here]
        if len(sizes) == 1:
            if a[0] == b[0]:
                places = _every_other(places, int(self.span[a[0]]))
            return places, np.array([len(places)])
        return places, np.add.reduceat(here, np.cumsum(sizes) - sizes, dtype=np.int64)

    def compact(self) -> None:
        """Gives every token a span of 1 and leaves out words of a single token."""
        alive = self.tokens >= 0
        tokens, weights = self.tokens[alive], self.weights[alive]
        boundary = tokens == _BOUNDARY
        single = ~boundary
        single[1:-1] &= boundary[:-2] & boundary[2:]
        single[[0, -1]] = False
        # A word goes with the boundary before it.
        single[:-1] |= single[1:]
        self.tokens, self.weights = tokens[~single], weights[~single]
        self.span[:] = 1


def _stable_order(code: np.ndarray) -> np.ndarray:
    """np.argsort(code, kind="stable") of non-negative integers, by numpy's radix sort of 16 bits at a time."""
    order = np.argsort(code.astype(np.uint16), kind="stable")
    highest = int(code.max(initial=0))
    for shift in range(16, highest.bit_length(), 16):
        digit = (code >> code.dtype.type(shift)).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def _repeat(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """np.repeat, but a scalar in place of one value many times."""
    return values[0] if len(values) == 1 else np.repeat(values, sizes)


def _group_neighbours(neighbour: np.ndarray, member: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Groups by neighbour and member: neighbour, member, counts, starts, stops, order. Comes ordered by member."""
    key = neighbour.astype(np.int64)
    key *= _MAX_BATCH
    key += member
    order = _stable_order(neighbour)
    key, *groups = _group(key, order, weights)
    return key // _MAX_BATCH, key % _MAX_BATCH, *groups, order


def _group(key: np.ndarray, order: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Groups by key, which `order` sorts: the keys, the sums of weights, and starts and stops in `order`."""
    key = key[order]
    change = np.empty(len(key), bool)
    change[:1] = True
    np.not_equal(key[1:], key[:-1], out=change[1:])
    starts = np.flatnonzero(change)
    counts = np.add.reduceat(weights[order], starts, dtype=np.int64) if len(starts) else starts
    return key[starts], counts, starts, np.append(starts[1:], len(key))


def _every_other(places: np.ndarray, span: int) -> np.ndarray:
    """Of places that overlap their successor, from the left: the first, the third, ... of each run."""
    breaks = np.empty(len(places), bool)
    breaks[:1] = True
    np.not_equal(np.diff(places), span, out=breaks[1:])
    runs = np.flatnonzero(breaks)
    lengths = np.diff(np.append(runs, len(places)))
    return places[(np.arange(len(places)) - np.repeat(runs, lengths)) % 2 == 0]


class _Pairs:
    """The pairs watched: by index their tokens (names), counts and places, and an open hash table from tokens to index.

    Index 0 stands for every pair that is not watched.
    """

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.names: list[tuple[int, int]] = [(0, 0)]
        self.positions: list[np.ndarray | None] = [None]
        self.counts = np.zeros(1 << 12, np.int64)
        self._bits = 14
        self._codes = np.zeros(1 << self._bits, np.uint64)
        self._indices = np.zeros(1 << self._bits, np.int32)

    def watch(self, groups: _Groups) -> np.ndarray:
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
            self.positions[index] = None

    def subtract(self, groups: _Groups) -> np.ndarray:
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


class _Ranking:
    """The order in which watched pairs will be merged: the front, sorted, holds all pairs with counts above a bound."""

    def __init__(self, pairs: _Pairs, tokens: list[bytes]) -> None:
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
