"""Merges applied to single words: the bytes of a pre-token in, token ids out.

Of all adjacent pairs that the merges list names, the one listed first is merged; where it occurs more than once, the
leftmost occurrence; one merge at a time until no pair is listed. That is the order of `tokenizers`, and of `tiktoken`
on every vocabulary that `Tokenizer.export_tiktoken` accepts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

# Above this length the scan for the lowest rank (quadratic) costs more than a heap.
_HEAP_FROM = 64


class Merges:
    """The merges list as a table from pairs of ids to ranks.

    byte_ids: 256 ids, of the single bytes.  pairs: (left id, right id, merged id) of every merge, lowest rank first.
    """

    def __init__(self, byte_ids: Sequence[int], pairs: Sequence[tuple[int, int, int]]) -> None:
        self._byte_ids = list(byte_ids)
        self._rank = {(left, right): rank for rank, (left, right, _) in enumerate(pairs)}
        self._merged = [merged for _, _, merged in pairs]
        self._none = len(pairs)  # a rank above every other: the pair is in no merge

    def encode_word(self, word: bytes) -> list[int]:
        """Token ids of one pre-token. Takes O(n log n) however long the word is."""
        ids = [self._byte_ids[byte] for byte in word]
        if len(ids) >= _HEAP_FROM:
            return self._merge_with_heap(ids)
        rank_of, none = self._rank.get, self._none
        ranks = [rank_of(pair, none) for pair in pairwise(ids)]
        while ranks:
            rank = min(ranks)
            if rank == none:
                break
            i = ranks.index(rank)
            ids[i : i + 2] = [self._merged[rank]]
            del ranks[i]
            if i:
                ranks[i - 1] = rank_of((ids[i - 1], ids[i]), none)
            if i < len(ranks):
                ranks[i] = rank_of((ids[i], ids[i + 1]), none)
        return ids

    def _merge_with_heap(self, ids: list[int]) -> list[int]:
        n = len(ids)
        following = list(range(1, n + 1))
        preceding = list(range(-1, n - 1))
        rank_of = self._rank.get
        # (rank, position) of a pair; an entry is stale when the pair that stands there now has another rank.
        heap = [(rank, i) for i in range(n - 1) if (rank := rank_of((ids[i], ids[i + 1]))) is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = following[i]
            if ids[i] < 0 or j == n or rank_of((ids[i], ids[j])) != rank:
                continue
            ids[i], ids[j] = self._merged[rank], -1
            after = following[i] = following[j]
            if after < n:
                preceding[after] = i
                if (new := rank_of((ids[i], ids[after]))) is not None:
                    heapq.heappush(heap, (new, i))
            before = preceding[i]
            if before >= 0 and (new := rank_of((ids[before], ids[i]))) is not None:
                heapq.heappush(heap, (new, before))
        return [token for token in ids if token >= 0]
