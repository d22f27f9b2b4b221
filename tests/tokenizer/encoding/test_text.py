"""The encoder's arrays against the plain merges: words of every length, long words by windows, tables that fill up."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rooflight.tokenizer import GPT2_PATTERN, Tokenizer
from rooflight.tokenizer.definition import Definition
from rooflight.tokenizer.encoding import text as encode_text
from rooflight.tokenizer.encoding import words as encode_words
from rooflight.tokenizer.encoding.words import WordEncoder
from rooflight.tokenizer.tokens import TokenBytes
from support import bpe_reference

ALPHABET = [b"a", b"b", b" ", "é".encode(), "日".encode(), b"\x00"]


def random_merges(seed: int, n: int) -> list[tuple[bytes, bytes]]:
    """Merges in an order that no training gives: of any tokens there are, listed anywhere."""
    rng = random.Random(seed)
    tokens = sorted({bytes([b]) for token in ALPHABET for b in token})
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n:
        pair = (rng.choice(tokens), rng.choice(tokens))
        if pair not in merges and pair[0] + pair[1] not in tokens:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    rng.shuffle(merges)
    return merges


def tokenizer_of(merges: list[tuple[bytes, bytes]]) -> Tokenizer:
    tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
    return Tokenizer(dict(enumerate(tokens)), merges, pattern=r"[^|]+|\|")


trained = bpe_reference.train("aab abab bbé ébaé 日日a日b 日é日é aaaa bbbb aaaaaaaa \x00\x00b\x00" * 3, 30, r"[^|]+")[1]
MERGES = [trained, [], *(random_merges(seed, 25) for seed in range(6))]
TOKENIZERS: list[Tokenizer] = []
tokenizers = st.integers(0, len(MERGES) - 1).map(TOKENIZERS.__getitem__)
words = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=150).map(b"".join)


@pytest.fixture(scope="module", params=[0, None], ids=["arrays", "as it is"], autouse=True)
def few(request: pytest.FixtureRequest) -> Iterator[None]:
    """Arrays and windows for every word, however few there are; then one by one where that is the faster."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is not None:
            patch.setattr(encode_words, "FEW_MERGED", request.param)
            patch.setattr(encode_text, "FEW_LOOKED_UP", request.param)
        TOKENIZERS[:] = [tokenizer_of(merges) for merges in MERGES]  # that have met no words yet
        yield


@given(tokenizers, st.lists(words, min_size=1, max_size=8))
@settings(max_examples=250, deadline=None)
def test_words_of_every_length_equal_the_reference(tokenizer: Tokenizer, words: list[bytes]) -> None:
    expected = [token for word in words for token in [*bpe_reference.encode_word(word, tokenizer.merges), b"|"]]
    assert [tokenizer.vocab[i] for i in tokenizer.encode_bytes(b"".join(word + b"|" for word in words))] == expected


@given(tokenizers, words)
@settings(max_examples=100, deadline=None)
def test_one_word_by_list_and_by_heap_equals_the_reference(tokenizer: Tokenizer, word: bytes) -> None:
    encoder = tokenizer._encoder._word_encoder
    for ids in (encoder.encode_word(word), encoder._merge_with_heap(list(word))):
        assert [tokenizer.vocab[i] for i in ids] == bpe_reference.encode_word(word, tokenizer.merges)


@given(tokenizers, st.integers(0, 1 << 32), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_words_of_many_windows_equal_the_heap(tokenizer: Tokenizer, seed: int, n_different: int) -> None:
    # Few different characters: long tokens, seams that take several rounds, and windows of windows.
    rng = random.Random(seed)
    part = b"".join(rng.choices(ALPHABET[:n_different], k=rng.randrange(1, 2000)))
    word = part * rng.randrange(1, 4)
    assert tokenizer.encode_bytes(word).tolist() == tokenizer._encoder._word_encoder.encode_word(word)


@pytest.mark.parametrize(("limit", "most"), [("MAX_WORDS", 600), ("MAX_IDS", 1600)])
def test_tables_that_forget_change_nothing(limit: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [b"|".join(b"".join(rng.choices(ALPHABET, k=rng.randrange(1, 30))) for _ in range(1500)) for _ in range(3)]
    expected = [TOKENIZERS[0].encode_bytes(text) for text in texts]
    monkeypatch.setattr(encode_text, limit, 100)
    monkeypatch.setattr(encode_text, "WORDS", 64)
    tokenizer = tokenizer_of(trained)
    for text, ids in zip(texts, expected, strict=True):
        assert np.array_equal(tokenizer.encode_bytes(text), ids)
        assert tokenizer._encoder.bulk._local.text_encoder._n_words < most


def test_words_with_one_hash_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"|".join(b"ab" * (i % 19 + 1) for i in range(300)) + "|日é".encode() * 50
    expected = TOKENIZERS[0].encode_bytes(text)
    monkeypatch.setattr(encode_text, "mix", lambda keys: np.zeros(len(keys[0]), np.uint64))
    assert np.array_equal(tokenizer_of(trained).encode_bytes(text), expected)


def test_pairs_with_one_hash_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "|".join(f"aab{'abé日'[i % 4] * (i % 5)}bba{'é日'[i % 2]}ab" for i in range(300)).encode()
    for tokenizer in TOKENIZERS:
        expected = tokenizer.encode_bytes(text)
        with monkeypatch.context() as patch:
            patch.setattr(encode_words, "MULTIPLIER", np.uint64(0))
            assert np.array_equal(tokenizer_of(tokenizer.merges).encode_bytes(text), expected)


hostile = {"a": b"a", "space": b" ", "^": b"^", "ab": b"ab", "=-": b"=-", "a0": b"a0", "random": b""}
hostile["kanji"] = "日".encode()


@pytest.mark.parametrize("unit", hostile.values(), ids=hostile)
def test_a_million_characters_take_linear_time(unit: bytes) -> None:
    # ~0.3 s each; a quadratic step would take minutes.
    rng = random.Random(1)
    text = unit * 1_000_000 if unit else bytes(rng.choices(b"abcdefgh", k=1_000_000))
    tokenizer = tokenizer_of([*trained, (b"^", b"^"), (b"^^", b"^^"), (b"=", b"-")])
    start = time.process_time()
    ids = tokenizer.encode_bytes(text)
    assert time.process_time() - start < 5
    assert tokenizer.decode_bytes(ids) == text
    assert len(ids) <= len(text)


def test_pair_tables_refuse_more_merges_than_they_hold() -> None:
    big = 1 << 40
    vocab = {i: bytes([i]) for i in range(256)}
    with pytest.raises(ValueError, match="more than can be encoded"):
        WordEncoder(Definition(vocab, np.array([[97, 98, big]]), {}, GPT2_PATTERN), TokenBytes(vocab))
