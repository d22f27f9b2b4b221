"""Checkpoints: directories that are either whole or absent, and known to be whole when they are read.

    <run>/checkpoints/step-00001000/
        model.safetensors    parameters
        model.json           the ModelConfig
        state.pt             optimizers, random generators, step and counters: tensors and plain values, loaded
        weights_only
        manifest.json        format, version, step, the tokenizer's hash; size and SHA-256 of every other file,
        and its own

Everything is written to a temporary directory, flushed to disk and renamed (files.new_folder), and only then do older
checkpoints go. A crash at any point leaves the previous checkpoint in place and at most a temporary directory, which
the next save removes. Loading reads every file against the manifest first. There is no reading without one: what an
earlier rooflight wrote, before there were manifests, cannot be told from what a disk has lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from ..model import ModelConfig, Transformer
from ..model.transformer import unwrapped
from ..model.typed import typed
from .files import new_folder, remove_folder

FORMAT, VERSION = "rooflight-checkpoint", 1
MANIFEST, WEIGHTS, MODEL, STATE = "manifest.json", "model.safetensors", "model.json", "state.pt"
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):  # noqa: N818
    """A checkpoint is not as it was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {reason}")
        self.path = path


@typed
def list_checkpoints(directory: str | Path) -> list[Path]:
    """What has a checkpoint's name under `directory`, whole or not, oldest first; none when it does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


@typed
def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    tokenizer_hash: str | None = None,
    keep: int = 2,
) -> Path:
    """Write `directory`/step-<step>, then remove all older whole checkpoints but keep - 1. Returns its path.

    model: a Transformer, or one inside torch.compile or DistributedDataParallel, whose weights are the same.
    extra: further plain values and tensors for state.pt.  tokenizer_hash: of the tokenizer that made the data.
    The states of torch's random generators, CPU and CUDA, are saved with it.
    Raises ValueError, before anything is written, when keep < 1, the step's checkpoint exists or the model is another
    module; OSError when it cannot be written, a full disk say, with nothing left of it.
    """
    directory = Path(directory)
    final = directory / f"step-{step:08d}"
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if final.exists():
        raise ValueError(f"step {step} has a checkpoint already: {final}")
    plain = plain_model(model)
    weights = _weights(plain)
    state = {
        "step": step,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "extra": extra or {},
    }
    try:
        with new_folder(final) as folder:
            safetensors.torch.save_file(weights, folder / WEIGHTS)
            (folder / MODEL).write_text(json.dumps(plain.config.to_dict(), indent=2) + "\n", encoding="utf-8")
            with (folder / STATE).open("wb") as file:
                torch.save(state, file)
            write_manifest(folder, step=step, tokenizer_hash=tokenizer_hash)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors have errors of their own for a file that cannot be written; the cause is an OSError's
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"could not write {final}: {cause}") from error

    whole = [p for p in list_checkpoints(directory) if _step(p) < step and _looks_whole(p)]
    for old in whole[: max(0, len(whole) - (keep - 1))]:
        remove_folder(old)
    return final


def plain_model(model: nn.Module) -> Transformer:
    """The Transformer inside torch.compile's or DistributedDataParallel's wrappers, which share its parameters.

    Raises ValueError on any other module, on parameters sharded between processes, and on wrappers further inside,
    whose names a plain model would not know.
    """
    inner = unwrapped(model)
    if inner is None:
        raise ValueError(f"model must be a Transformer, got {type(model).__name__}")
    if any(hasattr(p, "device_mesh") for p in inner.parameters()):
        raise ValueError("model must have whole parameters, got ones that are sharded between processes")
    return inner


def _weights(model: Transformer) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = Transformer(model.config).state_dict()
    weights = model.state_dict()
    if odd := sorted(weights.keys() ^ expected.keys()):
        raise ValueError(f"model must have the parameters of its config, got a difference in {odd[0]}")
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def write_manifest(folder: Path, *, step: int, tokenizer_hash: str | None) -> None:
    """Write manifest.json for the files that lie in a checkpoint's folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
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
    if missing := {WEIGHTS, MODEL, STATE} - files.keys():
        raise DamagedCheckpoint(path, f"its {MANIFEST} has no {min(missing)}")
    for name, (size, _) in files.items():
        if not (path / name).is_file():
            raise DamagedCheckpoint(path, f"{name} is missing")
        if (found := (path / name).stat().st_size) != size:
            raise DamagedCheckpoint(path, f"{name} has {found} bytes, {size} were written")
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read every file of the checkpoint `path` against its manifest, which is returned.

    Raises DamagedCheckpoint naming the first file that is not as written.
    """
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        if _sha256(path / name) != entry["sha256"]:
            raise DamagedCheckpoint(path, f"{name} has other bytes than were written (its SHA-256 differs)")
    return manifest


def _looks_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except DamagedCheckpoint:
        return False
    return True


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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


@typed
def load_model(path: str | Path, *, device: str | torch.device = "cpu", ops: Any = None) -> Transformer:
    """The model of a checkpoint, or of a run's latest checkpoint, in evaluation mode.

    ops: the implementation, rooflight.kernels (the default) or rooflight.kernels.reference.
    Raises FileNotFoundError when there is no checkpoint, DamagedCheckpoint (a ValueError), which names the whole one
    before it, when it is not as written.
    """
    path = find_checkpoint(path)
    try:
        verify_checkpoint(path)
    except DamagedCheckpoint as error:
        earlier = list_checkpoints(path.parent)
        earlier = [p for p in earlier if _NAME.fullmatch(path.name) and _step(p) < _step(path) and _looks_whole(p)]
        if earlier:
            error.args = (f"{error}; the one before it is {earlier[-1]}",)
        raise
    config = _model_config(path)
    model = Transformer(config) if ops is None else Transformer(config, ops=ops)
    model.load_state_dict(safetensors.torch.load_file(path / WEIGHTS))
    return model.to(device).eval()


def read_model_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint's model, or of a run's latest's. Raises as load_model does."""
    path = find_checkpoint(path)
    verify_checkpoint(path)
    return _model_config(path)


