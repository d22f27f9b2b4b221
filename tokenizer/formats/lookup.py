"""Merges of a vocabulary, found by their bytes for whole arrays: no Python object for a merge or a token."""

from __future__ import annotations

import numpy as np

from ..tokens import TokenBytes
from ..wordkeys import MULTIPLIER

_INVERSE = pow(int(MULTIPLIER), -1, 1 << 64)
# Bytes from which on hashes are summed up: their arrays stay in the cache.
_BYTES = 1 << 16


def find_merges(tokens: TokenBytes, data: np.ndarray, middles: np.ndarray, stops: np.ndarray) -> np.ndarray | None:
    """Merges as Definition.pairs has them; None if a token is not in the vocabulary, or two there have the same bytes.

    data: (bytes,) uint8, the tokens that the merges make, one after another.
    middles, stops: (n,) int64, where in it the second part of each begins, and where each ends.
    """
    ids = np.flatnonzero(tokens.sizes)
    ends = np.cumsum(tokens.sizes.take(ids))
    keys = _hashes(np.frombuffer(tokens.join(ids), np.uint8), np.append(0, ends[:-1]), ends)
    by_key = np.sort(keys)
    if (by_key[1:] == by_key[:-1]).any():
        return None
    # By a key's highest bits the last token that has them, and the others in order.
    shift = np.uint64(64 - (8 * len(ids)).bit_length())
    first = np.zeros(1 << 64 - int(shift), np.int32)
    numbers = np.arange(len(ids), dtype=np.int32)
    first[keys >> shift] = numbers
    others = np.flatnonzero(first.take(keys >> shift) != numbers)
    others = np.append(others[np.argsort(keys.take(others))], 0)
    pairs = np.empty((len(stops), 3), np.int32)
    starts = np.append(0, stops[:-1])
    for column, (start, stop) in enumerate(((starts, middles), (middles, stops), (starts, stops))):
        wanted = _hashes(data, start, stop)
        found = first.take(wanted >> shift)
        wrong = np.flatnonzero(keys.take(found) != wanted)
        found[wrong] = others.take(np.searchsorted(keys.take(others[:-1]), wanted.take(wrong)))
        pairs[:, column] = ids.take(found)
        # What was found by its hash must have the bytes too.
        if (tokens.sizes.take(pairs[:, column]) != stop - start).any():
            return None
    return pairs if tokens.join(pairs[:, :2]) == tokens.join(pairs[:, 2]) == data.tobytes() else None


def _hashes(data: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """(n,) uint64: of each data[start:stop] the sum of (byte + 1) * MULTIPLIER^i (Karp & Rabin 1987).

    starts, stops: in order. It follows from sums over all bytes before by two look-ups and a division by a power.
    """
    hashes = np.empty(len(starts), np.uint64)
    longest = int((stops - starts).max(initial=0))
    powers, inverses = np.full((2, _BYTES + longest + 1), [[int(MULTIPLIER)], [_INVERSE]], np.uint64)
    powers[0] = inverses[0] = 1
    np.cumprod(powers, out=powers)
    np.cumprod(inverses, out=inverses)
    bounds = np.searchsorted(starts, np.arange(0, len(data) + _BYTES, _BYTES))
    for n, (i, j) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        some = data[n * _BYTES : (n + 1) * _BYTES + longest]
        sums = np.zeros(len(some) + 1, np.uint64)
        np.cumsum((some + np.uint64(1)) * powers[: len(some)], out=sums[1:])
        start, stop = starts[i:j] - n * _BYTES, stops[i:j] - n * _BYTES
        hashes[i:j] = (sums.take(stop) - sums.take(start)) * inverses.take(start)
    return hashes
