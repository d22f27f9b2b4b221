"""Text of any length, cut into pieces that can be encoded apart, and whole files encoded into token files.

A piece may end before white space that follows a character that is none: GPT-2's pattern always starts a pre-token
there, whatever stands on either side. Other patterns promise nothing, so their pieces end at special tokens only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .pretokenize import Specials, is_vectorised

if TYPE_CHECKING:
    from .bpe import Tokenizer

# Bytes of text encoded at a time.
PIECE = 1 << 20


def cut_stream(blocks: Iterable[bytes], specials: Specials, pattern: str, piece: int = PIECE) -> Iterator[bytes]:
    """Pieces of b"".join(blocks), at least `piece` bytes long where the text allows, that encode apart as together."""
    held: list[bytes] = []
    size, wanted = 0, piece
    for block in blocks:
        held.append(block)
        size += len(block)
        if size < wanted:
            continue
        data = b"".join(held)
        cut = last_cut(data, specials, pattern)
        if cut:
            yield data[:cut]
            data, wanted = data[cut:], piece
        else:
            wanted = 2 * size  # so that text without a place to cut is not searched again for every block
        held, size = [data], len(data)
    data = b"".join(held)
    if data:
        yield data


def last_cut(data: bytes, specials: Specials, pattern: str) -> int:
    """The last offset at which `data`, which more text may follow, can be cut; 0 when there is none."""
    # A special token that the end of `data` cuts in two starts after this.
    end = len(data) - specials.max_length
    if not is_vectorised(pattern):
        occurrences = sorted(specials.spans(data))
        best = reach = 0
        for start, stop in occurrences:
            if reach <= start <= end:
                best = start
            reach = max(reach, stop)
        return best
    window = 1 << 12
    while end > 1:
        low = max(0, end - window)
        text = np.frombuffer(data[low:end], np.uint8)
        blank = (text == 0x20) | (text == 0x0A) | (text == 0x0D) | (text == 0x09)
        solid = (text > 0x20) & (text < 0x7F)
        for cut in (np.flatnonzero(solid[:-1] & blank[1:]) + low + 1)[::-1].tolist():
            near = data[max(0, cut - specials.max_length) : cut + specials.max_length]
            at = min(cut, specials.max_length)
            if not any(start < at < stop for start, stop in specials.spans(near)):
                return cut
        if low == 0:
            break
        window *= 16
    return 0


def encode_file(tokenizer: Tokenizer, path: Path, out_path: Path, *, num_workers: int | None = None) -> int:
    """See Tokenizer.encode_file."""
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is no file, expected text to encode")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    n_tokens = 0
    temporary = out_path.with_name(f"{out_path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            for data in cut_stream(_blocks(path), tokenizer._specials, tokenizer.pattern):
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
