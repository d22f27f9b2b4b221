"""Merges applied to words, the bytes of single pre-tokens: bytes in, token ids out.

Of all adjacent pairs that the merges list names, the one listed first is merged; where it occurs more than once, the
leftmost occurrence; one merge at a time until no pair is listed. That is the order of `tokenizers`, and of `tiktoken`
on every vocabulary that `Tokenizer.export_tiktoken` accepts.

`encode_word` takes one word. `encode_words` takes thousands at once, one column of a matrix each, and does one merge in
every column per step; words too long for a column are cut into windows (long.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ..definition import Definition
from ..sizes import CELLS, FEW_MERGED, HEAP_FROM, LONGEST, ROW_BITS
from ..tokens import TokenBytes, ranges
from ..wordkeys import MULTIPLIER
from .long import LongEncoder

# Pairs added to a table at a time: all at once would take as much memory as the table.
_ADDED = 1 << 14

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


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
    def _merged(self) -> list[int]:
        return self._pairs[:, 2].tolist()

    def warm_up(self) -> None:
        """Makes the dictionaries for words that come one by one, if they are going to be needed."""
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
        # Words of one length beside one another, so that no matrix is higher than it must be.
        order = np.argsort(np.minimum(lengths, LONGEST + 1).astype(np.uint16), kind="stable")
        starts, lengths = starts[order], lengths[order]
        n_short = int(np.searchsorted(lengths, LONGEST, side="right"))
        parts = []
        i = 0
        while i < n_short:
            j = int(np.searchsorted(lengths[:n_short], 3 * lengths[i] // 2 + 2, side="right"))
            j = min(j, i + CELLS // int(lengths[j - 1]))
            parts.append((order[i:j], *self._merge_group(data, starts[i:j], lengths[i:j])))
            i = j
        if n_short < len(lengths):
            parts.append((order[n_short:], *self._one_by_one(data, starts[n_short:], lengths[n_short:])))
        return _in_order(parts)

    def _merge_group(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height = int(lengths[-1])
        if lengths.sum() < FEW_MERGED * height:
            return self._one_by_one(data, starts, lengths)
        # What is past a word's end is ignored, so that it may be anything past the end of the data.
        text = np.frombuffer(data, np.uint8).take(starts + np.arange(height)[:, None], mode="clip")
        return self._table.merge(text, lengths)

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


class PairTable:
    """Ranks of pairs, looked up for whole arrays: an open hash table whose 64-bit entries hold pair and rank.

    merged: (n,) the id that each merge makes, in the order of their ranks.  tokens: the bytes of every id.
    """

    def __init__(self, byte_ids: Sequence[int], merged: np.ndarray, tokens: TokenBytes) -> None:
        n = len(merged)
        # The id after the largest stands for "no token"; no pair has it.
        self._no_token = int(max(*byte_ids, merged.max(initial=0))) + 1
        self._id_bits = np.uint64(self._no_token.bit_length())
        self._rank_bits = np.uint64(n.bit_length())
        if 2 * self._id_bits + self._rank_bits > 64:
            raise ValueError(f"vocab: {n} merges of ids up to {self._no_token - 1} are more than can be encoded")
        self._none = np.int32(n)
        self._none_u64 = np.uint64(n)
        self._merged = merged.astype(np.int32)
        self._byte_ids = np.array(byte_ids, np.int32)
        # An eighth full at most, so that an absent pair, as most are, almost always meets an empty slot.
        bits = max(8, (8 * n).bit_length())
        self._slot_shift = np.uint64(64 - bits)
        self._slot_mask = (1 << bits) - 1
        self._entries = np.full(1 << bits, _EMPTY)
        self._first, self._last = tokens.edges()
        # By two bytes, and shifted as the keys of merge() are: the rank of that pair; and the lowest rank of all merges
        # across a boundary between the two, whose left token ends in the one and whose right token starts with the
        # other.
        self._rank_of_bytes = np.full(1 << 16, n << ROW_BITS, np.int32)
        self._lowest_across = self._rank_of_bytes.copy()

    def add(self, ranks: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """Adds the pairs of the merges of these ranks; (n,) integers each."""
        for i in range(0, len(ranks), _ADDED):
            self._add(ranks[i : i + _ADDED], left[i : i + _ADDED], right[i : i + _ADDED])

    def _add(self, ranks: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        keys = left.astype(np.uint64) << self._id_bits | right.astype(np.uint64)
        entries = keys << self._rank_bits | ranks.astype(np.uint64)
        slots = (keys * MULTIPLIER >> self._slot_shift).astype(np.int64)
        while len(entries):
            free = self._entries[slots] == _EMPTY
            self._entries[slots[free]] = entries[free]  # of several for one slot, the last stays
            rest = self._entries[slots] != entries
            entries, slots = entries[rest], slots[rest] + 1 & self._slot_mask
        ranks = ranks.astype(np.int32) << ROW_BITS
        across = self._last.take(left).astype(np.int64) << 8 | self._first.take(right)
        np.minimum.at(self._lowest_across, across, ranks)
        of_bytes = (self._byte_ids.take(across >> 8) == left) & (self._byte_ids.take(across & 0xFF) == right)
        self._rank_of_bytes[across[of_bytes]] = ranks[of_bytes]

    def ranks(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Ranks (int32) of the pairs; the number of merges where there is none."""
        keys = left.astype(np.uint64)
        keys <<= self._id_bits
        keys |= right.astype(np.uint64)
        slots = (keys * MULTIPLIER >> self._slot_shift).view(np.int64)
        keys <<= self._rank_bits
        entries = self._entries.take(slots)
        # Of an entry of the pair nothing but the rank is left; of any other entry a number above all ranks.
        ranks = np.minimum(entries ^ keys, self._none_u64).astype(np.int32)
        going = ((ranks == self._none) & (entries != _EMPTY)).nonzero()[0]
        while len(going):
            at = slots[going] = slots.take(going) + 1 & self._slot_mask
            entries = self._entries.take(at)
            found = np.minimum(entries ^ keys.take(going), self._none_u64).astype(np.int32)
            ranks[going] = found
            going = going[(found == self._none) & (entries != _EMPTY)]
        return ranks

    def merge(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and counts, as encode_words, of the words in text (width, n) uint8, a word a column.

        Arrays are (width + 1, n) and indexed flat. tokens: the id of the token that starts at each byte, -1 inside a
        token. following, preceding: the index of the neighbouring token. keys: rank << 8 | row of the token's pair with
        the following one, so that a column's minimum is the leftmost pair of the lowest rank. The last row is "no
        token", the neighbour of the first and of the last token, in no pair: the ends need no case of their own.

        The first step does all merges at once that are certain: whatever becomes of the tokens beside such a pair, no
        merge with them has a rank as low, so that the pair is merged before either could be. That is half of all.

        The words abc and cab with the merges a b and ab c, the words from above down:

        >>> tokens = TokenBytes({i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abc"})
        >>> table = PairTable(range(256), np.array([256, 257]), tokens)
        >>> table.add(np.arange(2), np.array([97, 256]), np.array([98, 99]))
        >>> table.merge(np.array([[*b"ac"], [*b"ba"], [*b"cb"]], np.uint8), np.array([3, 3]))
        (array([257,  99, 256], dtype=int32), array([1, 2]))
        """
        width, n = text.shape
        rows = np.arange(width + 1)[:, None]
        last = lengths - 1
        tokens = np.full((width + 1, n), self._no_token, np.int32)
        tokens[:width] = self._byte_ids.take(text)
        tokens[:width][rows[:width] > last] = -1
        keys = np.empty((width + 1, n), np.int32)
        pairs = text[:-1].astype(np.int64) << 8 | text[1:]
        keys[: width - 1] = self._rank_of_bytes.take(pairs)
        outside = rows >= last
        keys[outside] = self._none << ROW_BITS
        across = self._lowest_across.take(pairs)
        across[outside[: width - 1]] = self._none << ROW_BITS
        certain = keys[:width] < self._none << ROW_BITS
        certain[1:] &= keys[1:width] < across
        certain[: width - 2] &= keys[: width - 2] < across[1:]
        at = np.flatnonzero(certain)
        keys |= rows.astype(np.int32)
        index = np.arange((width + 1) * n).reshape(width + 1, n)
        following = np.where(rows < last, index + n, index[width]).reshape(-1)
        preceding = np.where(rows > 0, index - n, index[width]).reshape(-1)

        flat_tokens, flat_keys = tokens.reshape(-1), keys.reshape(-1)
        while True:
            new = self._merged.take(flat_keys.take(at) >> ROW_BITS)
            absorbed = following.take(at)
            after = following.take(absorbed)
            flat_tokens[absorbed] = -1
            flat_tokens[at] = new
            following[at] = after
            preceding[after] = at
            before = preceding.take(at)  # after that, since what was there may itself have been absorbed just now
            flat_keys[absorbed] |= self._none << ROW_BITS  # no less than "none", whatever rank was there
            changed = np.concatenate([before, at])
            left = np.concatenate([flat_tokens.take(before), new])
            right = np.concatenate([new, flat_tokens.take(after)])
            row = flat_keys.take(changed) & (1 << ROW_BITS) - 1
            flat_keys[changed] = self.ranks(left, right) << ROW_BITS | row
            lowest = keys.min(axis=0)
            columns = np.flatnonzero(lowest < self._none << ROW_BITS)
            if not len(columns):
                break
            at = (lowest.take(columns) & (1 << ROW_BITS) - 1) * np.int64(n) + columns
        kept = tokens[:width].T >= 0
        return tokens[:width].T[kept], np.count_nonzero(kept, axis=1)
