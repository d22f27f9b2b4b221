"""Files and folders written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp-"


def write_text(path: Path, text: str) -> None:
    """Write a file by way of a temporary one in its folder, which is made where it is missing: fsync, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")  # a name of one's own, on any host
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as write_text does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`, which it becomes when the block ends: every file on disk, then a rename.

    A block that raises leaves nothing. A process that dies in it leaves the temporary folder, which the next new_folder
    beside it removes: a writer holds a lock on its own (flock), so that no folder in use is taken for a leftover.
    Raises FileExistsError when `final` exists.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    with ExitStack() as held:
        with _locked(final.parent, wait=True):  # so that nobody sees the folder before it is locked
            for leftover in final.parent.glob(_TEMPORARY + "*"):
                with _locked(leftover) as abandoned:
                    if abandoned:
                        shutil.rmtree(leftover, ignore_errors=True)
            folder = _temporary(final)
            folder.mkdir()
            held.enter_context(_locked(folder))
        try:
            yield folder
            for path in (*sorted(folder.rglob("*")), folder):
                _fsync(path)
            os.rename(folder, final)
            _fsync(final.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder that is never seen half removed under its name."""
    doomed = _temporary(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what stays, the next new_folder tries again


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name}-{os.urandom(4).hex()}")


@contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """An exclusive lock on a folder (flock); False where another process holds it, or the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone by now
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
