"""Text files that are to be read, and what is no text. A leaf: it imports nothing of this package."""

from __future__ import annotations

import os
import re
import stat
import warnings
from pathlib import Path
from typing import IO

# What a file begins with that is no UTF-8 text.
_NO_TEXT = {
    rb"\x1f\x8b": "compressed by gzip",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2",
    rb"\xfd7zXZ\0": "compressed by xz",
    rb"PK\x03\x04": "a zip archive",
    rb"PAR1": "a Parquet file",
    rb"ARROW1\0": "an Arrow file",
    rb"%PDF-": "a PDF",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32",
    rb"\xff\xfe|\xfe\xff": "UTF-16",
}
# Of so many replaced or NUL characters at least, and one in so many bytes, a text is reported.
_MANY, _ONE_IN = 100, 1000


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file of a known size, not a pipe or device. FileNotFoundError, and ValueError on a folder."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"path: {os.fspath(path)!r} is a folder, expected a text file")
    return stat.S_ISREG(mode)


def open_text(path: str | os.PathLike[str]) -> IO[bytes]:
    """The file, to be read from its beginning. Raises ValueError when it is plainly no UTF-8 text."""
    if Path(path).suffix.lower() in (".jsonl", ".ndjson"):
        raise ValueError(
            f"path: {os.fspath(path)!r} holds JSON lines, expected UTF-8 text; "
            "train_bpe_from_iterator and encode_many take texts from anywhere"
        )
    is_regular(path)
    file = open(path, "rb")  # noqa: SIM115
    try:
        head = file.peek(16)[:16]
        for signature, what in _NO_TEXT.items():
            if re.match(signature, head, re.DOTALL):
                raise ValueError(f"path: {os.fspath(path)!r} is {what}, expected UTF-8 text")
    except BaseException:
        file.close()
        raise
    return file


def count_odd(data: bytes) -> tuple[int, int]:
    """How many NUL and how many U+FFFD, which stand for invalid bytes, a text has."""
    return data.count(0), 0 if data.isascii() else data.count(b"\xef\xbf\xbd")


def warn_of_odd(n_nul: int, n_replaced: int, n_bytes: int) -> None:
    """Warns of a text with many NUL or U+FFFD: it is probably in another encoding than UTF-8."""
    if any(n >= _MANY and n * _ONE_IN >= n_bytes for n in (n_nul, n_replaced)):
        warnings.warn(
            f"the text's {n_bytes:,} bytes have {n_nul:,} NUL characters and {n_replaced:,} U+FFFD, "
            "mostly in place of bytes that are no UTF-8: is it in another encoding?",
            stacklevel=5,
        )
