"""The merges that tiktoken's ranks stand for."""

from __future__ import annotations

import pytest

from rooflight.tokenizer.formats.tiktoken import pairs_of_ranks


@pytest.mark.parametrize("longest", [128, 256, 512])
def test_many_tokens_of_one_length(longest: int) -> None:
    """Of 512 bytes too, which are no column of the matrix."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    n = 2
    while n <= longest:
        ranks |= {bytes([letter]) * n: len(ranks) + i for i, letter in enumerate(b"abcdefghijklm")}
        n *= 2
    pairs, whole = pairs_of_ranks(ranks)
    tokens = list(ranks)
    assert whole == []
    assert [tokens[left] + tokens[right] for left, right, _ in pairs] == tokens[256:]
    assert all(left == right for left, right, _ in pairs)
