"""Whole texts to token ids by array operations: no Python object per word.

Every different word has a number. A word of at most 63 bytes is one, two, four or eight 64-bit keys of a table of
numbers (wordkeys.py); longer words, and few, are numbered by a dictionary. All words of a text are
numbered first; then those not met before are encoded together; then the numbers are replaced by ids. A number's value
is an id, for a word of one token, or negative and says where the word's ids are stored.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np

from ..pretokenize import PADDING, SEPARATOR, Cutter, Pattern, Specials, cut_stream, pretokenize
from ..sizes import CHUNK, FEW_LOOKED_UP, MAX_IDS, MAX_WORD_BYTES, MAX_WORDS, TABLE_BITS, WORDS
from ..tokens import ranges
from ..wordkeys import KeyTable, loader, mix, pack
from .words import WordEncoder

# Keys of a word: up to 7, 15, 31 and 63 bytes. The first half of the keys are full, by the choice of the widths.
_WIDTHS = (1, 2, 4, 8)


class TextEncoder:
    """Encodes texts and remembers their words."""

    def __init__(self, words: WordEncoder, pattern: Pattern) -> None:
        self._words = words
        self._pattern = pattern
        self._cutter = Cutter(Specials(()), pattern)
        self._forget()

    def _forget(self) -> None:
        # One allocation, which gets huge pages where there are any: thousands of first touches become a few. Memory
        # that is never touched costs nothing.
        rows = sum(_WIDTHS)
        memory = np.zeros((rows + (len(_WIDTHS) + 1) // 2, 1 << TABLE_BITS), np.uint64)
        numbers = memory[rows:].view(np.int32).reshape(-1, 1 << TABLE_BITS)
        keys = np.split(memory[:rows], np.cumsum(_WIDTHS)[:-1])
        self._tables = [KeyTable(*columns) for columns in zip(keys, numbers, strict=True)]
        self._long: dict[bytes, int] = {}
        # Word 0 is the separator, whose one id is -1.
        self._n_words = 0
        self._values, self._ids = _Growing(1 << 18), _Growing(1 << 20)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []  # starts and lengths of words without a value
        self._number(SEPARATOR + PADDING, np.zeros(1, np.int64), np.ones(1, np.int64))
        self._new.clear()
        self._remember(np.array([-1], np.int32), np.array([1]))

    def encode(self, data: bytes, special_ids: np.ndarray) -> np.ndarray:
        """Ids (int32) of UTF-8 text with separators, whose ids are `special_ids`."""
        padded = data + PADDING
        numbers: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        done = 0
        for piece in cut_stream([data], self._cutter, CHUNK):
            _, starts, lengths = pretokenize(piece, self._pattern)
            starts += done
            done += len(piece)
            for i in range(0, len(starts), WORDS):
                if self._is_full():
                    ids += self._resolve(padded, numbers)
                    numbers.clear()
                    self._forget()
                numbers.append(self._number(padded, starts[i : i + WORDS], lengths[i : i + WORDS]))
        ids += self._resolve(padded, numbers)
        joined = np.concatenate(ids) if ids else np.empty(0, np.int32)
        if len(special_ids):
            joined[joined < 0] = special_ids
        return joined

    def _is_full(self) -> bool:
        most = max(len(self._long), *[table.n for table in self._tables])
        return most > MAX_WORDS or len(self._ids) > MAX_IDS

    def _number(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The numbers of the words; those met first are added to self._new, in the order of their numbers."""
        load, origin = loader(data, starts, lengths)
        numbers = np.empty(len(starts), np.int32)
        left = np.arange(len(starts))
        for table in self._tables:
            fits = lengths < 8 * table.width
            chosen, others = fits.nonzero()[0], (~fits).nonzero()[0]
            if len(chosen):
                start, length = starts.take(chosen), lengths.take(chosen)
                keys = pack(load, start - origin, length, table.width, table.width // 2)
                slots, new = table.find(keys, mix(keys))
                if len(new):
                    table.values[slots.take(new)] = self._n_words + np.arange(len(new))
                    self._n_words += len(new)
                    self._new.append((start.take(new), length.take(new)))
                numbers[left.take(chosen)] = table.values.take(slots)
            left, starts, lengths = left.take(others), starts.take(others), lengths.take(others)
            if len(left) < FEW_LOOKED_UP:
                break
        if len(left):
            numbers[left] = self._number_long(data, starts, lengths)
        return numbers

    def _number_long(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> list[int]:
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        words = [data[i:j] for i, j in spans]
        numbers = list(map(self._long.get, words, repeat(-1)))
        new = []
        for i in [i for i, number in enumerate(numbers) if number < 0]:
            number = self._long.get(words[i], -1)
            if number < 0:  # met first here, and not a moment ago
                number = self._n_words
                self._n_words += 1
                new.append(i)
                if len(words[i]) <= MAX_WORD_BYTES:
                    self._long[words[i]] = number
            numbers[i] = number
        if new:
            self._new.append((starts[new], lengths[new]))
        return numbers

    def _resolve(self, data: bytes, numbers: list[np.ndarray]) -> list[np.ndarray]:
        """Ids of the numbers, after all new words were encoded."""
        if self._new:
            starts = np.concatenate([start for start, _ in self._new])
            lengths = np.concatenate([length for _, length in self._new])
            self._new.clear()
            self._remember(*self._words.encode_words(data, starts, lengths))
        return [self._expand(self._values.array.take(block)) for block in numbers]

    def _expand(self, values: np.ndarray) -> np.ndarray:
        several = (values < 0).nonzero()[0]
        if not len(several):
            return values
        at = ~values.take(several)
        n = self._ids.array.take(at)
        counts = np.ones(len(values), np.int64)
        counts[several] = n
        ids = np.repeat(values, counts)
        ids[ids < 0] = self._ids.array.take(ranges(at + 1, n))
        return ids

    def _remember(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Values for the next words, which have counts[0], counts[1], ... of `ids`: one id, or where ids are stored."""
        offsets = np.cumsum(counts) - counts
        # Stored are each word's count and then its ids.
        at = offsets + np.arange(len(counts))
        stored = np.empty(len(ids) + len(counts), np.int32)
        is_id = np.ones(len(stored), bool)
        is_id[at] = False
        stored[at] = counts
        stored[is_id] = ids
        several = ~(at + len(self._ids))
        self._values.extend(np.where((counts == 1) & (ids.take(offsets) >= 0), ids.take(offsets), several))
        self._ids.extend(stored)


class _Growing:
    """An int32 array that is added to at its end."""

    def __init__(self, capacity: int) -> None:
        self.array: np.ndarray = np.empty(capacity, np.int32)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def extend(self, more: np.ndarray) -> None:
        end = self._n + len(more)
        if end > len(self.array):
            grown = np.empty(2 * end, np.int32)
            grown[: self._n] = self.array[: self._n]
            self.array = grown
        self.array[self._n : end] = more
        self._n = end
