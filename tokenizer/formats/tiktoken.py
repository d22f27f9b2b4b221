"""tiktoken's files of ranks."""

from __future__ import annotations

from base64 import b64encode
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np

from ..definition import Definition, define
from ..encoding.pairs import PairTable
from ..files import atomic
from ..pretokenize import Pattern
from ..sizes import CELLS, LONGEST
from ..tokens import TokenBytes

# Longer tokens, of a length that few have, take less time one by one.
_LONG, _FEW = 24, 12
_NO_RANK = 1 << 62


def export_tiktoken(definition: Definition, path: Path) -> None:
    """See Tokenizer.export_tiktoken."""
    ranks = definition.ordinary
    pairs, whole = pairs_of_ranks(ranks, definition.tokens)
    if not np.array_equal(definition.pairs, pairs):
        merges = zip_longest(definition.merges, replace(definition, pairs=pairs).merges)
        rank, ours, theirs = next((i, a, b) for i, (a, b) in enumerate(merges) if a != b)
        raise ValueError(
            f"merges: merge {rank} is {ours!r}, but tiktoken, which goes by the ids of the results, has {theirs!r}"
        )
    if whole and not definition.ignore_merges:
        raise ValueError(
            f"vocab: no merges lead to {whole[0]!r}, which tiktoken takes for a word that is the whole token"
        )
    with atomic(path) as file:
        file.writelines(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def read_tiktoken(
    path: Path, special_tokens: Sequence[str] | Mapping[str, int], pattern: Pattern
) -> tuple[Definition, bool | None]:
    """See Tokenizer.from_tiktoken. The definition, and Tokenizer.is_by_rank, if known."""
    data = path.read_bytes()
    ranks = _ranks(data)
    if ranks is None:
        ranks = {}
        for number, line in enumerate(data.splitlines()):
            try:
                token, rank = line.split()
                ranks[a2b_base64(token, strict_mode=True)] = int(rank)
            except ValueError:  # binascii.Error is one
                raise ValueError(f"path: line {number + 1} of {path} is {line!r}, expected base64 and a rank") from None
    del data
    vocab = dict(zip(ranks.values(), ranks, strict=True))
    if len(vocab) < len(ranks) or not ranks:
        raise ValueError(f"path: {path} gives one rank to two tokens, or has none")
    if not isinstance(special_tokens, Mapping):
        special_tokens = {token: max(vocab) + 1 + i for i, token in enumerate(special_tokens)}
    for special, i in special_tokens.items():
        if vocab.setdefault(i, special.encode()) != special.encode():
            raise ValueError(f"special_tokens: {special!r} has the id {i}, which is that of {vocab[i]!r}")
    _check_bytes(ranks)
    ordinary = None if any(special.encode() in ranks for special in special_tokens) else ranks
    definition = define(vocab, (), dict(special_tokens), pattern, ignore_merges=False, ordinary=ordinary)
    definition.pairs, whole = pairs_of_ranks(ranks, definition.tokens)
    definition.ignore_merges = bool(whole)
    # Ranks say what they say, unless a special token has one.
    return definition, True if len(vocab) == len(ranks) + len(special_tokens) else None


def _ranks(data: bytes) -> dict[bytes, int] | None:
    """A file's ranks, if it is written as tiktoken writes them: no byte but what must be, and no fault."""
    characters = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(characters <= ord(" "))
    of_token, of_rank = ends[::2], ends[1::2]
    fields = data.split()
    if (
        len(fields) != len(ends)
        or data[-1:] != b"\n"
        or len(of_token) != len(of_rank)
        or (characters[of_token] != ord(" ")).any()
        or (characters[of_rank] != ord("\n")).any()
    ):
        return None
    try:
        tokens = list(map(a2b_base64, fields[::2]))
        ranks = dict(zip(tokens, map(int, fields[1::2]), strict=True))
    except ValueError:
        return None
    # Of characters that are none of base64's, or behind its end, nothing is made.
    written = of_token - np.append(-1, of_rank[:-1]) - 1
    one, two = (characters.take(of_token - i, mode="wrap") == ord("=") for i in (1, 2))
    made = np.fromiter(map(len, tokens), np.int64, len(tokens)) + one + (one & two)
    return ranks if (4 * made == 3 * written).all() else None


def _check_bytes(ranks: Mapping[bytes, int]) -> None:
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"vocab: the single byte {bytes([byte])!r} is missing, expected all 256")


def pairs_of_ranks(ranks: Mapping[bytes, int], tokens: TokenBytes | None = None) -> tuple[np.ndarray, list[bytes]]:
    """The merges that encode as `ranks` do, as Definition.pairs has them, and the tokens that no merges lead to.

    tiktoken merges two neighbours whenever their bytes together are a token, the lowest rank first. The last merge that
    makes a token is the same wherever the token comes about: merges beside it do not touch its bytes, and those inside
    it are the ones that its bytes see alone. So one pair for each token, in the order of the ranks, says all; a token
    that does not come about from its own bytes never does, except that tiktoken looks a whole word up before it merges.

    A token's pair follows from those of shorter tokens: they are found length by length, for all tokens at once.
    tokens: of a vocabulary that holds the ranks.  Raises ValueError when a byte is missing.
    """
    _check_bytes(ranks)
    tokens = tokens or TokenBytes(dict(zip(ranks.values(), ranks, strict=True)))
    ids = np.sort(np.fromiter(ranks.values(), np.int64, len(ranks)))
    merged = ids[tokens.sizes.take(ids) > 1]
    sizes = tokens.sizes.take(merged)
    table = PairTable([ranks[bytes([byte])] for byte in range(256)], merged, tokens)
    pairs = np.full((len(merged), 3), -1, np.int32)
    pairs[:, 2] = merged
    by_length = np.argsort(sizes, kind="stable")
    of_length = np.split(by_length, np.flatnonzero(np.diff(sizes.take(by_length))) + 1)
    for indices in of_length:
        length = int(sizes[indices[0]]) if len(indices) else 0
        for group in np.array_split(indices, -(-len(indices) * length // CELLS)) if length else ():
            text = tokens.matrix(merged.take(group), length)
            if length > LONGEST or (length > _LONG and len(group) < _FEW):
                pairs[group, :2] = [_last_pair(word.tobytes(), ranks) for word in text.T]
                continue
            units = table.units(text.T.ravel(), length * np.arange(len(group)))
            ids, counts, _ = table.merge(units, np.arange(len(group)))
            two = counts == 2
            at = (np.cumsum(counts) - counts)[two]
            pairs[group[two], 0], pairs[group[two], 1] = ids[at], ids[at + 1]
        done = indices[pairs[indices, 0] >= 0]
        table.add(done, pairs[done, 0], pairs[done, 1])
    found = pairs[:, 0] >= 0
    return pairs[found], [tokens.join([i]) for i in merged[~found].tolist()]


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[int, int]:
    """The ids that the last merge which makes the token is of; (-1, -1) if none does."""
    parts = [token[i : i + 1] for i in range(len(token))]
    ranked = [ranks.get(left + right, _NO_RANK) for left, right in pairwise(parts)]
    while len(parts) > 2:
        if (lowest := min(ranked)) == _NO_RANK:
            return -1, -1
        i = ranked.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del ranked[i]
        for j in range(max(i - 1, 0), min(i + 1, len(ranked))):
            ranked[j] = ranks.get(parts[j] + parts[j + 1], _NO_RANK)
    return ranks[parts[0]], ranks[parts[1]]
