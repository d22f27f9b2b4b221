"""What defines a tokenizer: all that decides which ids a text gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from operator import lt
from typing import NamedTuple

import numpy as np

from .pretokenize import Pattern, Specials, resolve
from .tokens import TokenBytes


class Options(NamedTuple):
    """What is done to a text before it is cut into pre-tokens.

    nfc: it is brought to Unicode's normal form C.  prefix_space: a text that does not begin with a space, after a
    special token too, gets one.  flags: of special tokens, "lstrip" and "rstrip", which take the white space before
    and after, "single_word", which are none beside a letter, digit or underscore, and "normalized", which are found
    when the others are, in the normal form.
    """

    nfc: bool = False
    prefix_space: bool = False
    flags: dict[str, list[str]] = {}  # noqa: RUF012  # never changed


PLAIN = Options()


@dataclass(eq=False)
class Definition:
    """vocab: id to bytes, special tokens among them, in the order of the ids.
    pairs: (n, 3) int32, left, right and merged id of every merge, the first one merged first.
    special_tokens: text to id.  pattern, ignore_merges: see Tokenizer.  options: what some tokenizer.json add.
    """

    vocab: dict[int, bytes]
    pairs: np.ndarray
    special_tokens: dict[str, int]
    pattern: Pattern
    ignore_merges: bool = False
    options: Options = PLAIN

    def __reduce__(self) -> tuple:
        return Definition, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def tokens(self) -> TokenBytes:
        return TokenBytes(self.vocab)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens.sizes)

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        left, right, _ = (map(self.vocab.__getitem__, column.tolist()) for column in self.pairs.T)
        return list(zip(left, right, strict=True))

    @property
    def hash(self) -> str:
        """sha256 (hex) of pattern, ids and tokens, merges, special tokens and ignore_merges, as JSON."""
        written = {i: f'"{token.hex()}"' for i, token in self.vocab.items()}
        left, right, _ = (map(written.__getitem__, column.tolist()) for column in self.pairs.T)
        vocab = ", ".join([f"[{i}, {token}]" for i, token in written.items()])
        merges = ", ".join([f"[{a}, {b}]" for a, b in zip(left, right, strict=True)])
        rest: tuple[str, ...] = json.dumps(sorted(self.special_tokens.items())), json.dumps(self.ignore_merges)
        if self.options != PLAIN:
            rest = (*rest, json.dumps(self.options._asdict(), sort_keys=True))
        content = f"[{json.dumps(self.pattern)}, [{vocab}], [{merges}], {', '.join(rest)}]"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def byte_ids(self) -> list[int]:
        special_ids = set(self.special_tokens.values())
        # One that a tokenizer.json lacks gets an id that no token has.
        ids = [self.vocab_size] * 256
        # An ordinary token's, but a special token may be the only one of its byte.
        for i in sorted(np.flatnonzero(self.tokens.sizes == 1).tolist(), key=lambda i: i not in special_ids):
            ids[self.vocab[i][0]] = i
        return ids

    @cached_property
    def ordinary(self) -> dict[bytes, int]:
        """The tokens that are not special, with their ids. Large: forget() lets it go."""
        ordinary = dict(zip(self.vocab.values(), self.vocab, strict=True))
        special_ids = set(self.special_tokens.values())
        if len(ordinary) < len(self.vocab):  # a special token and another have the same bytes
            return {token: i for i, token in self.vocab.items() if i not in special_ids}
        for i in special_ids:
            del ordinary[self.vocab[i]]
        return ordinary

    def forget(self) -> None:
        self.__dict__.pop("ordinary", None)


def define(
    vocab: Mapping[int, bytes],
    merges: Iterable[tuple[bytes, bytes]] | Callable[[Definition], np.ndarray],
    special_tokens: Sequence[str] | Mapping[str, int],
    pattern: Pattern,
    ignore_merges: bool,
    options: Options = PLAIN,
    *,
    all_bytes: bool = True,
    ordinary: dict[bytes, int] | None = None,
) -> Definition:
    """A definition, all of it checked. Raises ValueError.

    merges: pairs of tokens; or what makes Definition.pairs when the vocabulary is found to be right.
    all_bytes: each byte must be a token.  ordinary: Definition.ordinary, if it is there already.
    """
    pattern = resolve(pattern)
    vocab = dict(vocab)
    specials = _special_ids(special_tokens, vocab)
    if not all(map(lt, vocab, islice(vocab, 1, None))):
        vocab = dict(sorted(vocab.items()))
    special_ids = set(specials.values())
    id_of = _check_vocab(vocab, special_ids, all_bytes, ordinary)
    _check_holes(vocab, special_ids)
    definition = Definition(vocab, np.empty((0, 3), np.int32), specials, pattern, ignore_merges, options)
    definition.pairs = merges(definition) if callable(merges) else _pairs(list(merges), id_of)
    keys = np.sort(definition.pairs[:, 0].astype(np.int64) << 32 | definition.pairs[:, 1])
    if (keys[1:] == keys[:-1]).any():
        raise ValueError("merges: a pair is listed more than once")
    if ordinary is None and len(id_of) == len(vocab):  # then it is but for the special tokens: it takes long to make
        ordinary = id_of
        for i in special_ids:
            del ordinary[vocab[i]]
    if ordinary is not None:
        definition.__dict__["ordinary"] = ordinary
    return definition


def _special_ids(special_tokens: Sequence[str] | Mapping[str, int], vocab: dict[int, bytes]) -> dict[str, int]:
    """The special tokens with their ids; adds those to `vocab` that it lacks."""
    specials = Specials(special_tokens)
    wanted = {*specials.encoded}
    known = {}
    if not isinstance(special_tokens, Mapping) and wanted:
        known = {token: i for i, token in reversed(vocab.items()) if type(token) is bytes and token in wanted}
    ids = {}
    for text, token in zip(specials.tokens, specials.encoded, strict=True):
        if isinstance(special_tokens, Mapping):
            i = special_tokens[text]
            if vocab.get(i, token) != token:
                raise ValueError(f"special_tokens: {text!r} has the id {i}, which is that of {vocab[i]!r}")
        else:
            i = known[token] if token in known else max(vocab, default=-1) + 1
        ids[text] = i
        vocab[i] = token
    return ids


def _check_vocab(
    vocab: dict[int, bytes], special_ids: set[int], all_bytes: bool, ordinary: dict[bytes, int] | None
) -> dict[bytes, int]:
    """The id of each token, of an ordinary one where a special one has the same bytes."""
    if not vocab:
        raise ValueError("vocab: got none, expected tokens")
    types = {*map(type, vocab)}, {*map(type, vocab.values())}
    if types != ({int}, {bytes}) or min(vocab) < 0 or not all(vocab.values()):
        for i, token in vocab.items():
            if type(i) is not int or i < 0 or type(token) is not bytes or not token:
                raise ValueError(f"vocab: {i!r}: {token!r}, expected an id >= 0 and non-empty bytes")
    if (largest := next(reversed(vocab))) >= np.iinfo(np.int32).max:
        raise ValueError(f"vocab: the id {largest} of {vocab[largest]!r}, expected one below 2^31 - 1")
    id_of = dict(zip(vocab.values(), vocab, strict=True)) if ordinary is None else ordinary
    if ordinary is None and len(id_of) < len(vocab):
        others = {i: token for i, token in vocab.items() if i not in special_ids}
        id_of |= {token: i for i, token in others.items()}
        if twice := [(i, token) for i, token in others.items() if id_of[token] != i]:
            i, token = twice[0]
            raise ValueError(f"vocab: ids {i} and {id_of[token]} are both {token!r}")
    for byte in range(256):
        if all_bytes and bytes([byte]) not in id_of:
            raise ValueError(f"vocab: the single byte {bytes([byte])!r} is missing, expected all 256")
    return id_of


def _check_holes(vocab: dict[int, bytes], special_ids: set[int]) -> None:
    # tiktoken's own encodings leave gaps among the special tokens at the top; those are harmless.
    largest = next((i for i in reversed(vocab) if i not in special_ids), -1)
    if len(vocab) - sum(i > largest for i in special_ids) <= largest:
        expected = next(expected for expected, i in enumerate(vocab) if i != expected)
        raise ValueError(f"vocab: id {expected} is missing, expected no holes below the largest id")


def _pairs(merges: Sequence[tuple[bytes, bytes]], id_of: Mapping[bytes, int]) -> np.ndarray:
    try:
        pairs = [(id_of[left], id_of[right], id_of[left + right]) for left, right in merges]
    except KeyError as error:
        token = error.args[0]
        rank, merge = next((i, pair) for i, pair in enumerate(merges) if token in (*pair, pair[0] + pair[1]))
        raise ValueError(f"merges: {token!r} of merge {rank}, {merge!r}, is not in the vocabulary") from None
    return np.array(pairs, np.int32).reshape(-1, 3)
