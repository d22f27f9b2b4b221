"""Vocabularies and merges as GPT-2's files write them: printable stand-ins for bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from operator import itemgetter
from typing import Any

import numpy as np

from ..definition import Definition
from .large_json import WrittenVocab
from .lookup import find_merges

# Characters read at a time.
_CHARACTERS = 1 << 16
# What characters are that stand for no byte.
_NONE, _SPACE, _NEWLINE = 0x100, 0x101, 0x102

Merges = str | Sequence[str] | Sequence[list[str]]  # merges.txt's lines, in one text or several, or pairs of tokens


@cache
def byte_to_unicode() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next character from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


def printable(token: bytes) -> str:
    """`token` with GPT-2's stand-ins, as vocab.json and merges.txt have it."""
    table = byte_to_unicode()
    return "".join([table[byte] for byte in token])


@cache
def _byte_of() -> np.ndarray:
    """By a character's number, its byte; above 0xFF where it stands for none, as the last does for all that follow."""
    bytes_of = np.full(1 << 9, _NONE, np.uint16)
    bytes_of[[ord(character) for character in byte_to_unicode()]] = np.arange(256)
    bytes_of[[ord(" "), ord("\n")]] = _SPACE, _NEWLINE
    return bytes_of


def _bytes_of(text: str) -> np.ndarray:
    """(characters,) uint16: the byte that each stands for; _SPACE, _NEWLINE, or _NONE."""
    if text.isascii():  # then a character is a byte
        return _byte_of().take(np.frombuffer(text.encode(), np.uint8))
    parts = (text[i : i + _CHARACTERS].encode("utf-32-le", "surrogatepass") for i in range(0, len(text), _CHARACTERS))
    return np.concatenate([_byte_of().take(np.frombuffer(part, "<u4"), mode="clip") for part in parts])


def printable_vocab(definition: Definition, *, leave_out: bool = False) -> dict[str, int]:
    """Tokens as vocab.json has them; special ones are plain text.

    One may then be written as another token is: left out, or a ValueError.
    """
    special_ids = set(definition.special_tokens.values())
    vocab = {printable(token): i for i, token in definition.vocab.items() if i not in special_ids}
    for text, i in definition.special_tokens.items():
        if vocab.setdefault(text, i) != i and not leave_out:
            raise ValueError(f"special_tokens: {text!r} is written as another token is by GPT-2's stand-ins for bytes")
    return dict(sorted(vocab.items(), key=itemgetter(1)))


def printable_merges(definition: Definition) -> list[str]:
    return [f"{printable(left)} {printable(right)}" for left, right in definition.merges]


def parse_vocab(written: Any, specials: Mapping[str, int | None], where: str) -> dict[int, bytes]:
    """vocab.json's content. specials: tokens that are plain text, where they have the id given (None: any)."""
    check_vocab(written, where)
    plain = {token for token in specials if token in written and specials[token] in (None, written[token])}
    if isinstance(written, WrittenVocab):
        characters = _bytes_of(written.names)
        ends = np.flatnonzero(characters == _NEWLINE)
        sizes, ids = np.diff(ends) - 1, written.ids
        characters = characters[characters != _NEWLINE]
    else:
        # Ints made anew: those of the file stand between its strings, whose memory then could not be let go.
        sizes, ids = np.fromiter(map(len, written), np.int64, len(written)), [i + 0 for i in written.values()]
        characters = _bytes_of("".join(written))
    starts = np.cumsum(sizes) - sizes
    plain_ids = {written[token] for token in plain}
    for at in [at for at, i in enumerate(ids) if i in plain_ids] if plain else ():
        characters[starts[at] : starts[at] + sizes[at]] = 0
    if (wrong := np.flatnonzero(characters > 0xFF)).size:
        token = list(written)[np.searchsorted(starts, wrong[0], side="right") - 1]
        character = next(character for character in token if character not in byte_to_unicode())
        raise ValueError(f"token {token!r}: {character!r} is none of GPT-2's 256 stand-ins for bytes")
    vocab = dict(zip(ids, map(BytesIO(characters.astype(np.uint8).tobytes()).read, sizes.tolist()), strict=True))
    vocab |= {written[token]: token.encode() for token in plain}
    if len(vocab) < len(written):
        raise ValueError(f"{where} gives one id to two tokens")
    return vocab


def check_vocab(written: Any, where: str) -> None:
    """Raise ValueError where that is no content of a vocab.json."""
    if isinstance(written, WrittenVocab):
        return  # JSON numbers of digits alone
    if not isinstance(written, dict) or {*map(type, written.values())} - {int}:
        raise ValueError(f"{where} holds no JSON object of tokens and ids")


def parse_merges(written: Merges, id_of: Mapping[str, int], definition: Definition, where: str) -> np.ndarray:
    """Merges as Definition.pairs has them. id_of: vocab.json's content.  definition: with these ids."""
    try:
        lines = [] if isinstance(written, str) else [_line(merge) for merge in written if merge]
    except TypeError:
        raise ValueError(f"{where} has a merge that is no string, nor a list of strings") from None
    pairs = _find(written.rstrip("\n") if isinstance(written, str) else "\n".join(lines), definition)
    if pairs is not None and len(pairs) == (len(lines) or len(pairs)):
        return pairs
    # Something is unusual, or wrong.
    if isinstance(written, str):
        lines = [line for line in written.split("\n") if line]
    parts = [line.split(" ") for line in lines]
    for number, part in enumerate(parts):
        if len(part) != 2:
            raise ValueError(f"{where}: merge {number} is {lines[number]!r}, expected two tokens")
    merges = [(left, right, left + right) for left, right in parts]
    for token in (token for column in zip(*merges, strict=True) for token in column):
        if token not in id_of:
            number = next(i for i, merge in enumerate(merges) if token in merge)
            raise ValueError(f"{where}: {token!r} of merge {number} is not in the vocabulary")
    return np.array([[id_of[token] for token in merge] for merge in merges], np.int32).reshape(-1, 3)


def _line(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _find(text: str, definition: Definition) -> np.ndarray | None:
    """The merges of lines of two tokens of GPT-2's stand-ins each; None where that is not all there is."""
    found = _bytes_of(text)
    ends = np.flatnonzero(found > 0xFF)
    if not len(ends) % 2 or (found[ends[::2]] != _SPACE).any() or (found[ends[1::2]] != _NEWLINE).any():
        return None
    ends = np.append(ends, len(found)) - np.arange(len(ends) + 1)
    data = found[found <= 0xFF].astype(np.uint8)
    return find_merges(definition, data, ends)
