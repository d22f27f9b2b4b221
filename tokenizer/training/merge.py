"""The trainer: merges of the most frequent pair of neighbouring tokens, on whole arrays at a time.

All words lie end to end in one array of tokens (_Corpus). For every pair worth watching, its count and the places where
it occurs are kept (Pairs); a merge rewrites its places, and what happens around them changes the counts: a place
whose left neighbour was L loses a pair (L, a) and gains a pair (L, ab), and likewise on the right. One sort of
(neighbour, place) groups the gains and the losses alike.

A merge alone would be too small for an array operation, so many are done at once, most of them before their turn. The
ranking is by count, and by the pair of bytes where counts are equal, greatest first. Two pairs conflict when a token is
the left one of the one pair and the right one of the other; only such pairs can overlap.

    Theorem. A pair p = (a, b) of count c may be merged before its turn, and the merges to come stay the same, if
    1. every pair that conflicts with p ranks below it (so p is no pair of twice the same token), and
    2. for every pair (x, a) of count c, in one word where it occurs, each token before a is less than a and does not
       start a; for every pair (b, y) of count c, in one word, no token after b starts a or is started by a.
    The first of the ranking may always be merged: it is its turn.

    Proof. Counts of old pairs only fall, and a pair made by a merge occurs at most as often as the one it comes from.
    First, nothing touches p before its turn. What conflicts with it later is an (X, a) from an (x, a), or a (b, Y) from
    a (b, y). To rank above p it must have count c, and so must the pair it comes from; then X stands before a wherever
    x stood, is made of tokens of 2., and is less than a. And b < a, since (b, y) ranks below p.
    Second, the pairs that p's merge makes early disturb nothing that goes before p. Say that one of them, n, is merged
    before a pair q which it conflicts with and which ranks above p. n comes from a pair below p, so both have count c.
    If n is (X, P) and q is (E, X), where X ends before a: q above p means E >= a, n above q means X >= E, but X < a.
    If n is (P, Y) and q is (Y, V), where Y begins after b: Y >= a and P >= Y. P begins with an X, which is less than a
    in its first bytes, or with a; so Y begins with a, which 2. excludes.
    Of several such pairs each keeps 1. and 2. when another one is merged, so all may be merged at once.

The order of merges done early is restored at the end (Turns): of those whose tokens exist, the one that ranks first.

Pairs below a threshold count are not watched. When the watched ones are used up, the array is compacted and the pairs
are counted again with a lower threshold: a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import nsmallest

import numpy as np

from ..sizes import MAX_BATCH, REACH, TOKENS, TRIES
from ..tokens import ranges
from .count import Words
from .ranking import Entry, Groups, Pairs, Ranking, Turns

_END = 2**31 - 1
_BOUNDARY = np.int32(_END)  # between words


def learn_merges(
    words: Words, n_merges: int, advance: Callable[[int], None] = lambda n: None
) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges, fewer when no pair is left.

    Each takes the most frequent pair of neighbouring tokens within words, of equally frequent ones the greatest pair of
    bytes, and joins its occurrences from the left. `advance` is told of merges as they are done.
    Raises ValueError when the words are too long in all for 31-bit positions.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    corpus = _Corpus(words)
    merges: list[tuple[bytes, bytes]] = []
    done: list[Entry] = []
    while len(merges) < n_merges:
        pairs = corpus.pairs(partial(_threshold, n_merges=n_merges, n_done=len(merges)))
        if not len(pairs):
            break
        ranking = Ranking(pairs, tokens, corpus.context)
        turns = Turns()
        least = (0, b"", b"", 0)  # pairs that rank below hardly come before the last merge: none is merged early
        while len(merges) < n_merges and (batch := ranking.take(least)):
            names = [pairs.names[entry[3]] for entry in batch]
            first_id = len(tokens)
            tokens += [left + right for _, left, right, _ in batch]
            indices = [entry[3] for entry in batch]
            made = corpus.merge([pairs.positions[index] for index in indices], np.array(names).T, first_id)
            pairs.retire(indices)
            ranking.update(pairs.subtract(made))
            ranking.add(pairs.watch(made))
            turns.add(batch, names, first_id)
            in_turn = turns.release(ranking.first())
            merges += in_turn
            done += batch
            if least[0] == 0 and len(done) >= n_merges:
                least = nsmallest(len(done) - n_merges + 1, done)[-1]
            advance(min(len(in_turn), n_merges - len(merges) + len(in_turn)))
        if len(merges) < n_merges:
            corpus.compact()
    return merges[:n_merges]


def _threshold(counts: np.ndarray, n_merges: int, n_done: int) -> int:
    """From which count on pairs are watched for the merges still to do. It bears on speed and memory alone.

    Too low, pairs are watched in vain; too high, there is one more epoch. The first epoch sees pairs of bytes, few and
    frequent; its rank is one that took 32,000 merges of English, code and text in ten scripts in one epoch or two.
    """
    watched = 2 * (n_merges - n_done) + 500
    if not n_done:
        watched = min(watched, 3500 + n_merges // 20, 7 * len(counts) // 10)
    return int(np.partition(counts, -watched)[-watched]) if 0 < watched < len(counts) else 1


class _Corpus:
    """All words end to end in one array of tokens, with a boundary between words and at both ends.

    A token that spans i to j - 1 has its id at i and, when longer than 1, ~id at j - 1; between them stands anything
    negative. So a token can be told from either end, and its neighbours are found next to its ends.
    """

    def __init__(self, words: Words) -> None:
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
        self.span = np.ones(256, np.int32)

    def pairs(self, threshold_of: Callable[[np.ndarray], int]) -> Pairs:
        """Counts every pair and watches those whose counts reach threshold_of(all counts). Every token spans 1.

        Slice by slice: a slice's arrays stay in the processor's cache, and what is kept of it are its places, in the
        order of their pairs. Of the words abab, once, and ab, five times (0, 5 and 8 are boundaries):

        >>> pairs = _Corpus(Words(b"ababab", np.array([4, 2]), np.array([1, 5]))).pairs(lambda counts: 1)
        >>> {name: (int(n), at.tolist()) for name, n, at in zip(pairs.names, pairs.counts, pairs.positions) if n}
        {(97, 98): (7, [1, 3, 6]), (98, 97): (1, [2])}
        """
        n_tokens = 1 + int(self.tokens.max(where=self.tokens != _BOUNDARY, initial=0))
        slices = []
        for at in range(0, len(self.tokens) - 1, TOKENS):
            tokens = self.tokens[at : at + TOKENS + 1]
            inside = tokens != _BOUNDARY
            places = np.flatnonzero(inside[:-1] & inside[1:])
            if not len(places):
                continue
            code = _pair_codes(tokens[places], tokens[places + 1], n_tokens)
            order = _stable_order(code)
            code, counts, starts, stops = _group(code, order, self.weights[at : at + TOKENS][places])
            slices.append((code, counts, stops - starts, (places[order] + at).astype(np.int32)))
        if not slices:
            return Pairs(1)
        code, counts, sizes = (np.concatenate(column) for column in list(zip(*slices, strict=True))[:3])
        order = _stable_order(code)
        names, counts, starts, _ = _group(code, order, counts)
        threshold = threshold_of(counts)
        hot = np.flatnonzero(counts >= threshold)
        # Where the places of each slice's groups go: to their pair's, after those of the slices before.
        group = np.empty(len(code), np.int64)
        group[order] = np.repeat(np.arange(len(names)), np.diff(np.append(starts, len(code))))
        is_hot = (counts >= threshold)[group]
        target = np.empty(len(code), np.int64)
        kept = np.where(is_hot, sizes, 0)[order]
        target[order] = np.cumsum(kept) - kept
        positions = np.empty(kept.sum(), np.int32)
        done = 0
        for codes, _, sizes, places in slices:
            part = slice(done, done + len(codes))
            chosen = np.repeat(is_hot[part], sizes)
            positions[ranges(target[part], sizes)[chosen]] = places[chosen]
            done += len(codes)
        bounds = np.append(0, np.cumsum(np.add.reduceat(kept, starts)[hot]))
        pairs = Pairs(threshold)
        first, second = np.divmod(names[hot].astype(np.int64), n_tokens)
        pairs.add(first, second, counts[hot], positions, bounds)
        return pairs

    def merge(self, positions: list[np.ndarray], names: np.ndarray, first_id: int) -> Groups:
        """Joins the pairs names[:, i] into tokens first_id + i wherever they occur: among positions[i].

        Returns the pairs that this makes with left and with right neighbours.
        """
        tokens = self.tokens
        a, b = names
        n = len(a)
        new = np.arange(first_id, first_id + n, dtype=np.int32)
        while first_id + n > len(self.span):
            self.span = np.append(self.span, np.ones_like(self.span))
        span = self.span
        span[new] = span[a] + span[b]
        places, sizes = self._occurrences(positions, a, b)
        end = places + _repeat(span[new], sizes)
        tokens[places + _repeat(span[a], sizes)] = -1
        tokens[end - 1] = _repeat(~new, sizes)
        tokens[places] = _repeat(new, sizes)
        left = tokens.take(places - 1)
        left ^= left >> 31  # ~id where the neighbour is longer than 1
        right = tokens.take(end)
        member = np.repeat(np.arange(n, dtype=np.int16), sizes)
        weights = self.weights.take(places)

        # A new token on the right sees this place on its left: the pair of the two is met once, there.
        i, j = np.flatnonzero(left != _BOUNDARY), np.flatnonzero(right < first_id)
        neighbour, of, counts, starts, stops, order = _group_neighbours(
            np.concatenate([left.take(i), right.take(j)]),
            np.concatenate([member.take(i), member.take(j) + np.int16(n)]),
            np.concatenate([weights.take(i), weights.take(j)]),
        )
        on_left = of < n
        of[~on_left] -= n
        joined, a, b = new[of], a[of], b[of]
        # Where the left neighbour is itself new, the second part of its pair stood there before.
        before = np.where(neighbour < first_id, neighbour, names[1][np.maximum(neighbour - first_id, 0)])
        return Groups(
            np.where(on_left, neighbour, joined),
            np.where(on_left, joined, neighbour),
            np.where(on_left, before, b),
            np.where(on_left, a, neighbour),
            np.where(on_left, span[neighbour], 0),  # the pair starts with the left neighbour
            counts,
            starts,
            stops,
            order,
            np.concatenate([places.take(i), places.take(j)]),
        )

    def context(self, positions: np.ndarray, name: tuple[int, int], side: int) -> list[int] | None:
        """The tokens before (side 0) or after (1) the pair's middle in one word; None when it is not soon found."""
        a, b = name
        tokens, span = self.tokens, self.span
        first = int(span[a])
        for place in positions[:TRIES].tolist():
            middle = place + first
            if tokens[place] == a and tokens[middle] == b:
                break
        else:
            return None
        near = tokens[middle : middle + REACH] if side else tokens[max(0, middle - REACH) : middle][::-1]
        row = near.tolist()
        # Every token has its id at its first place, and something negative at the others.
        return [token for token in row[: row.index(_END)] if token >= 0] if _END in row else None

    def _occurrences(self, positions: list[np.ndarray], a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a[i] and b[i] meet now: the places by i, and how many for each i."""
        sizes = np.array([len(part) for part in positions])
        places = np.concatenate(positions, dtype=np.int64)
        here = self.tokens.take(places) == _repeat(a, sizes)
        after = places + _repeat(self.span[a], sizes)
        after *= here  # a place that a has left may be too near the end
        here &= self.tokens.take(after) == _repeat(b, sizes)
        places = places.compress(here)
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


def _pair_codes(first: np.ndarray, second: np.ndarray, n_tokens: int) -> np.ndarray:
    """first * n_tokens + second, in the narrowest type that holds it: the order of pairs, quick to sort."""
    wide = np.dtype(np.uint16 if n_tokens <= 1 << 8 else np.uint32 if n_tokens <= 1 << 16 else np.uint64)
    return first.astype(wide) * wide.type(n_tokens) + second.astype(wide)


def _stable_order(code: np.ndarray) -> np.ndarray:
    """np.argsort(code, kind="stable") of non-negative integers, by numpy's radix sort of 16 bits at a time."""
    order = np.argsort(code.astype(np.uint16), kind="stable")
    highest = int(code.max(initial=0))
    for shift in range(16, highest.bit_length(), 16):
        digit = (code >> code.dtype.type(shift)).astype(np.uint16)
        order = order[np.argsort(digit.take(order), kind="stable")]
    return order


def _repeat(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """np.repeat, but a scalar in place of one value many times."""
    return values[0] if len(values) == 1 else np.repeat(values, sizes)


def _group_neighbours(neighbour: np.ndarray, member: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Groups by neighbour and member: neighbour, member, counts, starts, stops, order. Comes ordered by member."""
    key = neighbour.astype(np.int64)
    key *= 2 * MAX_BATCH
    key += member
    order = _stable_order(neighbour)
    key, counts, starts, stops = _group(key, order, weights)
    return key // (2 * MAX_BATCH), key % (2 * MAX_BATCH), counts, starts, stops, order


def _group(key: np.ndarray, order: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Groups by key, which `order` sorts: the keys, the sums of weights, and starts and stops in `order`."""
    key = key.take(order)
    change = np.empty(len(key), bool)
    change[:1] = True
    np.not_equal(key[1:], key[:-1], out=change[1:])
    starts = np.flatnonzero(change)
    counts = np.add.reduceat(weights.take(order), starts, dtype=np.int64) if len(starts) else starts
    return key[starts], counts, starts, np.append(starts[1:], len(key))


def _every_other(places: np.ndarray, span: int) -> np.ndarray:
    """Of places that overlap their successor, from the left: the first, the third, ... of each run."""
    breaks = np.empty(len(places), bool)
    breaks[:1] = True
    np.not_equal(np.diff(places), span, out=breaks[1:])
    runs = np.flatnonzero(breaks)
    lengths = np.diff(np.append(runs, len(places)))
    return places[(np.arange(len(places)) - np.repeat(runs, lengths)) % 2 == 0]
