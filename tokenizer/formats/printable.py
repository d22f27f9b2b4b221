"""Vocabularies and merges as GPT-2's files write them: printable stand-ins for bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from operator import add, itemgetter
from typing import Any

import numpy as np

from ..definition import Definition

# Merges read at a time.
_MERGES = 1 << 13


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


def _all_from_printable(texts: list[str]) -> list[bytes]:
    """The inverse of printable() of each. Raises ValueError on a character that stands for no byte."""
    bytes_of = np.full(1 << 9, 1 << 8, np.uint16)
    bytes_of[[ord(character) for character in byte_to_unicode()]] = np.arange(256)
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    found = bytes_of.take(np.minimum(characters, len(bytes_of) - 1))
    ends = list(accumulate(map(len, texts)))
    if (wrong := np.flatnonzero(found > 0xFF)).size:
        text = texts[bisect_right(ends, wrong[0])]
        raise ValueError(f"token {text!r}: {chr(characters[wrong[0]])!r} is none of GPT-2's 256 stand-ins for bytes")
    data = found.astype(np.uint8).tobytes()
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


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
    ordinary = [token for token in written if token not in plain]
    # Ints made anew: those of the file stand between its strings, whose memory then could not be let go.
    ids = [i + 0 for i in map(written.__getitem__, ordinary)]
    vocab = dict(zip(ids, _all_from_printable(ordinary), strict=True))
    vocab |= {written[token]: token.encode() for token in plain}
    if len(vocab) < len(written):
        raise ValueError(f"{where} gives one id to two tokens")
    return vocab


def check_vocab(written: Any, where: str) -> None:
    """Raise ValueError where that is no content of a vocab.json."""
    if not isinstance(written, dict) or {*map(type, written.values())} - {int}:
        raise ValueError(f"{where} holds no JSON object of tokens and ids")


def parse_merges(written: Sequence[str] | Sequence[list[str]], id_of: Mapping[str, int], where: str) -> np.ndarray:
    """merges.txt's lines, or pairs, as Definition.pairs has them. id_of: vocab.json's content."""
    # Some thousands at a time: no list for each line, and no text for all.
    parts = [_parse_some(written, i, id_of, where) for i in range(0, max(len(written), 1), _MERGES)]
    return np.concatenate(parts)


def _parse_some(
    written: Sequence[str] | Sequence[list[str]], first: int, id_of: Mapping[str, int], where: str
) -> np.ndarray:
    some = written[first : first + _MERGES]
    lines = [line if isinstance(line, str) else " ".join(line) for line in some if line]
    text = "\n".join(lines)
    ends = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    ends = ends[(ends == ord(" ")) | (ends == ord("\n"))]
    if len(ends) != max(2 * len(lines) - 1, 0) or (ends[::2] != ord(" ")).any():
        number = next(i for i, line in enumerate(lines) if line.count(" ") != 1)
        raise ValueError(f"{where}: merge {first + number} is {lines[number]!r}, expected two tokens")
    tokens = text.replace("\n", " ").split(" ") if text else []
    columns = tokens[::2], tokens[1::2], list(map(add, tokens[::2], tokens[1::2]))
    try:
        ids = [np.fromiter(map(id_of.__getitem__, column), np.int32, len(lines)) for column in columns]
    except KeyError as error:
        number = next(i for i, merge in enumerate(zip(*columns, strict=True)) if error.args[0] in merge)
        raise ValueError(f"{where}: {error.args[0]!r} of merge {first + number} is not in the vocabulary") from None
    return np.stack(ids, axis=1)
