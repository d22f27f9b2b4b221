"""Pre-tokens of a text to token ids, as whole-array operations: no Python object per word.

A word of at most 39 bytes is one, two or five 64-bit integers, and these are the key of an open hash table of the words
met so far. Words not met yet are made unique, encoded together by `Merges.encode_matrix`, and put into the table. Of
the table's values, an id >= 0 is a word of one token; a negative one says where in a store the word's ids are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .decode import TokenBytes, ranges
from .encode_long import LongEncoder
from .encode_words import MULTIPLIER, Merges
from .pretokenize import PADDING, SEPARATOR, Pretokens

# Words remembered; past it all are forgotten, so that no text makes the memory grow without bound.
MAX_WORDS = 1 << 18
# Longer words than this are rarely met again and are not remembered.
MAX_WORD_BYTES = 1 << 10
# Pre-tokens looked up at a time.
_BLOCK = 1 << 18

# New words of fewer bytes in all are encoded one by one; starting up the arrays for them would cost more.
_FEW_BYTES = 1 << 11
_FEW_LONG_BYTES = 1 << 14

# 64-bit integers per word, of which the last one's top byte is the word's length: one more word length in each class.
_WIDTHS = (1, 2, 5)
_MISSING = np.int32(-(2**31))


class TextEncoder:
    """Encodes pre-tokens and remembers words.

    whole: words that are one token whatever the merges make of them (see Tokenizer's ignore_merges).
    """

    def __init__(self, merges: Merges, tokens: TokenBytes, whole: Mapping[bytes, int]) -> None:
        self._merges = merges
        self._whole = whole
        self._windows = LongEncoder(merges, tokens, 8 * _WIDTHS[-1] - 1, self._encode_spans)
        self._forget()

    def encode(self, pretokens: Pretokens, special_ids: np.ndarray) -> np.ndarray:
        """Ids (int32) of the pre-tokens. special_ids: those of the pre-tokens that are separators, in their order."""
        data, starts, lengths = pretokens
        parts = []
        for i in range(0, len(starts), _BLOCK):
            if self._n_words > MAX_WORDS:
                self._forget()
            values = self._look_up(data, starts[i : i + _BLOCK], lengths[i : i + _BLOCK])
            if len(special_ids):
                first = np.frombuffer(data, np.uint8).take(starts[i : i + _BLOCK])
                separators = np.flatnonzero(first == SEPARATOR[0])
                values[separators] = special_ids[: len(separators)]
                special_ids = special_ids[len(separators) :]
            parts.append(self._expand(values)[0])
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _forget(self) -> None:
        self._tables = [_WordTable(width) for width in _WIDTHS]
        self._long: dict[bytes, int] = {}
        self._n_words = 0
        # The ids of words of several tokens: word i has counts[i] of them, from offsets[i] of flat.
        self._counts, self._offsets, self._flat = _Growing(np.int64), _Growing(np.int64), _Growing(np.int32)
        for word, token in self._whole.items():
            self._long[word] = token
        by_table = [[w for w in self._whole if 8 * low <= len(w) < 8 * high] for low, high in ((0, 1), (1, 2), (2, 5))]
        for table, words in zip(self._tables, by_table, strict=True):
            if words:
                data = b"".join(word.ljust(8 * table.width, b"\0") for word in words)
                keys = [*np.frombuffer(data, "<u8").reshape(-1, table.width).T.copy()]
                keys[-1] |= np.array([len(word) for word in words], np.uint64) << np.uint64(56)
                table.insert(keys, np.array([self._whole[word] for word in words], np.int32))

    def _look_up(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The value (int32) of each pre-token."""
        values = np.empty(len(starts), np.int32)
        # Eight bytes from every offset. The padding of `data` keeps the loads of the last words inside it.
        loads = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
        shortest = 0
        for table in self._tables:
            longest = 8 * table.width - 1
            chosen = np.flatnonzero((lengths >= shortest) & (lengths <= longest))
            shortest = longest + 1
            if len(chosen):
                keys = _pack(loads, starts.take(chosen), lengths.take(chosen), table.width)
                found = table.find(keys)
                missing = np.flatnonzero(found == _MISSING)
                if len(missing):
                    found[missing] = self._add(table, [key.take(missing) for key in keys])
                values[chosen] = found
        chosen = np.flatnonzero(lengths >= shortest)
        if len(chosen):
            spans = zip(starts[chosen].tolist(), lengths[chosen].tolist(), strict=True)
            values[chosen] = self._look_up_long([data[i : i + n] for i, n in spans])
        return values

    def _add(self, table: _WordTable, keys: list[np.ndarray]) -> np.ndarray:
        """Encode the words of `keys`, which the table lacks, some more than once; their values."""
        first, inverse = _unique(keys)
        keys = [key.take(first) for key in keys]
        text = np.stack(keys, axis=1).astype("<u8", copy=False).view(np.uint8)
        lengths = text[:, -1].astype(np.int64)
        if lengths.sum() < _FEW_BYTES:
            spans = zip(text, lengths.tolist(), strict=True)
            values = self._remember(*self._one_by_one([row[:n].tobytes() for row, n in spans]))
        else:
            values = self._remember(*self._merges.encode_matrix(text[:, :-1], lengths))
        table.insert(keys, values)
        return values.take(inverse)

    def _look_up_long(self, words: list[bytes]) -> list[int]:
        new = [word for word in dict.fromkeys(words) if word not in self._long]
        if new:
            lengths = np.array([len(word) for word in new])
            if self._whole or lengths.sum() < _FEW_LONG_BYTES:  # of whole words the tables may have parts of these
                values = self._remember(*self._one_by_one(new))
            else:
                data = b"".join(new) + PADDING
                values = self._remember(*self._windows.encode(data, np.cumsum(lengths) - lengths, lengths))
            self._long.update(zip(new, values.tolist(), strict=True))
        found = [self._long[word] for word in words]
        for word in new:
            if len(word) > MAX_WORD_BYTES:
                del self._long[word]
        return found

    def _one_by_one(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [self._merges.encode_word(word) for word in words]
        return np.array([i for ids in encoded for i in ids], np.int32), np.array([len(ids) for ids in encoded])

    def _encode_spans(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._expand(self._look_up(data, starts, lengths))

    def _remember(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Values (int32) for words of counts[0], counts[1], ... of `ids`."""
        starts = np.cumsum(counts) - counts
        values = ids.take(starts)
        several = np.flatnonzero(counts > 1)
        values[several] = ~(len(self._counts) + np.arange(len(several), dtype=np.int32))
        self._counts.extend(counts[several])
        self._offsets.extend(len(self._flat) + starts[several])
        self._flat.extend(ids)
        self._n_words += len(counts)
        return values

    def _expand(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids that the values of a text's words stand for, and how many each has."""
        several = np.flatnonzero(values < 0)
        if not len(several):
            return values, np.ones(len(values), np.int64)
        entries = ~values.take(several)
        n = self._counts.array.take(entries)
        counts = np.ones(len(values), np.int64)
        counts[several] = n
        ids = np.repeat(values, counts)
        ids[ids < 0] = self._flat.array.take(ranges(self._offsets.array.take(entries), n))
        return ids, counts


class _WordTable:
    """An open hash table from words of at most 8 * width - 1 bytes to values.

    A word is `width` uint64, its bytes in order and zeros after them, with its length in the last one's top byte.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._n = 0
        self._allocate(12)

    def _allocate(self, bits: int) -> None:
        self._bits = bits
        self._keys = np.zeros((self.width, 1 << bits), np.uint64)
        self._values = np.zeros(1 << bits, np.int32)

    def _slots(self, keys: list[np.ndarray]) -> np.ndarray:
        return (_mix(keys) >> np.uint64(64 - self._bits)).view(np.int64)

    def find(self, keys: list[np.ndarray]) -> np.ndarray:
        """The value (int32) of each word, _MISSING where the table has none."""
        slots = self._slots(keys)
        values = self._values.take(slots)
        going = np.flatnonzero(~self._equal(slots, keys))
        while len(going):
            at = slots.take(going)
            empty = self._keys[-1].take(at) == 0
            values[going[empty]] = _MISSING
            going = going[~empty]
            at = at[~empty] + 1 & (1 << self._bits) - 1
            slots[going] = at
            equal = self._equal(at, [key.take(going) for key in keys])
            values[going[equal]] = self._values.take(at[equal])
            going = going[~equal]
        return values

    def _equal(self, slots: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        equal = self._keys[0].take(slots) == keys[0]
        for mine, key in zip(self._keys[1:], keys[1:], strict=True):
            equal &= mine.take(slots) == key
        return equal

    def insert(self, keys: list[np.ndarray], values: np.ndarray) -> None:
        """Add words that the table lacks, each once."""
        self._n += len(values)
        if 2 * self._n > 1 << self._bits:
            used = np.flatnonzero(self._keys[-1])
            keys = [np.concatenate(both) for both in zip(self._keys[:, used], keys, strict=True)]
            values = np.concatenate([self._values[used], values])
            self._allocate((4 * self._n).bit_length())
        slots = self._slots(keys)
        going = np.arange(len(values), dtype=np.int32)
        while len(going):
            at = slots.take(going)
            free = self._keys[-1].take(at) == 0
            # Of several words for one free slot the last one gets it; the slot's value says for now which that is.
            self._values[at[free]] = going[free]
            won = free & (self._values.take(at) == going)
            for mine, key in zip(self._keys, keys, strict=True):
                mine[at[won]] = key[going[won]]
            self._values[at[won]] = values[going[won]]
            going = going[~won]
            slots[going] = at[~won] + 1 & (1 << self._bits) - 1


class _Growing:
    """An array that is added to at its end."""

    def __init__(self, dtype: type) -> None:
        self.array: np.ndarray = np.empty(1 << 10, dtype)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def extend(self, more: np.ndarray) -> None:
        end = self._n + len(more)
        if end > len(self.array):
            grown = np.empty(2 * end, self.array.dtype)
            grown[: self._n] = self.array[: self._n]
            self.array = grown
        self.array[self._n : end] = more
        self._n = end


_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


def _pack(loads: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> list[np.ndarray]:
    """The words as _WordTable keys; `loads` has the eight bytes from every offset."""
    keys = []
    for i in range(width):
        key = loads[starts + 8 * i if i else starts]
        # All eight bytes of the integers before the last that the word reaches, none of those after it.
        if i >= width // 2:
            key &= _MASKS.take(lengths - 8 * i if i else lengths, mode="clip")
        keys.append(key)
    keys[-1] |= lengths.astype(np.uint64) << np.uint64(56)
    return keys


def _mix(keys: list[np.ndarray]) -> np.ndarray:
    mixed = keys[0] * MULTIPLIER
    for key in keys[1:]:
        mixed ^= mixed >> np.uint64(32)
        mixed += key
        mixed *= MULTIPLIER
    return mixed


def _unique(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of one of each different word, and for each word which of those it equals."""
    _, first, inverse = np.unique(_mix(keys), return_index=True, return_inverse=True)
    if any(np.any(key != key.take(first).take(inverse)) for key in keys):
        # Two words with one hash.
        _, first, inverse = np.unique(np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)
