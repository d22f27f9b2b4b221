"""A run's folder: whose it is, and the one process that writes in it.

    <out_dir>/
        rooflight.json   what kind of folder this is, and in which version of its layout; torchrun's id of the launch
                         that was here last, if it had one
        run.lock         locked (flock) as long as the run's process lives, whose id it holds
        config.json, log.jsonl, checkpoints/

A folder is a run's by its marker, empty, or refused.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..checkpoint import list_checkpoints
from ..files import write_json

MARKER, LOCK, CHECKPOINTS = "rooflight.json", "run.lock", "checkpoints"
FORMAT, VERSION = "rooflight-run", 1
PREVIOUS = "previous-"


class RunFolder:
    """While entered, `path` exists, is marked as a run's, and belongs to this run alone.

    resume: the run that it holds, if any, will go on.  overwrite: what it holds moves into its folder previous-<n>
    first, which `say` is told.  launch: what launch_of then says.
    Raises ValueError, when made and when entered, on a folder that holds anything else, a run that neither of the two
    allows to touch, or one whose process lives.
    """

    def __init__(
        self, path: Path, *, resume: bool, overwrite: bool, say: Callable[[str], None], launch: str | None = None
    ) -> None:
        self.path, self.resume, self.overwrite, self._say = path, resume, overwrite, say
        self.launch = launch
        self._lock: IO[str] | None = None
        self.check()

    def check(self) -> None:
        """Raise ValueError unless the run may have the folder."""
        if not self.path.is_dir():
            if self.path.exists() or self.path.is_symlink():
                raise ValueError(f"out_dir {self.path} must be a folder, and is none")
            return
        held = self._held()
        if not held or self.overwrite:
            return
        if MARKER not in held:
            some = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
            raise ValueError(
                f"out_dir {self.path} holds {some} and no {MARKER}, so it is no run's folder: choose another, or "
                "overwrite, which moves these aside"
            )
        self._check_marker()
        if not self.resume and list_checkpoints(self.path / CHECKPOINTS):
            raise ValueError(
                f"out_dir {self.path} holds a run already: resume it, or choose another, or overwrite, which moves it "
                "aside"
            )

    def _held(self) -> list[str]:
        # the marker's temporary file is what a run leaves that was killed as it began
        no_run = (PREVIOUS, f".{MARKER}.")
        return sorted(p.name for p in self.path.iterdir() if p.name != LOCK and not p.name.startswith(no_run))

    def _check_marker(self) -> None:
        marker = self.path / MARKER
        try:
            found = json.loads(marker.read_bytes())
            kind, version = found["format"], found["version"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{marker} is damaged: expected format {FORMAT!r} and version {VERSION}") from None
        if (kind, version) != (FORMAT, VERSION):
            raise ValueError(f"{marker} has format {kind!r}, version {version!r}; expected {FORMAT!r}, {VERSION}")

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        try:
            self.check()  # again: another process may have been here since
            if self.overwrite:
                self._move_aside()
            marker = {"format": FORMAT, "version": VERSION}
            write_json(self.path / MARKER, marker | ({} if self.launch is None else {"launch": self.launch}))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            # unlocked, not only closed: a forked child holds a copy of the descriptor
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _acquire(self) -> IO[str] | None:
        """The lock's file. It stays when the run ends: what says whether it is held is the kernel, not the file."""
        file = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"out_dir {self.path} is in use by {holder}: wait for that run, end it, or choose another folder"
            ) from None
        except OSError as error:
            file.close()
            warnings.warn(f"no lock on out_dir {self.path}, its file system has none ({error})", stacklevel=2)
            return None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def _move_aside(self) -> None:
        held = self._held()
        if not held:
            return
        aside = next(p for n in itertools.count(1) if not (p := self.path / f"{PREVIOUS}{n}").exists())
        aside.mkdir()
        for name in held:
            os.rename(self.path / name, aside / name)
        self._say(f"moved what {self.path} held into {aside}: {', '.join(held)}")


def launch_of(path: Path) -> str | None:
    """The launch that was the last to enter the run's folder `path`; None where it had no id, or there is no run."""
    try:
        return json.loads((path / MARKER).read_bytes()).get("launch")
    except (OSError, ValueError, AttributeError):
        return None
