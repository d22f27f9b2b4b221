"""Counting, against collections.Counter."""

import pickle
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rooflight.tokenizer.pretokenize import PADDING, SEPARATOR, Pretokens, pretokenize
from rooflight.tokenizer.training.count import WordCounter, Words


def pretokens_of(words: list[bytes]) -> Pretokens:
    lengths = np.array([len(word) for word in words], np.int64)
    return Pretokens(b"".join(words) + PADDING, np.cumsum(lengths) - lengths, lengths)


# Lengths around those where a key more is needed, and NULs, which look like the absence of bytes.
WORD = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.sampled_from([0, 1, 97, 254]), min_size=n, max_size=n).map(bytes)
)


@given(st.lists(st.lists(WORD, max_size=30), max_size=4))
def test_counts_equal_a_counter(batches):
    counter = WordCounter()
    for words in batches:
        counter.add(pretokens_of(words))
    assert counter.words().todict() == Counter(word for words in batches for word in words)


@given(st.dictionaries(WORD, st.integers(1, 1 << 60), max_size=30))
def test_counts_add_up_in_64_bits(counts):
    counter = WordCounter()
    for _ in range(3):
        counter.add(pretokens_of(list(counts)), np.array(list(counts.values()), np.int64))
    assert counter.words().todict() == {word: 3 * count for word, count in counts.items()}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(WORD, max_size=30), min_size=2, max_size=4))
def test_counters_of_several_processes_add_up(batches):
    total, *others = [WordCounter() for _ in batches]
    for counter, words in zip([total, *others], batches, strict=True):
        counter.add(pretokens_of(words))
    for other in others:
        total.add_tally(pickle.loads(pickle.dumps(other.tally())))
    assert total.words().todict() == Counter(word for words in batches for word in words)


def test_separators_are_no_words():
    counter = WordCounter()
    counter.add(pretokenize(b"a" + SEPARATOR + b" b" + SEPARATOR + SEPARATOR + b"a"))
    assert counter.words().todict() == {b"a": 2, b" b": 1}


@pytest.mark.parametrize("byte", [b"\0", b"a", b"\xfe"])
def test_words_at_the_bounds_of_the_tables(byte):
    # A thousand times each: in tables. Twice more: in the dict, if of eight bytes or more. No word appears twice.
    words = [byte * n for n in (1, 6, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33)]
    counter = WordCounter()
    for batch in (words * 1000, words, words[::-1]):
        counter.add(pretokens_of(batch))
    found = counter.words()
    assert found.todict() == dict.fromkeys(words, 1002)
    assert len(found.counts) == len(words)


def test_more_words_than_the_first_table_holds():
    # 200,000 different words of each length class but the last, some of them often.
    rng = random.Random(0)
    words = [rng.randbytes(length) for length in (5, 9, 20, 27) for _ in range(200_000)] + [b"\xfe" * 33] * 9
    words += rng.choices(words, k=50_000)
    words = [word for word in words if word[0] != SEPARATOR[0]]
    counter = WordCounter()
    counter.add(pretokens_of(words))
    assert counter.words().todict() == Counter(words)


def test_memory_is_bounded_by_the_different_words():
    text = b"the same few words over and over, " * 8_000
    counter = WordCounter()
    counter.add(pretokenize(text))
    tracemalloc.start()
    for _ in range(20):
        counter.add(pretokenize(text))
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 100_000
    assert counter.words().todict()[b" same"] == 21 * 8_000


def test_a_word_as_long_as_the_text():
    text = b"a" * 3_000_000
    counter = WordCounter()
    counter.add(pretokenize(text))
    counter.add(pretokenize(text + b" b"))
    assert counter.words().todict() == {text: 2, b" b": 1}


@pytest.mark.parametrize(("n", "kept"), [(4, "abcd"), (3, "ab"), (2, "ab"), (1, "a"), (9, "abcd")])
def test_the_most_frequent_words(n, kept):
    words = Words(b"abcd", np.ones(4, np.int64), np.array([9, 5, 2, 2]))
    assert words.most_frequent(n).todict() == {c.encode(): words.todict()[c.encode()] for c in kept}
