"""Words as keys and back, and the table of them against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rooflight.tokenizer.pretokenize import PADDING
from rooflight.tokenizer.wordkeys import LONGER, KeyTable, loader, mix, pack, unpack

# NULs look like the absence of bytes, 0xfe fills a key; 40 and 72 are lengths' own marks.
WORD = st.lists(st.sampled_from([0, 40, 72, 97, 254]), min_size=32, max_size=63).map(bytes)


def keys_of(words: list[bytes], width: int, n_full: int) -> list[np.ndarray]:
    lengths = np.array([len(word) for word in words], np.int64)
    starts = np.cumsum(lengths) - lengths
    load, origin = loader(b"".join(words) + PADDING, starts, lengths)
    return pack(load, starts - origin, lengths, width, n_full)


@given(st.lists(WORD, min_size=1, max_size=20))
def test_different_words_have_different_keys(words: list[bytes]) -> None:
    """Words of half to all of their keys, as the encoder has them: a prefix is another word."""
    words += [word[:n] for word in words for n in (32, 40, 55, 56)]
    keys = list(zip(*(key.tolist() for key in keys_of(words, 8, 4)), strict=True))
    assert len(set(keys)) == len(set(words))
    assert all(key[-1] for key in keys)


@given(st.lists(st.tuples(st.integers(1, 4), WORD), min_size=1, max_size=20), st.integers(0, 7))
def test_unpack_inverts_pack(words: list[tuple[int, bytes]], more: int) -> None:
    for width in (1, 2, 3, 4):
        cut = [word[: 8 * width - 8 + more] for n, word in words if n == width and 8 * width - 8 + more]
        if cut:
            table, lengths = unpack(keys_of(cut, width, width - 1))
            assert [row[:n].tobytes() for row, n in zip(table, lengths.tolist(), strict=True)] == cut


def test_a_word_that_is_too_long_has_a_key_of_its_own() -> None:
    assert keys_of([b"a" * 8, b"a" * 7], 1, 0)[0].tolist() == [int(LONGER), 0x6161616161616108]


@pytest.mark.parametrize("hashed", [True, False])
@given(st.lists(st.lists(st.integers(1, 30), max_size=20), max_size=8))
def test_a_table_equals_a_dict(hashed: bool, batches: list[list[int]]) -> None:
    """With one hash for all too, so that every word is probed for, past the table's end."""
    table, expected = KeyTable.of(2, 5, np.int32), dict[int, int]()
    for words in batches:
        keys = [np.zeros(len(words), np.uint64), np.array(words, np.uint64)]
        mixed = mix(keys) if hashed else np.full(len(words), 2**64 - 1, np.uint64)
        assert table.get(keys, mixed).tolist() == [expected.get(word, 0) for word in words]
        slots, new = table.find(keys, mixed)
        assert sorted(words[i] for i in new) == sorted(set(words) - set(expected))
        for i in new.tolist():
            expected[words[i]] = table.values[slots[i]] = len(expected) + 1
        assert table.values[slots].tolist() == [expected[word] for word in words]
        assert table.n == len(expected)
    (_, found), values = table.entries()
    assert dict(zip(found.tolist(), values.tolist(), strict=True)) == expected
