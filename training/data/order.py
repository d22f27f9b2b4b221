"""The order in which a run draws its windows: sample number g, counted over the whole run, has its place in the corpus.

A place is a function of (seed, g), or of (seed, step) and the row for random places: nothing is remembered from batch
to batch, so that a run resumes where it was, and ranks that share a batch agree on it without a word.

With weights, sources take turns by a table of 10,000 samples that repeats: any stretch of samples has each source's
share of it to within a few samples. In weights 2 : 1 the turns are a b a | a b a | ...:

    >>> turns([2.0, 1.0])[0][:6].tolist()
    [0, 1, 0, 0, 1, 0]

Epochs are permutations of a source's windows, each by (seed, source, epoch). A permutation in memory would be 8 bytes a
window, 8 GB for 10^12 tokens in windows of 1,000; here it is computed, window by window, by a Feistel network (Luby &
Rackoff 1988) over Z_a x Z_b, where a b is barely more than the number of windows n: a place past n is sent through the
network again, until it is below (cycle walking; Black & Rogaway 2002). That takes a few walks in 1,000 for n = 10^6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["ORDERS", "Places", "permuted", "turns"]

ORDERS = ("random", "epochs")
PERIOD = 10_000  # samples; weights of four decimals are exact
# Of the network. Four would do were n large; so many even out the 720 orders of 6 windows to within 5 % (after eight,
# 34 %; 60,000 epochs, 2026-11-27). A batch of 32 takes 0.2 ms on a CPU.
ROUNDS = 16
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, as in splitmix64 (Steele et al. 2014)
_STEPS = np.array([GOLDEN * i % 2**64 for i in range(1, ROUNDS + 1)], np.uint64)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def turns(weights: Sequence[float]) -> tuple[Ints, Ints, Ints]:
    """Whose turn a sample is: (source, earlier turns of that source in the table), (period,) each; and each source's
    turns in the table, (sources,).

    Raises ValueError on a weight that is not positive and finite, or too small to have one.
    """
    if not (len(weights) and all(0 < weight < math.inf for weight in weights)):
        raise ValueError(f"weights must be positive and finite, got {[*weights]}")
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    share = np.asarray(weights, np.float64) / sum(weights) * PERIOD
    counts = np.floor(share + 1e-6).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: PERIOD - counts.sum()]] += 1  # the largest remainders
    if counts.min() == 0:
        raise ValueError(f"weights must be at least 1/{PERIOD:,} of their sum {sum(weights)}, got {min(weights)}")
    source = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((nth + 0.5) / counts[source], kind="stable")  # each source's turns evenly spread
    return source[order], nth[order], counts


class Places:
    """Where samples lie: shard and first token of windows of `context_length` tokens and the one after.

    lengths: for each source its shards' lengths in tokens.  weights: of the sources.
    "random": any place where a window fits, drawn with replacement.  "epochs": windows that stand one after another
    from each shard's first token on, each once an epoch of its source; a shard's tail shorter than a window is in none.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], weights: Sequence[float], context_length: int, *, order: str, seed: int
    ) -> None:
        self.seed, self.step = seed, context_length if order == "epochs" else 1
        self.source, self.nth, self.turns = turns(weights)
        self.first_shard = np.cumsum([0, *(len(some) for some in lengths)])[:-1]
        self.ends = []  # of each source's shards, in places
        for some in lengths:
            room = np.maximum(np.asarray(some, np.int64) - context_length, 0)
            self.ends.append(np.cumsum(-(-room // self.step)))
        self.sizes: Ints = np.array([ends[-1] for ends in self.ends])

    def draw(self, samples: Ints, generator: np.random.Generator | None) -> tuple[Ints, Ints]:
        """(shard, first token) of each sample; the generator draws random places, None stands for epochs."""
        period = len(self.source)
        slot = samples % period
        source = self.source[slot]
        if generator is not None:
            place = generator.integers(0, self.sizes[source] if len(self.sizes) > 1 else self.sizes[0], len(samples))
        else:
            size = self.sizes[source]
            epoch, within = np.divmod(samples // period * self.turns[source] + self.nth[slot], size)
            place = permuted(within, size, _key(self.seed, source, epoch))
        return self._located(source, place)

    def _located(self, source: Ints, place: Ints) -> tuple[Ints, Ints]:
        if len(self.ends) == 1 and len(self.ends[0]) == 1:
            return np.zeros_like(place), place * self.step
        shard, start = np.empty_like(place), np.empty_like(place)
        for i in np.unique(source):
            rows, ends = source == i, self.ends[i]
            inside = np.searchsorted(ends, place[rows], side="right")
            shard[rows] = self.first_shard[i] + inside
            start[rows] = (place[rows] - np.concatenate([[0], ends])[inside]) * self.step
        return shard, start


def permuted(index: Ints, size: Ints, key: Words) -> Ints:
    """Where the pseudorandom permutation of range(size) that `key` chooses sends `index`; arrays of one shape."""
    n = size.astype(np.uint64)
    a = np.ceil(np.sqrt(size)).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    place = _network(index.astype(np.uint64), a, b, key)
    while (outside := place >= n).any():
        place[outside] = _network(place[outside], a[outside], b[outside], key[outside])
    return place.astype(np.int64)


def _network(place: Words, a: Words, b: Words, key: Words) -> Words:
    """A permutation of range(a b): one coordinate in turn is moved by a function of the other."""
    left, right = np.divmod(place, b)
    for keys in (key + _STEPS[:, None]).reshape(-1, 2, len(place)):
        left = (left + _mixed(right + keys[0]) % a) % a
        right = (right + _mixed(left + keys[1]) % b) % b
    return left * b + right


def _key(seed: int, source: Ints, epoch: Ints) -> Words:
    key = np.full(len(source), seed, np.uint64)
    for x in (source, epoch):
        key = _mixed(key + np.uint64(GOLDEN)) + x.astype(np.uint64)
    return _mixed(key)


def _mixed(x: Words) -> Words:
    """splitmix64's finalizer: a permutation of 64-bit words whose every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
