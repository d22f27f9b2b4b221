"""Token files.

A token file is `x.bin`, the ids as raw little-endian uint16 or uint32, beside `x.bin.json`, its header:

    {"format": "rooflight-tokens", "version": 1, "dtype": "uint16", "vocab_size": 1024, "tokenizer_hash": "<sha256
    hex>",
     "n_tokens": 1923441, "n_bytes": 5003178, "eod": 0}

n_bytes is the length of the text that the tokens stand for, which turns a loss in nats per token into bits per byte.
eod, which a header may lack, is the id of the token that ends each document. The file is mapped, never read whole.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...model.typed import typed

FORMAT = "rooflight-tokens"
VERSION = 1


@dataclass(frozen=True)
class TokenFile:
    """A mapped token file: `tokens` (n_tokens,), uint16 or uint32, read-only, and the fields of its header."""

    path: Path
    tokens: npt.NDArray[np.unsignedinteger]
    vocab_size: int
    tokenizer_hash: str
    n_bytes: int
    eod: int | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def bits_per_byte(self, loss: float) -> float:
        """Loss in nats per token as bits per byte of text, at this file's mean number of bytes per token."""
        return bits_per_byte(loss, self.n_tokens, self.n_bytes)


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    return loss / math.log(2) * n_tokens / n_bytes


@typed
def open_tokens(path: str | Path, *, vocab_size: int | None = None) -> TokenFile:
    """Map a token file.

    vocab_size: the model's; the file's must not exceed it (a model may pad its vocabulary).
    Raises FileNotFoundError when the file or its header is missing, ValueError when the header is not one, contradicts
    the file's size, or names ids that the model does not have.
    """
    path = Path(path)
    header_path = path.with_name(path.name + ".json")
    for needed, what in ((path, "token file"), (header_path, "header of the token file")):
        if not needed.is_file():
            raise FileNotFoundError(
                f"no {what} at {needed}; `rooflight tokenizer encode` writes both x.bin and x.bin.json"
            )
    header = _read_header(header_path)
    dtype = np.dtype(header["dtype"]).newbyteorder("<")
    size, expected = path.stat().st_size, header["n_tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but its header promises {header['n_tokens']} tokens of {header['dtype']}, "
            f"{expected} bytes: encode the text again"
        )
    if vocab_size is not None and header["vocab_size"] > vocab_size:
        raise ValueError(
            f"{path} was encoded with a vocabulary of {header['vocab_size']} tokens, "
            f"more than the model's vocab_size of {vocab_size}"
        )
    return TokenFile(
        path=path,
        tokens=np.memmap(path, dtype=dtype, mode="r"),
        vocab_size=header["vocab_size"],
        tokenizer_hash=header["tokenizer_hash"],
        n_bytes=header["n_bytes"],
        eod=header.get("eod"),
    )


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a token file's header: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{path} is not a token file\'s header: expected "format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')!r}, expected {VERSION}")
    if header.get("dtype") not in ("uint16", "uint32"):
        raise ValueError(f'{path} has dtype {header.get("dtype")!r}, expected "uint16" or "uint32"')
    if not isinstance(header.get("tokenizer_hash"), str):
        raise ValueError(f"{path} has no tokenizer_hash, expected a string")
    for name in ("vocab_size", "n_tokens", "n_bytes"):
        value = header.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path} has {name} {value!r}, expected a positive integer")
    eod = header.get("eod")
    if eod is not None and (not isinstance(eod, int) or isinstance(eod, bool) or not 0 <= eod < header["vocab_size"]):
        raise ValueError(f"{path} has eod {eod!r}, expected an id below its vocab_size {header['vocab_size']}")
    return header
