"""Files that appear whole or not at all, JSON, and token files. A leaf: it imports nothing of this package.

A token file is x.bin, the ids as little-endian uint16 or uint32 and nothing else, and x.bin.json, which says which
type, how many, of how much text, and the hash of the tokenizer that made them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT, VERSION = "rooflight-tokens", 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what Python does not tell the file of


class TokenFile:
    """A token file that is being written."""

    def __init__(self, out: IO[bytes], dtype: np.dtype) -> None:
        self._out = out
        self._dtype = dtype
        self.n_tokens = 0

    def write(self, ids: bytes) -> None:
        self._out.write(ids)
        self.n_tokens += len(ids) // self._dtype.itemsize


@contextmanager
def token_file(path: Path, vocab_size: int, tokenizer_hash: str) -> Iterator[tuple[TokenFile, dict[str, Any]]]:
    """A token file to write to, and its header, to which n_bytes is to be added: both appear when the block ends.

    A pipe or device gets the ids alone.
    """
    dtype = token_dtype(vocab_size)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "tokenizer_hash": tokenizer_hash,
    }
    with _written(path) as out:
        written = TokenFile(out, dtype)
        yield written, header
        if not _is_stream(path):
            with _written(header_path(path)) as header_out:
                header_out.write(as_json(header | {"n_tokens": written.n_tokens, "n_bytes": header["n_bytes"]}))
                for file in out, header_out:
                    file.flush()
                    os.fsync(file.fileno())
                with locked(path.parent):
                    # A reader refuses a token file without a header, but could not tell that the header is of another.
                    header_path(path).unlink(missing_ok=True)
                    os.replace(out.name, path)
                    os.replace(header_out.name, header_path(path))


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


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def header_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `path` when the block ends without an exception, and vanishes otherwise.

    A pipe or device is written to as it is.
    """
    with _written(path) as out:
        yield out
        if not _is_stream(path):
            out.flush()
            os.fsync(out.fileno())
            os.replace(out.name, path)


def replace_all(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    """Writes the files of these names, removing those of None: none is touched before all are on the disk.

    They are renamed in the order given, so a reader that is to find none of a half goes by the last.
    """
    with ExitStack() as stack:
        written = {}
        for name, content in contents.items():
            if content is not None:
                written[name] = out = stack.enter_context(_written(folder / name))
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
        stack.enter_context(locked(folder))
        for name in contents:
            if name in written:
                os.replace(written[name].name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def refuse_same_file(argument: str, path: Path, *inputs: Path) -> None:
    """Raises ValueError when `path`, to be written to, is one of the inputs, by a link or another name too."""
    for source in inputs:
        with suppress(FileNotFoundError):
            if not _is_stream(path) and os.path.samefile(path, source):
                raise ValueError(f"{argument}: {path} is the input {source}, expected another file")


def check_file(argument: str, path: Path) -> None:
    """Raises ValueError when `path`, to be written to after long work, is a folder or in none."""
    if path.is_dir():
        raise ValueError(f"{argument}: {path} is a folder, expected a file")
    if not _is_stream(path):
        check_folder(argument, path.parent)


def check_folder(argument: str, path: Path) -> None:
    """Raises ValueError when `path`, a folder to be written to after long work, cannot be, nor made."""
    there = path
    while not there.exists() and not there.is_symlink() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{argument}: {there} is no folder, expected one for {path}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}: {there} cannot be written to, expected another folder")


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what writers of files of such names in the folder left there when they were killed."""
    for path in folder.glob(f"{pattern}*.tmp"):
        # A writer holds a lock on what it writes.
        with suppress(OSError), path.open("rb") as leftover:
            fcntl.flock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as out:
        out.write(as_json(content))


def shown(path: str | os.PathLike[str]) -> str:
    """The path as text that can be written: bytes of a name that are no UTF-8 as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError when there is no such file, ValueError when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is no JSON: {error}") from None


def as_json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, of a name that no other writer has, which is gone when the block ends unless renamed."""
    if _is_stream(path):
        with path.open("wb") as out:
            yield out
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as out:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)  # see remove_leftovers
            yield out
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time, of all threads and processes, in this block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