def _model_config(path: Path) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((path / MODEL).read_text(encoding="utf-8")))


@typed
def load_checkpoint(path: str | Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[int, dict[str, Any]]:
    """Restore model, optimizers' states and torch's random generators in place; returns (step, extra).

    The optimizers keep their own learning rates, decay and so on.

    Raises FileNotFoundError when there is no checkpoint, DamagedCheckpoint (a ValueError) when it is not as written,
    ValueError when it belongs to another model or other optimizers; all before anything is restored.
    """
    path = find_checkpoint(path)
    verify_checkpoint(path)
    plain = plain_model(model)
    saved = _model_config(path)
    if saved != plain.config:
        ours, theirs = plain.config.to_dict(), saved.to_dict()
        differing = ", ".join(f"{k} {theirs[k]!r} against {ours[k]!r}" for k in ours if ours[k] != theirs[k])
        raise ValueError(f"{path} holds another model than config.model: {differing}")
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"{path} holds {len(state['optimizers'])} optimizers, expected {len(optimizers)}")
    plain.load_state_dict(safetensors.torch.load_file(path / WEIGHTS))
    for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
        # hyperparameters are the configuration's to say, not the checkpoint's
        ours, theirs = optimizer.state_dict()["param_groups"], saved_state["param_groups"]
        groups = [{**g, "params": s["params"]} for g, s in zip(ours, theirs, strict=True)]
        optimizer.load_state_dict({**saved_state, "param_groups": groups})
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"], state["extra"]


@typed
def load_extra(path: str | Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with. Raises as load_checkpoint does."""
    path = find_checkpoint(path)
    verify_checkpoint(path)
    return torch.load(path / STATE, map_location="cpu", weights_only=True)["extra"]


@typed
def load_latest(
    directory: str | Path, model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[Path, int, dict[str, Any], list[DamagedCheckpoint]]:
    """load_checkpoint of the latest whole checkpoint in `directory`: its path, step, extra, and the damaged ones after.

    Raises what load_checkpoint does; DamagedCheckpoint when none is whole.
    """
    damaged: list[DamagedCheckpoint] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            return path, *load_checkpoint(path, model, optimizers), damaged
        except DamagedCheckpoint as error:
            damaged.append(error)
    if not damaged:
        raise FileNotFoundError(f"no checkpoint at {directory}")
    damaged[0].args = (f"{damaged[0]}; none before it is whole",)
    raise damaged[0]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step may be saved again; returns the new path."""
    names = (f"damaged-{path.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    aside = next(p for name in names if not (p := path.with_name(name)).exists())
    os.rename(path, aside)
    return aside
