"""A checkpoint's folder: which there are, and whether one is as it was written."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...model.typed import typed

FORMAT, VERSION = "rooflight-checkpoint", 1
MANIFEST, MODEL, STATE = "manifest.json", "model.json", "state.pt"
WEIGHTS = "model.safetensors"  # of one process
SHARDS = "shards"  # of several: torch.distributed.checkpoint's folder
SHARDS_INDEX = f"{SHARDS}/.metadata"
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):  # noqa: N818
    """A checkpoint is not as it was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> Any:  # ranks tell each other
        return type(self), (self.path, self.reason)


@typed
def list_checkpoints(directory: str | Path) -> list[Path]:
    """What has a checkpoint's name under `directory`, whole or not, oldest first; none when it does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def file_entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of these files of `folder`, by their names in it."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(paths)
    }


def write_manifest(folder: Path, *, step: int, tokenizer_hash: str | None, files: dict[str, dict[str, Any]]) -> None:
    """Write manifest.json of a checkpoint's folder.  files: of those that others have read already (file_entries)."""
    rest = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in files]
    files = dict(sorted((files | file_entries(folder, rest)).items()))
    content = {"format": FORMAT, "version": VERSION, "step": step, "tokenizer_hash": tokenizer_hash, "files": files}
    content["sha256"] = _own_sha256(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, whose files are there in the sizes that it says.

    Raises DamagedCheckpoint naming the first thing that is not so.
    """
    if not path.is_dir():
        raise DamagedCheckpoint(path, "it is no folder")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        kind, version = manifest["format"], manifest["version"]
        if manifest["sha256"] != _own_sha256(manifest):
            raise ValueError("sha256")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(path, f"it has no {MANIFEST}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpoint(path, f"its {MANIFEST} is not as written") from None
    if (kind, version) != (FORMAT, VERSION):
        raise DamagedCheckpoint(path, f"its {MANIFEST} has format {kind!r}, version {version!r}, not {VERSION}")
    tensors = SHARDS_INDEX if SHARDS_INDEX in files else WEIGHTS
    if missing := {tensors, MODEL, STATE} - files.keys():
        raise DamagedCheckpoint(path, f"its {MANIFEST} has no {min(missing)}")
    for name, (size, _) in files.items():
        if not (path / name).is_file():
            raise DamagedCheckpoint(path, f"{name} is missing")
        if (found := (path / name).stat().st_size) != size:
            raise DamagedCheckpoint(path, f"{name} has {found} bytes, {size} were written")
    return manifest


def verify_checkpoint(path: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Read every file of the checkpoint `path` against its manifest, which is returned.

    rank, world: read only what falls to this one of so many readers.
    Raises DamagedCheckpoint naming the first file that is not as written.
    """
    manifest = read_manifest(path)
    # the largest first, so that readers have about as much each
    by_size = sorted(manifest["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    for name, entry in by_size[rank::world]:
        if _sha256(path / name) != entry["sha256"]:
            raise DamagedCheckpoint(path, f"{name} has other bytes than were written (its SHA-256 differs)")
    return manifest


def is_sharded(manifest: dict[str, Any]) -> bool:
    """Whether several processes saved it."""
    return SHARDS_INDEX in manifest["files"]


def looks_whole(path: Path) -> bool:
    """Whether read_manifest finds nothing wrong."""
    try:
        read_manifest(path)
    except DamagedCheckpoint:
        return False
    return True


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def earlier_whole(path: Path) -> list[Path]:
    """The checkpoints beside `path` of earlier steps that look whole, oldest first."""
    if not _NAME.fullmatch(path.name):
        return []
    return [p for p in list_checkpoints(path.parent) if step_of(p) < step_of(path) and looks_whole(p)]


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself when it is a checkpoint, else the latest one, whole or not, in `path` or `path`/checkpoints.

    Raises FileNotFoundError when there is none.
    """
    path = Path(path)
    if (path.exists() and _NAME.fullmatch(path.name)) or (path / MANIFEST).is_file() or (path / WEIGHTS).is_file():
        return path
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise FileNotFoundError(f"no checkpoint at {path}")
    return found[-1]


@typed
def check_tokenizer(path: str | Path, tokenizer_hash: str, name: str | Path) -> None:
    """Raise ValueError unless the tokenizer `name` of that hash made what the checkpoint (or the run's latest) learned.

    A checkpoint that was saved without a hash fits every tokenizer. Raises FileNotFoundError when there is none, and
    DamagedCheckpoint.
    """
    path = find_checkpoint(path)
    expected = read_manifest(path)["tokenizer_hash"]
    if expected not in (None, tokenizer_hash):
        raise ValueError(
            f"checkpoint {path} was trained on tokens of the tokenizer {expected[:12]}, {name} is {tokenizer_hash[:12]}"
        )


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step may be saved again; returns the new path."""
    names = (f"damaged-{path.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    aside = next(p for name in names if not (p := path.with_name(name)).exists())
    os.rename(path, aside)
    return aside
