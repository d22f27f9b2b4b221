"""Text files that are to be read, compressed ones too, and what is no text. A leaf: it imports nothing of this package.

open_text(path)       a file to read, decompressed where it begins as gzip or zstd does
is_cuttable(path)     whether parts of it can be read by themselves
kind_of(path)         "text", "lines" (JSON, an object each) or "rows" (Parquet), by the file's name
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

Kind = Literal["text", "lines", "rows"]

COMPRESSED = (".gz", ".zst")
_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "rows"}

# What a file begins with that is no UTF-8 text.
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# A frame that zstd skips; pzstd begins with one, which says how long the next is.
_SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_NO_TEXT = {
    rb"\x1f\x8b": "compressed twice, last by gzip",
    rb"\x28\xb5\x2f\xfd": "compressed twice, last by zstd",
    rb".{257}ustar": "a tar archive",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2",
    rb"\xfd7zXZ\0": "compressed by xz",
    rb"PK\x03\x04": "a zip archive",
    rb"PAR1": "a Parquet file",
    rb"ARROW1\0": "an Arrow file",
    rb"%PDF-": "a PDF",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32",
    rb"\xff\xfe|\xfe\xff": "UTF-16",
}
# Bytes of a compressed file that are read at a time: of a text they are some 60 KB.
_BLOCK = 1 << 14
# Of so many replaced or NUL characters at least, and one in so many bytes, a text is reported.
_MANY, _ONE_IN = 100, 1000


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file of a known size, not a pipe or device. FileNotFoundError, and ValueError on a folder."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"path: {os.fspath(path)!r} is a folder, expected a text file")
    return stat.S_ISREG(mode)


def is_cuttable(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file whose parts can be read by themselves: no pipe, device or compressed file."""
    if not is_regular(path):
        return False
    with open(path, "rb") as file:
        return not _is_compressed(file.read(len(_ZSTD)))


def kind_of(path: str | os.PathLike[str]) -> Kind:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1], "text") if suffixes else "text"


def refuse_documents(path: str | os.PathLike[str]) -> None:
    """Raises ValueError where a file is no text but holds many, between which nothing says where one ends."""
    if (kind := kind_of(path)) != "text":
        what = "JSON lines" if kind == "lines" else "Parquet"
        raise ValueError(f"path: {os.fspath(path)!r} holds {what}, expected UTF-8 text; `rooflight data` encodes both")


def open_text(path: str | os.PathLike[str]) -> IO[bytes]:
    """The file, to be read from its beginning, as UTF-8 text; what is compressed by gzip or zstd is decompressed.

    Raises ValueError when it is plainly no text, or when what was compressed is damaged or cut off (while it is read).
    ImportError, which names what to install, on zstd where no module reads it.
    """
    is_regular(path)
    file: IO[bytes] = open(path, "rb")  # noqa: SIM115
    try:
        head = file.peek(4)[:4]  # type: ignore[attr-defined]
        if _is_compressed(head):
            file = io.BufferedReader(_Decompressed(file, _decompressor(head, path), path), 1 << 16)
        head = file.peek(512)[:512]  # type: ignore[attr-defined]
        for signature, what in _NO_TEXT.items():
            if re.match(signature, head, re.DOTALL):
                raise ValueError(f"path: {os.fspath(path)!r} is {what}, expected UTF-8 text")
    except BaseException:
        file.close()
        raise
    return file


def place(file: IO[bytes]) -> int:
    """How much of a file on disk, compressed or not, was read by now; of a pipe 0."""
    raw = getattr(file, "raw", None)
    source = raw.source if isinstance(raw, _Decompressed) else file
    return source.tell() if source.seekable() else 0


def _is_compressed(head: bytes) -> bool:
    return head.startswith((_GZIP, _ZSTD)) or _SKIPPED.match(head) is not None


def _decompressor(head: bytes, path: str | os.PathLike[str]) -> Callable[[], Any]:
    if head.startswith(_GZIP):
        return lambda: zlib.decompressobj(wbits=31)
    try:
        from compression.zstd import ZstdDecompressor  # Python 3.14

        return ZstdDecompressor
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise ImportError(
            f"{os.fspath(path)!r} is compressed by zstd, which zstandard reads: pip install 'rooflight[data]'"
        ) from None
    # (A window of 2 GB is what zstd --long=31 makes, as some published corpora were.)
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


class _Decompressed(io.RawIOBase):
    """What a compressed file holds: one stream after another, the end of each of which must be there."""

    def __init__(self, source: IO[bytes], make: Callable[[], Any], path: str | os.PathLike[str]) -> None:
        self.source = source
        self._blocks = self._decompressed(make, os.fspath(path))
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        n = min(len(buffer), len(self._block))
        buffer[:n] = self._block[:n]
        self._block = self._block[n:]
        return n

    def close(self) -> None:
        self.source.close()
        super().close()

    def _decompressed(self, make: Callable[[], Any], path: str | bytes) -> Iterator[bytes]:
        block = self.source.read(_BLOCK)
        while block:
            stream = make()
            while block:
                try:
                    yield stream.decompress(block)
                except Exception as error:  # zlib's, zstandard's
                    raise ValueError(f"path: {path!r} is damaged, expected a whole compressed file: {error}") from None
                if stream.eof:
                    break
                block = self.source.read(_BLOCK)
            if not stream.eof:
                raise ValueError(f"path: {path!r} is cut off, expected a whole compressed file")
            block = stream.unused_data
            # (Tapes and some file systems leave zeros behind a stream.)
            while not (block := block.lstrip(b"\0")) and (block := self.source.read(_BLOCK)):
                pass


def count_odd(data: bytes) -> tuple[int, int]:
    """How many NUL and how many U+FFFD, which stand for invalid bytes, a text has."""
    # (To see that there is none takes a tenth of the time of counting.)
    n_replaced = data.count(b"\xef\xbf\xbd") if b"\xef" in data else 0
    return data.count(b"\0") if b"\0" in data else 0, n_replaced


def warn_of_odd(n_nul: int, n_replaced: int, n_bytes: int) -> None:
    """Warns of a text with many NUL or U+FFFD: it is probably in another encoding than UTF-8."""
    if any(n >= _MANY and n * _ONE_IN >= n_bytes for n in (n_nul, n_replaced)):
        warnings.warn(
            f"the text's {n_bytes:,} bytes have {n_nul:,} NUL characters and {n_replaced:,} U+FFFD, "
            "mostly in place of bytes that are no UTF-8: is it in another encoding?",
            stacklevel=5,
        )
