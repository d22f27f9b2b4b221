"""Vocabularies and merges as GPT-2's files write them: printable stand-ins for bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from ..definition import Definition


@cache
def byte_to_unicode() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next character from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


@cache
def _unicode_to_byte() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_to_unicode())}


def printable(token: bytes) -> str:
    """`token` with GPT-2's stand-ins, as vocab.json and merges.txt have it."""
    table = byte_to_unicode()
    return "".join([table[byte] for byte in token])


def from_printable(text: str) -> bytes:
    """The inverse of printable(). Raises ValueError on a character that stands for no byte."""
    table = _unicode_to_byte()
    try:
        return bytes([table[character] for character in text])
    except KeyError as error:
        raise ValueError(f"token {text!r}: {error.args[0]!r} is none of GPT-2's 256 stand-ins for bytes") from None


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
    if not isinstance(written, dict) or not all(type(i) is int for i in written.values()):
        raise ValueError(f"{where} holds no JSON object of tokens and ids")
    if len(set(written.values())) < len(written):
        raise ValueError(f"{where} gives one id to two tokens")
    plain = {token for token in specials if token in written and specials[token] in (None, written[token])}
    return {i: token.encode() if token in plain else from_printable(token) for token, i in written.items()}


def parse_merges(written: Sequence[str | list[str]], where: str) -> list[tuple[bytes, bytes]]:
    merges = []
    for number, line in enumerate(written):
        parts = line.split(" ") if isinstance(line, str) else line
        if parts == [""]:
            continue
        if len(parts) != 2:
            raise ValueError(f"{where}: merge {number} is {line!r}, expected two tokens")
        merges.append((from_printable(parts[0]), from_printable(parts[1])))
    return merges
