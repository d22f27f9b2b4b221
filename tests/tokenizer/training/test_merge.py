"""The trainer, merge for merge against one that counts all pairs again before each merge."""

import random
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rooflight.tokenizer.pretokenize import pretokenize
from rooflight.tokenizer.training import merge, ranking
from rooflight.tokenizer.training.count import WordCounter, Words
from rooflight.tokenizer.training.merge import learn_merges
from support.bpe_reference import merge_all


def words_of(counts: dict[bytes, int]) -> Words:
    lengths = np.array([len(word) for word in counts], np.int64)
    return Words(b"".join(counts), lengths, np.array(list(counts.values()), np.int64))


def naive(counts: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    splits = {word: [word[i : i + 1] for i in range(len(word))] for word in counts}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in counts.items():
            for pair in pairwise(splits[word]):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        splits = {word: merge_all(split, merges[-1]) for word, split in splits.items()}
    return merges


# Few letters and small counts: most pairs are as frequent as another. 0x00 and 0xFF are the least and greatest bytes.
TIED = st.sampled_from([b"a", b"ab", b"abc", b"\x00\xff", b"abcd ."]).flatmap(
    lambda letters: st.dictionaries(
        st.lists(st.sampled_from(list(letters)), min_size=1, max_size=24).map(bytes), st.integers(1, 3), max_size=30
    )
)


@given(TIED, st.integers(0, 70))
def test_tied_counts(counts, n_merges):
    assert learn_merges(words_of(counts), n_merges) == naive(counts, n_merges)


@given(TIED, st.integers(1, 70), st.integers(1, 10))
def test_many_epochs_small_slices_and_a_short_front(counts, n_merges, rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_threshold", lambda found, **_: int(np.sort(found)[-rank:][0]))
        patch.setattr(ranking, "FRONT", rank)
        patch.setattr(ranking, "NEAR", 2 * rank)
        patch.setattr(ranking, "MAX_PLACES", 3 * rank)
        patch.setattr(ranking, "PASSED", rank)
        patch.setattr(merge, "TOKENS", 5 * rank)
        assert learn_merges(words_of(counts), n_merges) == naive(counts, n_merges)


@given(st.dictionaries(st.binary(min_size=1, max_size=8), st.integers(1, 1 << 55), max_size=12))
def test_any_bytes_and_great_counts(counts):
    assert learn_merges(words_of(counts), 40) == naive(counts, 40)


def random_counts(rng: random.Random) -> dict[bytes, int]:
    return Counter(bytes(rng.choices(b"abcd", k=rng.randrange(2, 20))) for _ in range(rng.randrange(2, 30)))


# One for each half of the rule for ties, where a pair merged before its turn would spoil a greater one's:
TIES = [
    {b"hdgc": 1},  # (d, g) and (g, c) before (h, d): a greater token before the pair
    {b"ca": 5, b"qc": 4, b"cb": 2, b"cbcaz": 1},  # (ca, z) before (cb, ca): c is less than ca, cb greater
    {b"ebeaeeac": 1},  # the pair's own token is met again after it
    {b"ac": 9, b"xa": 5, b"qx": 3, b"xac": 1, b"xadxacv": 1},  # (xa, d) before (xac, v): x will become xac
]


@pytest.mark.parametrize("front", [512, 1])
@pytest.mark.parametrize("counts", TIES)
def test_ties_that_merging_early_would_spoil(counts, front, monkeypatch):
    monkeypatch.setattr(ranking, "FRONT", front)
    monkeypatch.setattr(merge, "_threshold", lambda found, **_: 1)  # one epoch, with all pairs in it
    assert learn_merges(words_of(counts), 60) == naive(counts, 60)


def test_batches_need_their_guard_against_ties(monkeypatch):
    # A guard that lets everything pass must be caught by corpora like these, or they test nothing.
    rng = random.Random(1)
    corpora = [random_counts(rng) for _ in range(60)]
    expected = [naive(counts, 60) for counts in corpora]
    assert [learn_merges(words_of(counts), 60) for counts in corpora] == expected
    monkeypatch.setattr(ranking.Ranking, "_outranks_ties", lambda self, entry, a, b: True)
    assert [learn_merges(words_of(counts), 60) for counts in corpora] != expected


def test_batches_are_used(monkeypatch):
    sizes = []
    join = merge._Corpus.merge

    def recording(self, positions, names, first_id):
        sizes.append(len(positions))
        return join(self, positions, names, first_id)

    monkeypatch.setattr(merge._Corpus, "merge", recording)
    text = (Path(sysconfig.get_path("stdlib")) / "typing.py").read_bytes()
    counter = WordCounter()
    counter.add(pretokenize(text))
    assert len(learn_merges(counter.words(), 1_000)) == 1_000
    assert 1_000 <= sum(sizes) < 1_050  # merged before their turn, and their turn never came
    assert len(sizes) < 90  # the last ones too


def test_real_text():
    text = (Path(sysconfig.get_path("stdlib")) / "typing.py").read_bytes()[:60_000]
    text += "日本語の文章と、中文的文字。Русский текст, ελληνικά, हिन्दी में पाठ। 😀😀👩\u200d👧 ".encode() * 3
    counter = WordCounter()
    counter.add(pretokenize(text))
    words = counter.words()
    assert learn_merges(words, 400) == naive(words.todict(), 400)


@pytest.mark.parametrize("word", [b"a", b"ab", b"^", b" ", b"aab", b"abcabd"])
def test_a_long_repetitive_word_costs_linear_work(word, monkeypatch):
    touched = 0
    occurrences = merge._Corpus._occurrences

    def counting(self, positions, a, b):
        nonlocal touched
        touched += sum(map(len, positions))
        return occurrences(self, positions, a, b)

    monkeypatch.setattr(merge._Corpus, "_occurrences", counting)
    learn_merges(words_of({word * (300_000 // len(word)): 1}), 100)
    assert touched < 3 * 300_000
    short = {word * (1_000 // len(word)): 1}
    assert learn_merges(words_of(short), 40) == naive(short, 40)


def test_progress_is_told_of_every_merge():
    told: list[int] = []
    merges = learn_merges(words_of({b"abcabd": 2, b"xyz": 1}), 50, told.append)
    assert sum(told) == len(merges) == 6
    assert learn_merges(words_of({}), 50) == []
    assert learn_merges(words_of({b"a": 9}), 50) == []


def test_ids_beyond_16_bits_sort_too():
    rng = np.random.default_rng(0)
    for high in (1 << 8, 1 << 16, 1 << 21, 1 << 40):
        code = rng.integers(0, high, 1_000).astype(np.uint64) // 3 * 3
        np.testing.assert_array_equal(merge._stable_order(code), np.argsort(code, kind="stable"))
