"""The trainer: merges of the most frequent pair of neighbouring tokens, on whole arrays at a time.

All words lie end to end in one array of tokens (_Corpus). For every pair worth watching, its count and the places where
it occurs are kept (Pairs); a merge rewrites its places, and what happens around them changes the counts: a place
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
    Ranking._safe looks for such q and ends the batch before the first p_j at risk.

Pairs below a threshold count are not watched. When the watched ones are used up, the array is compacted and the pairs
are counted again with a lower threshold: a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .count import Words
from .ranking import Groups, Pairs, Ranking

MAX_TOKENS = 1 << 21
_MAX_BATCH = 1 << 11
_BOUNDARY = np.int32(2**31 - 1)  # between words


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
        pairs = Pairs(threshold)
        ranking = Ranking(pairs, tokens)
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

    def pairs(self) -> Groups:
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
        code, counts, starts, stops = _group(code, order, self.weights[:-1][inside])
        first, second = np.divmod(code.astype(np.int64), n_tokens)
        positions = np.flatnonzero(inside).astype(np.int32)
        return Groups(first, second, first, second, np.zeros_like(first), counts, starts, stops, order, positions)

    def merge(self, positions: list[np.ndarray], names: np.ndarray, first_id: int) -> list[Groups]:
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
        neighbour, of, counts, starts, stops, order = _group_neighbours(left[i], member[i], weights[i])
        # Where the left neighbour is itself new, the second part of its pair stood there before.
        before = np.where(neighbour < first_id, neighbour, b[np.maximum(neighbour - first_id, 0)])
        shifts = span[neighbour]  # the pair starts with the neighbour
        lefts = Groups(neighbour, new[of], before, a[of], shifts, counts, starts, stops, order, places[i])

        # A new token on the right sees this place on its left: the pair of the two is met once, there.
        i = np.flatnonzero((right == right_before) & (right != _BOUNDARY))
        neighbour, of, counts, starts, stops, order = _group_neighbours(right[i], member[i], weights[i])
        shifts = np.zeros_like(neighbour)
        rights = Groups(new[of], neighbour, b[of], neighbour, shifts, counts, starts, stops, order, places[i])
        return [lefts, rights]

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
    key, counts, starts, stops = _group(key, order, weights)
    return key // _MAX_BATCH, key % _MAX_BATCH, counts, starts, stops, order


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
