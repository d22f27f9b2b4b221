"""The trainer: merges of the most frequent pair of neighbouring tokens."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable

from .count import Words


def learn_merges(
    words: Words, n_merges: int, advance: Callable[[int], None] = lambda n: None
) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges, fewer when no pair is left.

    Each takes the most frequent pair of neighbouring tokens within words, of equally frequent ones the greatest pair of
    bytes, and joins its occurrences from the left. `advance` is told of merges as they are done.
    """

    class Descending(tuple):
        def __lt__(self, other):
            return tuple.__gt__(self, other)

    splits = [([bytes([byte]) for byte in word], count) for word, count in words.todict().items()]
    counts: dict[tuple[bytes, bytes], int] = defaultdict(int)
    where: dict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(splits):
        for pair in zip(word, word[1:]):
            counts[pair] += count
            where[pair].add(index)
    heap = [(Descending((count, *pair))) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while heap and len(merges) < n_merges:
        count, *pair = heapq.heappop(heap)
        pair = tuple(pair)
        if counts[pair] != count or not count:
            continue
        merges.append(pair)
        advance(1)
        changed = set()
        for index in where.pop(pair):
            word, count = splits[index]
            for old in zip(word, word[1:]):
                counts[old] -= count
                changed.add(old)
            joined: list[bytes] = []
            i = 0
            while i < len(word):
                if (word[i], *word[i + 1 : i + 2]) == pair:
                    joined.append(word[i] + word[i + 1])
                    i += 2
                else:
                    joined.append(word[i])
                    i += 1
            splits[index] = (joined, count)
            for new in zip(joined, joined[1:]):
                counts[new] += count
                where[new].add(index)
                changed.add(new)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, Descending((counts[other], *other)))
    return merges
