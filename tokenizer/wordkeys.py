"""Words as 64-bit integers, and open hash tables of these: whole arrays at a time, no Python object for a word.

A word of at most 8 * width - 1 bytes is `width` integers, its keys: its bytes, loaded straight from the text. The last
key is shifted up, so that bytes past the word's end leave at the top, and its low bits say by how many bits, which
tells the word's length; it is never 0, which marks an empty slot.

Counting (training/count.py), encoding (encoding/text.py) and the trainer's pairs, of one key (training/ranking.py),
have their tables here. The encoder's pairs (encoding/pairs.py) have one of their own: its entries are key and value in
one integer, so that the innermost loop of merging reads memory once for a pair, not twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from .pretokenize import PADDING
from .sizes import WORDS

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth, multiplicative hashing)
# Stands for the shift of a word that is too long for its keys, of which this is then the last.
LONGER = np.uint64(72)
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


def loader(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """load and origin: load(i) gives the eight bytes from offset origin + i on, as little-endian integers.

    data: bytes followed by PADDING, which keeps the loads of the last word inside it.
    starts, lengths: (n,) int64, of words, in order.
    """
    origin, end = int(starts[0]), int(starts[-1] + lengths[-1])
    loads = np.ndarray(end - origin + len(PADDING) - 7, "<u8", data, origin, (1,))
    # Where words are dense a copy serves faster.
    return loads.copy().take if end - origin < 16 * len(starts) else loads.__getitem__, origin


def pack(
    load: Callable[[np.ndarray], np.ndarray], at: np.ndarray, lengths: np.ndarray, width: int, n_full: int
) -> list[np.ndarray]:
    """The keys of the words at `at`: (n,) uint64 each. The first n_full keys are full of bytes in every word.

    A word that is too long has LONGER for the last key.
    """
    keys = [load(at + 8 * i if i else at) for i in range(width)]
    for i in range(n_full, width - 1):
        keys[i] &= _MASKS.take(lengths - 8 * i, mode="clip")
    shifts = _shifts(width).take(lengths, mode="clip")
    keys[-1] <<= shifts
    keys[-1] |= shifts
    return keys


def unpack(keys: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The words' bytes, (n, 8 * width) with zeros behind, and lengths; of one that was too long a wrong one."""
    shifts = keys[-1] & np.uint64(0xFF)
    table = np.stack([*keys[:-1], keys[-1] >> shifts], axis=1).astype("<u8").view(np.uint8)
    return table, table.shape[1] - (shifts // np.uint64(8)).view(np.int64)


@cache
def _shifts(width: int) -> np.ndarray:
    """By a word's length, the bits that are unused in its keys. A shift by 64 or more leaves 0."""
    shifts = np.arange(8 * width, -1, -1).astype(np.uint64) * np.uint64(8)
    shifts[-1] = LONGER
    return shifts


def mix(keys: Sequence[np.ndarray]) -> np.ndarray:
    """A hash (uint64) of each word, whose highest bits are its slot."""
    mixed = keys[0] * MULTIPLIER
    for key in keys[1:]:
        mixed ^= mixed >> np.uint64(32)
        mixed += key
        mixed *= MULTIPLIER
    return mixed


class KeyTable:
    """An open hash table from words' keys to values, with linear probing.

    keys: (width, slots) uint64, zero.  values: (slots,) integers, zero; whoever asks for slots reads and writes them.
    slots: a power of two.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.width = len(keys)
        self._fill(keys, values)

    def _fill(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys = list(keys)
        self.values = values
        self.n = 0  # words, of those that find() added
        self._shift = np.uint64(65 - len(values).bit_length())

    @classmethod
    def of(cls, width: int, bits: int, dtype: type[np.signedinteger]) -> KeyTable:
        """An empty table of 2^bits slots."""
        return cls(np.zeros((width, 1 << bits), np.uint64), np.zeros(1 << bits, dtype))

    def grow(self, bits: int) -> None:
        """Makes the table one of 2^bits slots; the words keep their values."""
        keys, values = self.entries()
        self.keys, self.values = [], values[:0]  # freed before the larger ones are made
        self._fill(np.zeros((self.width, 1 << bits), np.uint64), np.zeros(1 << bits, values.dtype))
        for at in range(0, len(values), WORDS):
            part = [key[at : at + WORDS] for key in keys]
            slots, _ = self.find(part, mix(part))
            self.values[slots] = values[at : at + WORDS]

    def home(self, mixed: np.ndarray) -> np.ndarray:
        """The slots at which words of these hashes are sought first."""
        return (mixed >> self._shift).view(np.int64)

    def holds(self, slots: np.ndarray, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Whether slots[i] holds the i-th word."""
        here = self.keys[0].take(slots) == keys[0]
        for column, key in zip(self.keys[1:], keys[1:], strict=True):
            here &= column.take(slots) == key
        return here

    def put(self, slots: np.ndarray, keys: Sequence[np.ndarray]) -> None:
        """Puts words into slots; of several for one slot the last."""
        for column, key in zip(self.keys, keys, strict=True):
            column[slots] = key

    def find(self, keys: Sequence[np.ndarray], mixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each word's slot, and the indices of the words that had none until now, where they stand first or later.

        These have the value 0. Of the words `the`, `cat`, `the`, and then `cat` and `sat`:

        >>> table = KeyTable.of(1, 8, np.int32)
        >>> the, cat, sat = (int.from_bytes(bytes([40, 0, 0, 0, 0]) + w, "little") for w in (b"the", b"cat", b"sat"))
        >>> words = [np.array([the, cat, the], np.uint64)]
        >>> slots, new = table.find(words, mix(words))
        >>> table.values[slots[new]] = [7, 8]
        >>> new, table.values[slots]
        (array([1, 2]), array([8, 7, 8], dtype=int32))
        >>> words = [np.array([cat, sat], np.uint64)]
        >>> slots, new = table.find(words, mix(words))
        >>> new, table.values[slots]
        (array([1]), array([7, 0], dtype=int32))
        """
        slots = self.home(mixed)
        going = (~self.holds(slots, keys)).nonzero()[0]
        new = [going[:0]]
        while len(going):
            at = slots.take(going)
            free = (self.keys[-1].take(at) == 0).nonzero()[0]
            if len(free):
                # Of several words for one free slot the last gets it; the slot's value says for now which that is.
                claimed, claims = at.take(free), going.take(free)
                self.values[claimed] = claims
                won = self.values.take(claimed) == claims
                claimed, claims = claimed[won], claims[won]
                self.put(claimed, [key.take(claims) for key in keys])
                self.values[claimed] = 0
                new.append(claims)
            here = self.holds(at, [key.take(going) for key in keys])
            going = going[~here]
            slots[going] = at[~here] + 1 & len(self.values) - 1
        found = np.concatenate(new)
        self.n += len(found)
        return slots, found

    def get(self, keys: Sequence[np.ndarray], mixed: np.ndarray) -> np.ndarray:
        """Each word's value, 0 where the table has none."""
        slots = self.home(mixed)
        here = self.holds(slots, keys)
        values = self.values.take(slots) * here
        going = (~here & (self.keys[-1].take(slots) != 0)).nonzero()[0]
        while len(going):
            at = slots[going] = slots.take(going) + 1 & len(self.values) - 1
            here = self.holds(at, [key.take(going) for key in keys])
            values[going[here]] = self.values.take(at[here])
            going = going[~here & (self.keys[-1].take(at) != 0)]
        return values

    def entries(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The keys of every word, and the values."""
        full = np.flatnonzero(self.keys[-1])
        return [key[full] for key in self.keys], self.values[full]
