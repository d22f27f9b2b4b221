"""Merges applied to words, the bytes of single pre-tokens: bytes in, token ids out.

Of all adjacent pairs that the merges list names, the one listed first is merged; where it occurs more than once, the
leftmost occurrence; one merge at a time until no pair is listed. That is the order of `tokenizers`, and of `tiktoken`
on every vocabulary that `Tokenizer.export_tiktoken` accepts.

`encode_word` takes one word. `encode_words` takes thousands at once (pairs.py); longer words are cut into windows
(long.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ..definition import Definition
from ..sizes import CELLS, FEW_MERGED, HEAP_FROM, LONGEST
from ..tokens import TokenBytes, ranges
from .long import LongEncoder
from .pairs import Characters, PairTable, Units


class WordEncoder:
    """Encodes words; remembers none. tokens: the bytes of every id."""

    def __init__(self, definition: Definition, tokens: TokenBytes) -> None:
        self._byte_ids = definition.byte_ids
        self._pairs = definition.pairs
        # encode_word by compiled code, where there is any.
        self.compiled: Callable[[bytes], list[int]] | None = None
        self._none = len(self._pairs)  # a rank above every other: the pair is in no merge
        self._table = PairTable(self._byte_ids, self._pairs[:, 2], tokens)
        self._table.add(np.arange(self._none), self._pairs[:, 0], self._pairs[:, 1])
        # Words that are one token whatever the merges make of them.
        self._whole = definition.ordinary if definition.ignore_merges else {}
        self._tokens = tokens
        self._long = LongEncoder(self.merge_words, tokens, LONGEST)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code cannot be pickled, and the dictionaries are as soon made again as read.
        return {k: v for k, v in self.__dict__.items() if k not in ("_rank", "_merged")} | {"compiled": None}

    @cached_property
    def _rank(self) -> dict[int, int]:
        keys = self._pairs[:, 0].astype(np.int64) << 32 | self._pairs[:, 1]
        return dict(zip(keys.tolist(), range(len(keys)), strict=True))

    @cached_property
    def _characters(self) -> Characters:
        return self._table.characters(self._pairs[:, 0], self._pairs[:, 1])

    @cached_property
    def _merged(self) -> list[int]:
        return self._pairs[:, 2].tolist()

    def warm_up(self) -> None:
        """Makes what the first words would else wait for: dictionaries for those that come one by one, if they are
        going to be needed, and the table of characters for the others."""
        self._characters  # noqa: B018
        if self.compiled is None or self._whole:
            self.merge_word(b"  ")

    def encode_word(self, word: bytes) -> list[int]:
        """Token ids of one word. Takes O(n log n) however long the word is."""
        if self.compiled is not None:
            return self.compiled(word)
        return [self._whole[word]] if word in self._whole else self.merge_word(word)

    def encode_words(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of many words.

        data: bytes.  starts, lengths: (n,) int64, where in `data` the words are.
        Returns ids (total,) int32, the words' ids one after another, and counts (n,) int64, how many each word has.
        """
        rest = np.arange(len(lengths))
        parts = []
        if self._whole:
            spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            known = np.array([self._whole.get(data[i:j], -1) for i, j in spans], np.int32)
            parts.append((rest[known >= 0], known[known >= 0], np.ones(np.count_nonzero(known >= 0), np.int64)))
            rest = rest[known < 0]
        is_long = lengths[rest] > LONGEST
        for chosen, encode in (rest[~is_long], self.merge_words), (rest[is_long], self._long.encode):
            if len(chosen):
                parts.append((chosen, *encode(data, starts[chosen], lengths[chosen])))
        return _in_order(parts)

    def merge_words(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """encode_words by the merges alone; words that are too long for a column one by one."""
        short, rest = (lengths <= LONGEST).nonzero()[0], [(lengths > LONGEST).nonzero()[0]]
        parts = []
        if len(short) <= FEW_MERGED:
            short, rest = short[:0], [np.arange(len(lengths))]
        if len(short):
            units = self._units(data, starts.take(short), lengths.take(short))
            # Words of about as many tokens beside one another, so that no matrix is much higher than it must be.
            order = np.argsort(units.counts.astype(np.uint8), kind="stable")
            counts = units.counts.take(order)
        i = 0
        while i < len(short):
            j = int(np.searchsorted(counts, 2 * counts[i] - 1, side="right"))
            j = min(j, i + CELLS // int(counts[j - 1]))
            ids, sizes, done = self._table.merge(units, order[i:j], FEW_MERGED)
            chosen = short.take(order[i:j])
            parts.append((chosen[done], ids, sizes[done]))
            rest.append(chosen[~done])
            i = j
        left = np.concatenate(rest)
        if len(left):
            parts.append((left, *self._one_by_one(data, starts.take(left), lengths.take(left))))
        return _in_order(parts)

    def _units(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> Units:
        text = np.frombuffer(data, np.uint8)
        ends = np.cumsum(lengths)
        parts = []
        i = 0
        while i < len(ends):
            begin = int(ends[i] - lengths[i])
            j = max(i + 1, int(np.searchsorted(ends, begin + CELLS)))
            words = text.take(ranges(starts[i:j], lengths[i:j]))
            parts.append(self._table.units(words, ends[i:j] - lengths[i:j] - begin, self._characters))
            i = j
        return Units.joined(parts)

    def _one_by_one(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        encoded = [self.merge_word(data[i:j]) for i, j in spans]
        return np.array(list(chain.from_iterable(encoded)), np.int32), np.array([len(ids) for ids in encoded])

    def merge_word(self, word: bytes) -> list[int]:
        """encode_word by the merges alone."""
        if self.compiled is not None and not self._whole:
            return self.compiled(word)
        ids = [self._byte_ids[byte] for byte in word]
        if len(ids) >= HEAP_FROM:
            return self._merge_with_heap(ids)
        rank_of, none = self._rank.get, self._none
        ranks = [*[rank_of(left << 32 | right, none) for left, right in pairwise(ids)], none]
        while (rank := min(ranks)) < none:
            i = ranks.index(rank)
            del ids[i + 1], ranks[i]
            new = ids[i] = self._merged[rank]
            if i:
                ranks[i - 1] = rank_of(ids[i - 1] << 32 | new, none)
            if i + 1 < len(ids):
                ranks[i] = rank_of(new << 32 | ids[i + 1], none)
        return ids

    def _merge_with_heap(self, ids: list[int]) -> list[int]:
        n = len(ids)
        following = list(range(1, n + 1))
        preceding = list(range(-1, n - 1))
        rank_of = self._rank.get
        # (rank, position) of a pair; an entry is stale when the pair that stands there now has another rank.
        heap = [(rank, i) for i in range(n - 1) if (rank := rank_of(ids[i] << 32 | ids[i + 1])) is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = following[i]
            if ids[i] < 0 or j == n or rank_of(ids[i] << 32 | ids[j]) != rank:
                continue
            ids[i], ids[j] = self._merged[rank], -1
            after = following[i] = following[j]
            if after < n:
                preceding[after] = i
                if (new := rank_of(ids[i] << 32 | ids[after])) is not None:
                    heapq.heappush(heap, (new, i))
            before = preceding[i]
            if before >= 0 and (new := rank_of(ids[before] << 32 | ids[i])) is not None:
                heapq.heappush(heap, (new, before))
        return [token for token in ids if token >= 0]


def _in_order(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and counts of words 0, 1, ...; each part has some words' numbers, their ids and counts."""
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    number, ids, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts, offsets = np.empty(len(number), np.int64), np.empty(len(number), np.int64)
    counts[number] = sizes
    offsets[number] = np.cumsum(sizes) - sizes
    return ids.take(ranges(offsets, counts)), counts
