"""Merges of a vocabulary, found by their bytes for whole arrays: no Python object for a merge or a token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..definition import Definition
from ..wordkeys import MULTIPLIER

_INVERSE = np.uint64(pow(int(MULTIPLIER), -1, 1 << 64))
# Tokens hashed at a time: their arrays stay in the cache, and little memory is asked for.
_TOKENS = 1 << 14


def find_merges(definition: Definition, data: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Merges as Definition.pairs has them; None if a token is not in the vocabulary, or is a special token there.

    data: (bytes,) uint8, both parts of every merge, one after another.  ends: (2 * merges,) int64, where each ends.
    """
    tokens = definition.tokens
    ids = np.setdiff1d(np.flatnonzero(tokens.sizes), list(definition.special_tokens.values()), assume_unique=True)
    if not len(ids) or not len(data):
        return None
    vocab = np.frombuffer(tokens.join(ids), np.uint8)
    keys = np.concatenate([_hashes(*part) for part in _parts(vocab, np.cumsum(tokens.sizes.take(ids)))])
    in_order = np.sort(keys)
    if (in_order[1:] == in_order[:-1]).any():
        return None
    # By the highest bits of a key the first token with these, which is asked for most; and the others, sorted.
    shift = np.uint64(64 - (8 * len(ids)).bit_length())
    first = np.zeros(1 << 64 - int(shift), np.int32)
    numbers = np.arange(len(ids), dtype=np.int32)
    first[keys[::-1] >> shift] = numbers[::-1]
    others = np.flatnonzero(first.take(keys >> shift) != numbers)
    others = others[np.argsort(keys.take(others))]
    others_keys, others = keys.take(others), np.append(others, 0)
    pairs = []
    for text, stops in _parts(data, ends):
        sizes = np.diff(stops, prepend=0)[::2]
        left, right = _hashes(text, stops).reshape(-1, 2).T
        wanted = np.stack([left, right, left + right * _powers(MULTIPLIER, int(sizes.max())).take(sizes)], axis=1)
        found = first.take(wanted >> shift)
        wrong = (keys.take(found) != wanted).nonzero()
        found[wrong] = others.take(np.searchsorted(others_keys, wanted[wrong]))
        some = ids.take(found)
        # What was found by its hash must have the bytes too.
        if (np.cumsum(tokens.sizes.take(some[:, :2])) != stops).any() or (
            np.cumsum(tokens.sizes.take(some[:, 2])) != stops[1::2]
        ).any():
            return None
        if not tokens.join(some[:, :2]) == tokens.join(some[:, 2]) == text.tobytes():
            return None
        pairs.append(some.astype(np.int32))
    return np.concatenate(pairs)


def _parts(data: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some of the stretches of bytes that end there, and where these end in them."""
    start = 0
    for i in range(0, len(ends), _TOKENS):
        some = ends[i : i + _TOKENS]
        yield data[start : some[-1]], some - start
        start = some[-1]


def _hashes(data: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) uint64: the sum of (byte + 1) * MULTIPLIER^i of each stretch that ends there (Karp & Rabin 1987).

    It follows from sums over all bytes before by a difference and a division by a power.
    """
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data + np.uint64(1)) * _powers(MULTIPLIER, len(data) - 1), out=sums[1:])
    starts = np.append(0, ends[:-1])
    return np.diff(sums.take(ends), prepend=np.uint64(0)) * _powers(_INVERSE, len(data)).take(starts)


def _powers(base: np.uint64, n: int) -> np.ndarray:
    """base^0 to base^n, modulo 2^64."""
    powers = np.full(n + 1, base)
    powers[0] = 1
    return np.cumprod(powers, out=powers)
