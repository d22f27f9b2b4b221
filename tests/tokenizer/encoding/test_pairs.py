"""Merges of thousands of words at once against the plain merges, one at a time: any list, any bytes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from rooflight.tokenizer import GPT2_PATTERN
from rooflight.tokenizer.definition import Definition
from rooflight.tokenizer.encoding import pairs as encode_pairs
from rooflight.tokenizer.encoding import words as encode_words
from rooflight.tokenizer.encoding.words import WordEncoder
from rooflight.tokenizer.tokens import TokenBytes
from support import bpe_reference

# Characters that share their first bytes, or their last.
CHARACTERS = [
    character.encode() for character in ("a", "b", " ", "é", "©", "ã", "日", "旦", "早", "ऩ", "あ", "い", "😀")
]


def random_list(rng: random.Random, n: int, is_ordered: bool) -> list[tuple[bytes, bytes]]:
    """Merges of tokens that there are, listed in the order they are made in, as training lists them, or in any.

    Half of them make parts of characters, and whole ones. Those in any order make some tokens in several ways, and have
    some of tokens that none makes.
    """
    tokens = sorted({bytes([byte]) for character in CHARACTERS for byte in character})
    parts = {c[i:j] for c in CHARACTERS for i in range(len(c)) for j in range(i + 1, len(c) + 1)}
    merges: list[tuple[bytes, bytes]] = []
    for _ in range(40 * n):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if not is_ordered and rng.random() < 0.2:
            left += rng.choice(tokens)
        if (left + right in tokens) if is_ordered else ((left, right) in merges):
            continue
        if len(merges) % 2 and left + right not in parts:
            continue
        merges.append((left, right))
        tokens.append(left + right)
        if len(merges) == n:
            break
    if not is_ordered:
        rng.shuffle(merges)
    return merges


def encoder_of(merges: list[tuple[bytes, bytes]]) -> tuple[WordEncoder, list[bytes]]:
    tokens = [token for left, right in merges for token in (left + right, left, right)]
    vocab = list(dict.fromkeys([bytes([byte]) for byte in range(256)] + tokens))
    id_of = {token: i for i, token in enumerate(vocab)}
    pairs = np.array([(id_of[left], id_of[right], id_of[left + right]) for left, right in merges], np.int32)
    definition = Definition(dict(enumerate(vocab)), pairs.reshape(-1, 3), {}, GPT2_PATTERN)
    return WordEncoder(definition, TokenBytes(definition.vocab)), vocab


def random_words(rng: random.Random, n: int) -> list[bytes]:
    """Of whole characters, mostly; some begin or end inside one, as the long words' windows may."""
    found = []
    while len(found) < n:
        word = b"".join(rng.choices(rng.sample(CHARACTERS, rng.choice((2, 3, 6))), k=rng.choice((1, 2, 3, 5, 9, 20))))
        if rng.random() < 0.3:
            i = rng.randrange(len(word))
            word = rng.choice((word[i:], word[: i + 1], word[:i] + bytes([rng.choice(word)]) + word[i:]))
        found.append(word)
    return found


# As they are; and small blocks, with all that is certain merged outside the matrix.
@pytest.mark.parametrize(("cells", "many_certain"), [(1 << 17, 8), (256, 1 << 30)])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_words_of_any_bytes_equal_the_reference(
    is_ordered: bool, cells: int, many_certain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_words, "FEW_MERGED", 0)
    monkeypatch.setattr(encode_words, "CELLS", cells)
    monkeypatch.setattr(encode_pairs, "MANY_CERTAIN", many_certain)
    by_characters = 0
    for seed in range(60):
        rng = random.Random(seed)
        merges = random_list(rng, rng.choice((0, 5, 20, 60)), is_ordered)
        encoder, vocab = encoder_of(merges)
        by_characters += bool((encoder._characters.ranks < len(merges)).any())
        words = random_words(rng, 80)
        lengths = np.array([len(word) for word in words])
        ids, counts = encoder.merge_words(b"".join(words), np.cumsum(lengths) - lengths, lengths)
        ends = np.cumsum(counts).tolist()
        for word, count, end in zip(words, counts.tolist(), ends, strict=True):
            expected = bpe_reference.encode_word(word, merges)
            assert [vocab[i] for i in ids[end - count : end]] == expected, (seed, word)
    # Where tokens are used before they are made, no character is taken to be certain.
    assert by_characters > 20 if is_ordered else by_characters < 20


