"""The merges as a table of pairs, and what it does to thousands of words at once: bytes in, token ids out.

A word goes through three stages, each of which leaves fewer tokens:

1. A character of two or three bytes becomes its token, by one look-up (`Characters`).
2. Pairs that are certain are merged, all at once, and again while they are many.
3. The rest, in a matrix with a column for each word: every step does each column's lowest merge.

Why merges may be done before their turn. Say that a pair (a, b), of rank r, stands in a word, and that none of these
has a rank of r or less: merges of a with what can come to stand before it, merges of b with what can come to stand
after it, and merges of the token ab. Then as long as the pair is there nothing of a higher rank happens in the word,
so nothing that touches a or b; nor would anything touch ab. So the word ends alike if the pair is merged now.
Before a stands some token that ends in the byte before it, whatever happens there: so a bound on the first kind is the
lowest rank of all merges whose left token ends in that byte and whose right token starts with a's first; another is
the lowest rank of those whose right token is a. The third kind never is a difficulty where every token is made before
it is used, as trained lists are; of any other list less is taken to be certain.

A character's bytes are merged alone first if its last merge is before all of these: merges of a beginning of it with a
token that ends in the byte before, and of an end of it with a token that starts with the byte after. Until then one of
its own merges is always to come, of no higher rank; and what the whole character is in comes later, where every token
is made before it is used: of other lists no character is taken to be certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..sizes import MANY_CERTAIN, ROW_BITS
from ..tokens import TokenBytes
from ..wordkeys import MULTIPLIER

# Pairs added to a table at a time: all at once would take as much memory as the table.
_ADDED = 1 << 14

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_CHARACTER_BYTES = np.repeat([1, 2, 3, 4], [0xC0, 0x20, 0x10, 0x10])  # by the first


class Characters(NamedTuple):
    """What the merges make of single characters.

    tokens, ranks: (65536,) int32, by code point: the one token, and the rank of its last merge; where the bytes end as
    several tokens, above all ranks.
    before, after: (65536,) int32, by two bytes, the second times 256: the lowest rank of the merges across a boundary
    between the two whose right token is the beginning of a character and not all of it; and of those whose left token
    begins inside a character.
    """

    tokens: np.ndarray
    ranks: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Units(NamedTuple):
    """Words, one after another, as tokens that are not all merged yet.

    tokens: (n,) int32.  ranks: (n,) int32, of each one's pair with the following; above all ranks at a word's end.
    first, counts: (words,) int64, where each word's tokens are.
    """

    tokens: np.ndarray
    ranks: np.ndarray
    first: np.ndarray
    counts: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Units]) -> Units:
        tokens, ranks, first, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        sizes = [len(part.tokens) for part in parts]
        first += np.repeat(np.cumsum(sizes) - sizes, [len(part.first) for part in parts])
        return cls(tokens, ranks, first, counts)


class PairTable:
    """Ranks of pairs, looked up for whole arrays: an open hash table whose 64-bit entries hold pair and rank.

    merged: (n,) the id that each merge makes, in the order of their ranks.  tokens: the bytes of every id.
    """

    def __init__(self, byte_ids: Sequence[int], merged: np.ndarray, tokens: TokenBytes) -> None:
        n = len(merged)
        # The id after the largest of bytes and merged tokens stands for "no token"; no pair has it.
        self._no_token = int(max(*byte_ids, merged.max(initial=0))) + 1
        self._id_bits = np.uint64(self._no_token.bit_length())
        self._rank_bits = np.uint64(n.bit_length())
        if 2 * self._id_bits + self._rank_bits > 64:
            raise ValueError(f"vocab: {n} merges of ids up to {self._no_token - 1} are more than can be encoded")
        self._none = np.int32(n)
        self._none_u64 = np.uint64(n)
        self._merged = np.append(merged, self._no_token).astype(np.int32)
        self._byte_ids = np.array(byte_ids, np.int32)
        # An eighth full at most, so that an absent pair, as most are, almost always meets an empty slot.
        bits = max(8, (8 * n).bit_length())
        self._slot_shift = np.uint64(64 - bits)
        self._slot_mask = (1 << bits) - 1
        self._entries = np.full(1 << bits, _EMPTY)
        self._first, self._last = tokens.edges()
        self._sizes = tokens.sizes
        # By two bytes: the rank of that pair; and the lowest rank of all merges across a boundary between the two,
        # whose left token ends in the first and whose right token starts with the second.
        self._rank_of_bytes = np.full(1 << 16, n, np.int32)
        self._lowest_across = self._rank_of_bytes.copy()
        # By token: the lowest rank of the merges in which it is on the left, and on the right; the highest of those
        # that make it.
        self._as_left, self._as_right = np.full((2, self._no_token + 1), n, np.int32)
        self._made = np.full(self._no_token + 1, -1, np.int32)
        self._is_ordered = True  # each token is made before it is used

    def add(self, ranks: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """Adds the pairs of the merges of these ranks; (n,) integers each."""
        for i in range(0, len(ranks), _ADDED):
            self._add(ranks[i : i + _ADDED], left[i : i + _ADDED], right[i : i + _ADDED])

    def _add(self, ranks: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        # What no merge makes and is no byte is never there: it might have the id of "no token", or a greater one.
        known = np.maximum(left, right) < self._no_token
        ranks, left, right = ranks[known], left[known], right[known]
        keys = left.astype(np.uint64) << self._id_bits | right.astype(np.uint64)
        entries = keys << self._rank_bits | ranks.astype(np.uint64)
        slots = (keys * MULTIPLIER >> self._slot_shift).astype(np.int64)
        while len(entries):
            free = self._entries[slots] == _EMPTY
            self._entries[slots[free]] = entries[free]  # of several for one slot, the last stays
            rest = self._entries[slots] != entries
            entries, slots = entries[rest], slots[rest] + 1 & self._slot_mask
        ranks = ranks.astype(np.int32)
        across = self._last.take(left).astype(np.int64) << 8 | self._first.take(right)
        np.minimum.at(self._lowest_across, across, ranks)
        of_bytes = (self._byte_ids.take(across >> 8) == left) & (self._byte_ids.take(across & 0xFF) == right)
        self._rank_of_bytes[across[of_bytes]] = ranks[of_bytes]
        made = self._merged.take(ranks)
        np.minimum.at(self._as_left, left, ranks)
        np.minimum.at(self._as_right, right, ranks)
        np.maximum.at(self._made, made, ranks)
        ids = np.concatenate([left, right, made])
        used = np.minimum(self._as_left.take(ids), self._as_right.take(ids))
        self._is_ordered &= bool((self._made.take(ids) < used).all())

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

    def characters(self, left: np.ndarray, right: np.ndarray) -> Characters:
        """Of a table to which all merges were added; left, right: (n,) the merges' tokens.

        The merges of c3 a9, which is é, and of a space with c3. The first comes first: after a space é is certain.

        >>> tokens = TokenBytes({i: bytes([i]) for i in range(256)} | {256: "é".encode(), 257: bytes([0x20, 0xC3])})
        >>> table = PairTable(range(256), np.array([256, 257]), tokens)
        >>> left, right = np.array([0xC3, 0x20]), np.array([0xA9, 0xC3])
        >>> table.add(np.arange(2), left, right)
        >>> found = table.characters(left, right)
        >>> int(found.tokens[ord("é")]), int(found.ranks[ord("é")]), int(found.before[0xC3 << 8 | 0x20])
        (256, 0, 1)
        """
        # By parts, as add() does: memory is at its most where a tokenizer is loaded.
        parts = np.split(np.arange(1 << 16), (1 << 16) // _ADDED * 4)
        ranks = np.concatenate([self._of_characters(code) for code in parts])
        ranks[: 0x80 if self._is_ordered else None] = self._none
        before, after = np.full((2, 1 << 16), self._none)
        for i in range(0, len(left), _ADDED):
            a, b = left[i : i + _ADDED], right[i : i + _ADDED]
            start, end = self._first.take(b), self._last.take(a)
            across = start.astype(np.int64) << 8 | end
            part = np.flatnonzero(self._sizes.take(b) < _CHARACTER_BYTES.take(start))
            np.minimum.at(before, across[part], (i + part).astype(np.int32))
            part = np.flatnonzero((self._first.take(a) & 0xC0) == 0x80)
            np.minimum.at(after, across[part], (i + part).astype(np.int32))
        return Characters(self._merged.take(ranks), ranks, before, after)

    def _of_characters(self, code: np.ndarray) -> np.ndarray:
        """The ranks of the last merges of characters of two or three bytes (int32), taken for themselves."""
        two, many = self._byte_ids.take([code >> 6 & 0x1F | 0xC0, code & 0x3F | 0x80]), code >= 0x800
        first = np.where(many, self._byte_ids.take(code >> 12 | 0xE0), two[0])
        second = np.where(many, self._byte_ids.take(code >> 6 & 0x3F | 0x80), two[1])
        # Of three bytes one pair of the two is merged first, and then what that made with the third.
        ranks = self.ranks(first, second)
        later = self.ranks(second, two[1])
        from_left = ranks <= later
        of_three = self.ranks(
            np.where(from_left, self._merged.take(ranks), first), np.where(from_left, two[1], self._merged.take(later))
        )
        return np.where(many, of_three, ranks)

    def units(self, text: np.ndarray, starts: np.ndarray, characters: Characters | None = None) -> Units:
        """Words whose bytes follow one another in text (n,) uint8, from `starts` on, after all merges that are certain.

        The words abc, cd and ab with the merges b c, a bc, c d and a b. In abc the last is not certain, since b c comes
        before it; all is merged in two rounds:

        >>> tokens = TokenBytes({i: bytes([i]) for i in range(256)} | {256: b"bc", 257: b"abc", 258: b"cd", 259: b"ab"})
        >>> table = PairTable(range(256), np.array([256, 257, 258, 259]), tokens)
        >>> table.add(np.arange(4), np.array([98, 97, 99, 97]), np.array([99, 256, 100, 98]))
        >>> table.units(np.frombuffer(b"abccdab", np.uint8), np.array([0, 3, 5])).tokens
        array([257, 258, 259], dtype=int32)
        """
        n = len(text)
        pairs = np.ndarray(n - 1, ">u2", np.ascontiguousarray(text), strides=(1,)).astype(np.int64)
        # Of the boundary before each byte, and after the last.
        ranks, lowest = np.full((2, n + 1), self._none)
        ranks[1:-1] = self._rank_of_bytes.take(pairs)
        lowest[1:-1] = self._lowest_across.take(pairs)
        is_first = np.zeros(n + 1, bool)
        is_first[starts] = is_first[n] = True
        ranks[is_first] = lowest[is_first] = self._none
        row = _Row(self._byte_ids.take(text), ranks, lowest, is_first)
        if characters is not None and (text >= 0xC0).any():
            row = self._replace(row, *self._whole_characters(text, is_first, characters))
        while True:
            left, right = row.lowest[:-1], row.lowest[1:]
            if self._is_ordered:
                left = np.maximum(left, self._as_right.take(row.tokens))
                right = np.maximum(right, self._as_left.take(row.tokens))
            ranks = row.ranks[1:-1]
            certain = ranks < left[:-1]
            certain &= ranks < right[1:]
            at = certain.nonzero()[0]
            if MANY_CERTAIN * len(at) <= len(ranks):
                break
            row = self._replace(row, at, at + 2, self._merged.take(ranks.take(at)))
        first = row.is_first.nonzero()[0]
        return Units(row.tokens, row.ranks[1:], first[:-1], np.diff(first))

    def _replace(self, row: _Row, at: np.ndarray, ends: np.ndarray, tokens: np.ndarray) -> _Row:
        """tokens[i] in the place of the two or three from at[i] to ends[i]."""
        kept, changed = np.ones(len(row.ranks), bool), np.zeros(len(row.ranks), bool)
        kept[at + 1] = kept[ends - 1] = False
        changed[at] = changed[ends] = True
        row.tokens[at] = tokens
        k = kept.nonzero()[0]
        row = _Row(row.tokens.take(k[:-1]), row.ranks.take(k), row.lowest.take(k), row.is_first.take(k))
        new = changed.take(k).nonzero()[0]
        new = new[row.lowest.take(new) < self._none]
        row.ranks[new] = self.ranks(row.tokens.take(new - 1), row.tokens.take(new))
        return row

    def _whole_characters(
        self, text: np.ndarray, is_first: np.ndarray, characters: Characters
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where characters start and end whose bytes are certainly merged alone first, and their tokens."""
        at = ((text >= 0xC0) & (text < 0xF0)).nonzero()[0]
        # Eight bytes, the lowest first: the one before the character, its own two or three, the one after, and others.
        padded = np.concatenate([np.zeros(1, np.uint8), text, np.zeros(7, np.uint8)])
        load = np.ndarray(len(text), "<i8", padded, strides=(1,))[at]
        is_long = (load & 0xE000) == 0xE000
        code = load >> 2 & 0x7C0 | load >> 16 & 0x3F
        code = np.where(is_long, code << 6 | load >> 24 & 0x3F, code)
        ends = at + 2 + is_long
        # A word may begin or end inside a character.
        certain = np.where(
            is_long, ((load & 0xC0C00000) == 0x80800000) & (code >= 0x800), (load & 0xC00000) == 0x800000
        )
        certain &= ~(is_first.take(at + 1) | is_first.take(ends - 1, mode="clip"))
        rank = characters.ranks.take(code)
        certain &= (rank < characters.before.take(load & 0xFFFF)) | (is_first.take(at) & (rank < self._none))
        after = characters.after.take(load >> 8 * (1 + is_long) + 8 & 0xFFFF)
        certain &= (rank < after) | (is_first.take(ends, mode="clip"))
        at, ends, code = at[certain], ends[certain], code[certain]
        return at, ends, characters.tokens.take(code)

    def merge(self, units: Units, words: np.ndarray, few: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of these words (their numbers), how many each has, and which are done: once no more than `few` are not,
        these are left, and have no ids.

        Arrays are (height + 1, words) and indexed flat, a word a column. tokens: the id of the token that starts at
        each unit, -1 inside a token. following, preceding: the index of the neighbouring token. keys: rank << 8 | row
        of the token's pair with the following one, so that a column's minimum is the leftmost pair of the lowest rank.
        The last row is "no token", the neighbour of the first and of the last token, in no pair: the ends need no case
        of their own.

        The words abc and cab with the merges a b and ab c:

        >>> tokens = TokenBytes({i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abc"})
        >>> table = PairTable(range(256), np.array([256, 257]), tokens)
        >>> table.add(np.arange(2), np.array([97, 256]), np.array([98, 99]))
        >>> table.merge(table.units(np.frombuffer(b"abccab", np.uint8), np.array([0, 3])), np.arange(2))
        (array([257,  99, 256], dtype=int32), array([1, 2]), array([ True,  True]))
        """
        first, counts = units.first.take(words), units.counts.take(words)
        height, n = int(counts.max()), len(words)
        rows = np.arange(height + 1)[:, None]
        at = first + rows
        tokens = units.tokens.take(at, mode="clip")
        tokens[rows >= counts] = -1
        tokens[height] = self._no_token
        keys = units.ranks.take(at, mode="clip")
        keys[rows >= counts] = self._none
        keys <<= ROW_BITS
        keys |= rows.astype(np.int32)
        index = np.arange((height + 1) * n).reshape(height + 1, n)
        following = np.where(rows < counts - 1, index + n, index[height]).reshape(-1)
        preceding = np.where(rows > 0, index - n, index[height]).reshape(-1)

        flat_tokens, flat_keys = tokens.reshape(-1), keys.reshape(-1)
        while True:
            lowest = keys.min(axis=0)
            columns = (lowest < self._none << ROW_BITS).nonzero()[0]
            if len(columns) <= few:
                break
            key = lowest.take(columns)
            at = (key & (1 << ROW_BITS) - 1) * np.int64(n) + columns
            new = self._merged.take(key >> ROW_BITS)
            absorbed = following.take(at)
            after = following.take(absorbed)
            before = preceding.take(at)
            flat_tokens[absorbed] = -1
            flat_tokens[at] = new
            following[at] = after
            preceding[after] = at
            flat_keys[absorbed] |= self._none << ROW_BITS  # no less than "none", whatever rank was there
            changed = np.concatenate([before, at])
            left = np.concatenate([flat_tokens.take(before), new])
            right = np.concatenate([new, flat_tokens.take(after)])
            row = flat_keys.take(changed) & (1 << ROW_BITS) - 1
            flat_keys[changed] = self.ranks(left, right) << ROW_BITS | row
        kept = tokens[:height].T >= 0
        done = np.ones(n, bool)
        done[columns] = kept[columns] = False
        return tokens[:height].T[kept], np.count_nonzero(kept, axis=1), done


class _Row(NamedTuple):
    """Words as tokens. ranks: of the pair that each boundary parts.  lowest: of all merges across it, now and later.

    tokens: (n,) int32.  ranks, lowest: (n + 1,) int32; above all ranks between words.  is_first: (n + 1,) whether a
    word starts there, or the last one ends.
    """

    tokens: np.ndarray
    ranks: np.ndarray
    lowest: np.ndarray
    is_first: np.ndarray
