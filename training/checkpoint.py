"""Checkpoints: directories that are either whole or absent.

    <run>/checkpoints/step-00001000/
        model.safetensors    parameters
        model.json           the ModelConfig
        state.pt             optimizers, random generators, step and counters: tensors and plain values, loaded
        weights_only

Everything is written to a temporary directory, flushed to disk and renamed, and only then do older checkpoints go. A
crash at any point leaves the previous checkpoint in place and at most a temporary directory, which the next save
removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.optim import Optimizer

from ..model import ModelConfig, Transformer
from ..model.typed import typed

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"


@typed
def list_checkpoints(directory: str | Path) -> list[Path]:
    """The whole checkpoints under `directory`, oldest first; none when it does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


@typed
def save_checkpoint(
    directory: str | Path,
    model: Transformer,
    optimizers: Sequence[Optimizer],
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write `directory`/step-<step>, then remove all but the latest `keep` checkpoints. Returns its path.

    model: a Transformer (its `config` is written beside it).  extra: further plain values and tensors for state.pt.
    The states of torch's random generators, CPU and CUDA, are saved with it.
    Raises ValueError when keep < 1 or the step's checkpoint exists.
    """
    directory = Path(directory)
    final = directory / f"step-{step:08d}"
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if final.exists():
        raise ValueError(f"step {step} has a checkpoint already: {final}")
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(_TEMPORARY + "*"):
        shutil.rmtree(leftover)

    temporary = directory / (_TEMPORARY + final.name)
    temporary.mkdir()
    safetensors.torch.save_file(model.state_dict(), str(temporary / "model.safetensors"))
    (temporary / "model.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    state = {
        "step": step,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "extra": extra or {},
    }
    torch.save(state, temporary / "state.pt")
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    os.rename(temporary, final)
    _fsync(directory)

    for old in list_checkpoints(directory)[:-keep]:
        doomed = directory / (_TEMPORARY + old.name)  # never a half-removed directory under a checkpoint's name
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return final


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself when it is a checkpoint, else the latest one in `path` or `path`/checkpoints.

    Raises FileNotFoundError when there is none.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise FileNotFoundError(f"no checkpoint at {path}")
    return found[-1]


@typed
def load_model(path: str | Path, *, device: str | torch.device = "cpu", ops: Any = None) -> Transformer:
    """The model of a checkpoint, or of a run's latest checkpoint, in evaluation mode.

    ops: the implementation, rooflight.kernels (the default) or rooflight.kernels.reference.
    Raises FileNotFoundError when there is no checkpoint.
    """
    path = find_checkpoint(path)
    config = ModelConfig.from_dict(json.loads((path / "model.json").read_text(encoding="utf-8")))
    model = Transformer(config) if ops is None else Transformer(config, ops=ops)
    model.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))
    return model.to(device).eval()


@typed
def load_checkpoint(
    path: str | Path, model: Transformer, optimizers: Sequence[Optimizer]
) -> tuple[int, dict[str, Any]]:
    """Restore model, optimizers' states and torch's random generators in place; returns (step, extra).

    The optimizers keep their own learning rates, decay and so on.

    Raises FileNotFoundError when there is no checkpoint, ValueError when it belongs to another model or other
    optimizers.
    """
    path = find_checkpoint(path)
    saved = ModelConfig.from_dict(json.loads((path / "model.json").read_text(encoding="utf-8")))
    if saved != model.config:
        ours, theirs = model.config.to_dict(), saved.to_dict()
        differing = ", ".join(f"{k} {theirs[k]!r} against {ours[k]!r}" for k in ours if ours[k] != theirs[k])
        raise ValueError(f"{path} holds another model than config.model: {differing}")
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"{path} holds {len(state['optimizers'])} optimizers, expected {len(optimizers)}")
    model.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))
    for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
        # hyperparameters are the configuration's to say, not the checkpoint's
        ours, theirs = optimizer.state_dict()["param_groups"], saved_state["param_groups"]
        groups = [{**g, "params": s["params"]} for g, s in zip(ours, theirs, strict=True)]
        optimizer.load_state_dict({**saved_state, "param_groups": groups})
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"], state["extra"]
