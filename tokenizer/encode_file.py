"""Text of any length, cut into pieces that can be encoded apart, and whole files encoded into token files.

A piece may end before white space that follows a character that is none: GPT-2's pattern always starts a pre-token
there, whatever stands on either side. Other patterns promise nothing, so their pieces end at special tokens only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .encode import PIECE, cut_stream

if TYPE_CHECKING:
    from .bpe import Tokenizer


def encode_file(tokenizer: Tokenizer, path: Path, out_path: Path, *, num_workers: int | None = None) -> int:
    """See Tokenizer.encode_file."""
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is no file, expected text to encode")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    n_tokens = 0
    temporary = out_path.with_name(f"{out_path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            for data in cut_stream(_blocks(path), tokenizer._all.cutter):
                ids = tokenizer.encode_bytes(data)
                n_tokens += len(ids)
                out.write(ids.astype(dtype).tobytes())
            out.flush()
            os.fsync(out.fileno())
        header = header_path(out_path)
        # A token file without a header is refused by readers; one with the header of another would not be.
        header.unlink(missing_ok=True)
        temporary.replace(out_path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    write_json(
        header,
        {
            "format": "rooflight-tokens",
            "version": 1,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "n_tokens": n_tokens,
            "n_bytes": path.stat().st_size,
        },
    )
    return n_tokens


def header_path(out_path: Path) -> Path:
    return out_path.with_name(out_path.name + ".json")


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(PIECE):
            yield block
