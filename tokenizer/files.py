"""Files that appear whole or not at all, JSON, and token files. A leaf: it imports nothing of this package.

A token file is x.bin, the ids as little-endian uint16 or uint32 and nothing else, and x.bin.json, which says which
type, how many, of how much text, and the hash of the tokenizer that made them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT, VERSION = "rooflight-tokens", 1


def read_token_file(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids (read-only, not loaded) and the header. Raises ValueError when the two do not belong together."""
    header = read_json(header_path(path))
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"path: {header_path(path)} is no header of a token file of version {VERSION}")
    dtype = token_dtype(header["vocab_size"])
    if header["dtype"] != dtype.name or path.stat().st_size != header["n_tokens"] * dtype.itemsize:
        raise ValueError(f"path: {path} does not hold the {header['n_tokens']} {header['dtype']} ids of its header")
    if not header["n_tokens"]:
        return np.empty(0, dtype), header
    return np.memmap(path, dtype, mode="r"), header


def write_token_header(path: Path, vocab_size: int, tokenizer_hash: str, n_tokens: int, n_bytes: int) -> None:
    write_json(
        header_path(path),
        {
            "format": FORMAT,
            "version": VERSION,
            "dtype": token_dtype(vocab_size).name,
            "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash,
            "n_tokens": n_tokens,
            "n_bytes": n_bytes,
        },
    )


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def header_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


@contextmanager
def atomic(path: Path, replaces_first: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `path` when the block ends without an exception, and vanishes otherwise.

    replaces_first: a file about `path` as it was before, removed just before.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if replaces_first is not None:
            replaces_first.unlink(missing_ok=True)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as out:
        out.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError when there is no such file, ValueError when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is no JSON: {error}") from None
