"""Files: our own directory, GPT-2's vocab.json and merges.txt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .encode_file import write_atomically, write_json

if TYPE_CHECKING:
    from .bpe import Tokenizer

VOCAB, MERGES, CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
MERGES_FIRST_LINE = "#version: 0.2"


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


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """See Tokenizer.save."""
    directory.mkdir(parents=True, exist_ok=True)
    special_ids = set(tokenizer.special_tokens.values())
    vocab = {token.decode() if i in special_ids else printable(token): i for i, token in tokenizer.vocab.items()}
    if len(vocab) < len(tokenizer.vocab):
        raise ValueError("special_tokens: one is written in vocab.json as another token is")
    lines = [MERGES_FIRST_LINE, *(f"{printable(left)} {printable(right)}" for left, right in tokenizer.merges)]
    write_json(directory / VOCAB, vocab)
    write_atomically(directory / MERGES, ("\n".join(lines) + "\n").encode())
    write_json(
        directory / CONFIG,
        {
            "format": "rooflight-tokenizer",
            "version": 1,
            "vocab_size": tokenizer.vocab_size,
            "pattern": tokenizer.pattern,
            "special_tokens": tokenizer.special_tokens,
            "hash": tokenizer.hash,
        },
    )


def read_directory(directory: Path) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]], list[str], str, str]:
    """vocab, merges, special tokens, pattern and hash of a directory that save() wrote."""
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("format") != "rooflight-tokenizer" or config.get("version") != 1:
        raise ValueError(f"directory: {directory / CONFIG} is no tokenizer of version 1")
    specials = list(config["special_tokens"])
    vocab, merges = read_gpt2(directory / VOCAB, directory / MERGES, specials)
    return vocab, merges, specials, config["pattern"], config["hash"]


def read_gpt2(
    vocab_path: Path, merges_path: Path, special_tokens: Sequence[str]
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """vocab and merges of GPT-2's two files; entries of vocab.json that are special tokens are plain text."""
    written = read_json(vocab_path)
    if not isinstance(written, dict) or not all(type(i) is int for i in written.values()):
        raise ValueError(f"vocab_path: {vocab_path} holds no JSON object of tokens and ids")
    if len(set(written.values())) < len(written):
        raise ValueError(f"vocab_path: {vocab_path} gives one id to two tokens")
    specials = set(special_tokens)
    vocab = {i: token.encode() if token in specials else from_printable(token) for token, i in written.items()}
    merges = []
    for number, line in enumerate(_read_text(merges_path).split("\n")):
        if not line or (number == 0 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"merges_path: line {number + 1} of {merges_path} is {line!r}, expected two tokens")
        merges.append((from_printable(parts[0]), from_printable(parts[1])))
    return vocab, merges


def read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}") from None
