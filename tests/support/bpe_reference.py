"""Slow, plain BPE: the oracle of the encoder's tests, and small vocabularies to encode with."""

from __future__ import annotations

import itertools
from collections import Counter

import regex

from rooflight.tokenizer import GPT2_PATTERN


def train(text: str, n_merges: int, pattern: str = GPT2_PATTERN) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """The `n_merges` most frequent pairs, one after another; ties go to the greater pair. Ids: bytes, then merges."""
    words = Counter(regex.findall(pattern, text))
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(split[word]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            split[word] = merge_all(split[word], best)
    vocab = {i: bytes([i]) for i in range(256)}
    vocab |= {256 + i: left + right for i, (left, right) in enumerate(merges)}
    return vocab, merges


def merge_all(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """`tokens` with every occurrence of `pair` merged, from the left."""
    merged: list[bytes] = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def encode_word(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """Merges of `word`: the listed pair of lowest rank, its leftmost occurrence, until none is listed."""
    rank = {pair: i for i, pair in enumerate(merges)}
    tokens = [word[i : i + 1] for i in range(len(word))]
    while True:
        ranks = [rank.get(pair, len(merges)) for pair in itertools.pairwise(tokens)]
        if not ranks or min(ranks) == len(merges):
            return tokens
        i = ranks.index(min(ranks))
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def encode(
    text: str,
    vocab: dict[int, bytes],
    merges: list[tuple[bytes, bytes]],
    specials: tuple[str, ...] = (),
    pattern: str = GPT2_PATTERN,
) -> list[int]:
    """Ids of `text`: split at the special tokens, longest first; then at the pattern; then the merges."""
    id_of = {token: i for i, token in vocab.items()}
    parts = [text]
    if specials:
        longest_first = "|".join(regex.escape(token) for token in sorted(specials, key=len, reverse=True))
        parts = regex.split(f"({longest_first})", text)
    ids: list[int] = []
    for part in parts:
        if part in specials:
            ids.append(id_of[part.encode()])
        else:
            for word in regex.findall(pattern, part):
                ids += [id_of[token] for token in encode_word(word.encode(), merges)]
    return ids