def test_every_short_word_of_two_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs, of the pairs of a token with itself, the leftmost comes first."""
    monkeypatch.setattr(encode_words, "FEW_MERGED", 0)
    monkeypatch.setattr(encode_pairs, "MANY_CERTAIN", 1 << 30)
    words = [bytes(word) for n in range(1, 7) for word in itertools.product(b"ab", repeat=n)]
    lengths = np.array([len(word) for word in words])
    for seed in range(60):
        rng = random.Random(seed)
        tokens, merges = [b"a", b"b"], []
        for _ in range(rng.randrange(1, 8)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
        if seed % 2:
            rng.shuffle(merges)
        encoder, vocab = encoder_of(merges)
        ids, counts = encoder.merge_words(b"".join(words), np.cumsum(lengths) - lengths, lengths)
        expected = [bpe_reference.encode_word(word, merges) for word in words]
        assert [vocab[i] for i in ids] == list(itertools.chain.from_iterable(expected)), merges
        assert counts.tolist() == list(map(len, expected))


@pytest.mark.parametrize("many_certain", [8, 0])
def test_a_merge_of_a_token_that_no_merge_makes_never_happens(
    many_certain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its id: that after the last one made, which could be taken for "no token", or a greater one."""
    monkeypatch.setattr(encode_words, "FEW_MERGED", 0)
    monkeypatch.setattr(encode_pairs, "MANY_CERTAIN", many_certain)
    for unmade in ([b"xyz"], [b"x1", b"x2", b"xyz"]):
        tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"abxyz", *unmade]
        pairs = np.array([(97, 98, 256), (256, len(tokens) - 1, 257)], np.int32)
        definition = Definition(dict(enumerate(tokens)), pairs, {}, GPT2_PATTERN)
        encoder = WordEncoder(definition, TokenBytes(definition.vocab))
        assert encoder.merge_words(b"abcab", np.array([0, 3]), np.array([3, 2]))[0].tolist() == [256, 99, 256]


def test_characters_and_certain_pairs_come_first() -> None:
    """What the stages before the matrix leave of words is what they are there for."""
    e, hi = "é".encode(), "日".encode()
    encoder, vocab = encoder_of([(e[:1], e[1:]), (hi[:1], hi[1:2]), (hi[:2], hi[2:]), (b"a", b"b"), (e, hi)])
    text = np.frombuffer(e + hi + b"ab" + hi[:2], np.uint8)
    starts = np.array([0, 5, 7])
    units = encoder._table.units(text, starts, encoder._characters)
    assert [vocab[i] for i in units.tokens] == [e + hi, b"ab", hi[:2]]
    at, ends, tokens = encoder._table._whole_characters(text, np.isin(range(10), [0, 5, 7, 9]), encoder._characters)
    assert (at.tolist(), ends.tolist()) == ([0, 2], [2, 5])
    assert [vocab[i] for i in tokens] == [e, hi]
    # A merge across the boundary that comes before the character's own: of the space, and of its second half.
    for across in (b" ", hi[:1]), (hi[2:], b"a"):
        encoder, _ = encoder_of([across, (hi[:1], hi[1:2]), (hi[:2], hi[2:])])
        text = np.frombuffer(b" " + hi + b"a", np.uint8)
        assert not len(encoder._table._whole_characters(text, np.isin(range(6), [0, 5]), encoder._characters)[0])
    # Three bytes that would be a character of two, if they were UTF-8, are none.
    encoder, _ = encoder_of([(b"\xc4", b"\x80")])
    text = np.frombuffer(b"\xe0\x84\x80", np.uint8)
    assert len(encoder._table.units(text, np.array([0]), encoder._characters).tokens) == 3
