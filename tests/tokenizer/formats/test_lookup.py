"""Merges found by hashes: those that there are, and none by a hash alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from rooflight.tokenizer.definition import Definition, define
from rooflight.tokenizer.formats import lookup

BYTES = [bytes([byte]) for byte in range(256)]


def find(tokens: Sequence[bytes], merges: Sequence[tuple[bytes, bytes]]) -> list[list[int]] | None:
    definition: Definition = define(dict(enumerate(tokens)), (), (), "gpt2", False)
    parts = [part for merge in merges for part in merge]
    found = lookup.find_merges(definition, np.frombuffer(b"".join(parts), np.uint8), np.cumsum([*map(len, parts)]))
    return None if found is None else found.tolist()


@pytest.mark.parametrize("at_a_time", [2, 8, 1 << 14])
def test_all_merges_are_found(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(lookup, "_TOKENS", at_a_time)
    rng = random.Random(0)
    tokens, merges = BYTES.copy(), []
    while len(merges) < 200:
        left, right = rng.choices(tokens, k=2)
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    assert find(tokens, merges) == [
        [tokens.index(left), tokens.index(right), tokens.index(left + right)] for left, right in merges
    ]
    assert find(tokens[:-1], merges) is None


def test_what_has_another_tokens_hash_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MULTIPLIER", np.uint64(3))
    monkeypatch.setattr(lookup, "_INVERSE", np.uint64(pow(3, -1, 1 << 64)))
    tokens = [*BYTES, b"ab"]
    assert find(tokens, [(b"a", b"b")]) == [[97, 98, 256]]
    # (d + 1) + 3 (a + 1) = (a + 1) + 3 (b + 1)
    assert find(tokens, [(b"d", b"a")]) is None
    # Two tokens of one hash.
    assert find([*tokens, b"da"], [(b"a", b"b")]) is None
