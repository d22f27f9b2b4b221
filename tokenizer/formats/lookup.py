"""Merges of a vocabulary, found by their bytes for whole arrays: no Python object for a merge or a token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..tokens import TokenBytes
from ..wordkeys import MULTIPLIER

_INVERSE = np.uint64(pow(int(MULTIPLIER), -1, 1 << 64))
# Bytes from which on hashes are summed up: their arrays stay in the cache.
_BYTES = 1 << 16


def find_merges(tokens: TokenBytes, data: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Merges as Definition.pairs has them; None if a token is not in the vocabulary, or two there have the same bytes.

    data: (bytes,) uint8, both parts of every merge, one after another.  ends: (2 * merges,) int64, where each ends.
    """
    ids = np.flatnonzero(tokens.sizes)
    keys = _hashes(np.frombuffer(tokens.join(ids), np.uint8), np.cumsum(tokens.sizes.take(ids)))
    in_order = np.sort(keys)
    if (in_order[1:] == in_order[:-1]).any():
        return None
    # By the highest bits of a key the first token with these, which is asked for most; and the others, sorted.
    shift = np.uint64(64 - (8 * len(ids)).bit_length())
    first = np.zeros(1 << 64 - int(shift), np.int32)
    numbers = np.arange(len(ids), dtype=np.int32)
    first[keys[::-1] >> shift] = numbers[::-1]
    others = np.flatnonzero(first.take(keys >> shift) != numbers)
    others = np.append(others[np.argsort(keys.take(others))], 0)

    sizes = np.diff(ends, prepend=0).reshape(-1, 2)
    left, right = _hashes(data, ends).reshape(-1, 2).T
    wanted = np.concatenate(
        [left, right, left + right * _powers(MULTIPLIER, int(sizes.max(initial=0))).take(sizes[:, 0])]
    )
    found = first.take(wanted >> shift)
    wrong = np.flatnonzero(keys.take(found) != wanted)
    found[wrong] = others.take(np.searchsorted(keys.take(others[:-1]), wanted.take(wrong)))
    pairs = ids.take(found).astype(np.int32).reshape(3, -1).T
    # What was found by its hash must have the bytes too.
    if (tokens.sizes.take(pairs) != np.column_stack([sizes, sizes.sum(axis=1)])).any():
        return None
    same = tokens.join(pairs[:, :2]) == tokens.join(pairs[:, 2]) == data.tobytes()
    return np.ascontiguousarray(pairs) if same else None


def _hashes(data: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) uint64: the sum of (byte + 1) * MULTIPLIER^i of each stretch that ends there (Karp & Rabin 1987).

    It follows from sums over all bytes before by two look-ups and a division by a power.
    """
    starts = np.append(0, ends[:-1])
    longest = int((ends - starts).max(initial=0))
    powers, inverses = _powers(MULTIPLIER, _BYTES + longest), _powers(_INVERSE, _BYTES)
    hashes = np.empty(len(ends), np.uint64)
    bounds = np.searchsorted(starts, np.arange(0, len(data) + _BYTES, _BYTES)).tolist()
    for n, (i, j) in enumerate(pairwise(bounds)):
        first = n * _BYTES
        some = data[first : first + _BYTES + longest]
        sums = np.zeros(len(some) + 1, np.uint64)
        np.cumsum((some + np.uint64(1)) * powers[: len(some)], out=sums[1:])
        start = starts[i:j] - first
        hashes[i:j] = (sums.take(ends[i:j] - first) - sums.take(start)) * inverses.take(start)
    return hashes


def _powers(base: np.uint64, n: int) -> np.ndarray:
    """base^0 to base^n, modulo 2^64."""
    powers = np.full(n + 1, base)
    powers[0] = 1
    return np.cumprod(powers, out=powers)
