"""tiktoken's files of ranks."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np

from ..definition import Definition, define
from ..files import atomic
from ..pretokenize import Pattern


def export_tiktoken(definition: Definition, path: Path) -> None:
    """See Tokenizer.export_tiktoken."""
    special_ids = set(definition.special_tokens.values())
    ranks = {token: i for i, token in definition.vocab.items() if i not in special_ids}
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"vocab: the single byte {bytes([byte])!r} is missing, expected all 256")
    merges, whole = merges_of_ranks(ranks)
    for rank, (ours, theirs) in enumerate(zip_longest(definition.merges, merges)):
        if ours != theirs:
            raise ValueError(
                f"merges: merge {rank} is {ours!r}, but tiktoken, which goes by the ids of the results, has {theirs!r}"
            )
    if whole and not definition.ignore_merges:
        raise ValueError(
            f"vocab: no merges lead to {whole[0]!r}, which tiktoken takes for a word that is the whole token"
        )
    with atomic(path) as file:
        file.writelines(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def read_tiktoken(path: Path, special_tokens: Sequence[str] | Mapping[str, int], pattern: Pattern) -> Definition:
    """See Tokenizer.from_tiktoken."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one
            raise ValueError(f"path: line {number + 1} of {path} is {line!r}, expected base64 and a rank") from None
    vocab = {rank: token for token, rank in ranks.items()}
    if len(vocab) < len(ranks) or not ranks:
        raise ValueError(f"path: {path} gives one rank to two tokens, or has none")
    if not isinstance(special_tokens, Mapping):
        special_tokens = {token: max(vocab) + 1 + i for i, token in enumerate(special_tokens)}
    for special, i in special_tokens.items():
        if vocab.setdefault(i, special.encode()) != special.encode():
            raise ValueError(f"special_tokens: {special!r} has the id {i}, which is that of {vocab[i]!r}")
    merges, whole = merges_of_ranks(ranks)
    pairs = np.array([(ranks[left], ranks[right], ranks[left + right]) for left, right in merges], np.int32)
    return define(vocab, pairs.reshape(-1, 3), dict(special_tokens), pattern, ignore_merges=bool(whole))


def merges_of_ranks(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The merges list that encodes as `ranks` do, and the tokens that no merges lead to.

    tiktoken merges two neighbours whenever their bytes together are a token, the lowest rank first. The last merge that
    makes a token is the same wherever the token comes about: merges beside it do not touch its bytes, and those inside
    it are the ones that its bytes see alone. So one pair for each token, in the order of the ranks, says all; a token
    that does not come about from its own bytes never does, except that tiktoken looks a whole word up before it merges.
    """
    merges, whole = [], []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 1:
            pairs = [ranks.get(left + right) for left, right in pairwise(parts)]
            found = [rank for rank in pairs if rank is not None]
            if not found:
                break
            i = pairs.index(min(found))
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1:
            whole.append(token)
    return merges, whole
