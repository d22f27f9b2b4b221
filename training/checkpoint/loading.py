"""Loading a checkpoint: by one process, or by all those of a run together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.optim import Optimizer

from ...model import ModelConfig, Transformer
from ...model.typed import typed
from .folder import (
    MODEL,
    SHARDS,
    STATE,
    WEIGHTS,
    DamagedCheckpoint,
    earlier_whole,
    find_checkpoint,
    is_sharded,
    list_checkpoints,
    verify_checkpoint,
)
from .ranks import Ranks
from .saving import is_sharded_model, plain_model


@typed
def load_model(path: str | Path, *, device: str | torch.device = "cpu", ops: Any = None) -> Transformer:
    """The model of a checkpoint, or of a run's latest checkpoint, in evaluation mode.

    ops: the implementation, rooflight.kernels (the default) or rooflight.kernels.reference.
    Raises FileNotFoundError when there is no checkpoint, DamagedCheckpoint (a ValueError), which names the whole one
    before it, when it is not as written.
    """
    path = find_checkpoint(path)
    try:
        manifest = verify_checkpoint(path)
    except DamagedCheckpoint as error:
        if earlier := earlier_whole(path):
            error.args = (f"{error}; the one before it is {earlier[-1]}",)
        raise
    config = _model_config(path)
    model = Transformer(config) if ops is None else Transformer(config, ops=ops)
    _read_weights(path, manifest, model)
    return model.to(device).eval()


def _read_weights(path: Path, manifest: dict[str, Any], model: Transformer) -> None:
    if is_sharded(manifest):
        from . import shards

        shards.read(path / SHARDS, model, [], [])
    else:
        model.load_state_dict(safetensors.torch.load_file(path / WEIGHTS))


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
    Where torch.distributed has several ranks, all of them call it. The checkpoint may be one of another number of
    ranks, or of one process, and the model sharded in another way; a rank that the saved run had not takes the random
    generators of its rank 0.

    Raises FileNotFoundError when there is no checkpoint, DamagedCheckpoint (a ValueError) when it is not as written,
    ValueError when it belongs to another model or other optimizers; all before anything is restored, and on all ranks.
    """
    ranks = Ranks()
    path = ranks.first(lambda: find_checkpoint(path))
    manifest = ranks.each(lambda: verify_checkpoint(path, ranks.rank, ranks.size))
    plain = plain_model(model)
    state = ranks.each(lambda: _read_state(path, plain, optimizers))
    ranks.each(lambda: _restore(path, manifest, plain, optimizers, state))
    _restore_generators(state, ranks.rank)
    return state["step"], state["extra"]


def _read_state(path: Path, model: Transformer, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """What state.pt holds. Raises ValueError unless the checkpoint belongs to this model and these optimizers."""
    saved = _model_config(path)
    if saved != model.config:
        ours, theirs = model.config.to_dict(), saved.to_dict()
        differing = ", ".join(f"{k} {theirs[k]!r} against {ours[k]!r}" for k in ours if ours[k] != theirs[k])
        raise ValueError(f"{path} holds another model than config.model: {differing}")
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(
            f"{path} holds {len(state['optimizers'])} optimizers, expected {len(optimizers)}: is optimizer another one?"
        )
    return state


def _restore(
    path: Path, manifest: dict[str, Any], model: Transformer, optimizers: Sequence[Optimizer], state: dict[str, Any]
) -> None:
    if is_sharded(manifest):
        from . import shards

        shards.read(path / SHARDS, model, optimizers, state["optimizers"])
        return
    sharded = is_sharded_model(model)
    weights = safetensors.torch.load_file(path / WEIGHTS)
    if sharded:
        from . import shards

        shards.lay_out_weights(weights, model)
    else:
        model.load_state_dict(weights)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        # hyperparameters are the configuration's to say, not the checkpoint's
        ours, theirs = optimizer.state_dict()["param_groups"], saved["param_groups"]
        groups = [{**g, "params": s["params"]} for g, s in zip(ours, theirs, strict=True)]
        optimizer.load_state_dict({**saved, "param_groups": groups})
        if sharded:
            shards.lay_out_states(optimizer)


def _restore_generators(state: dict[str, Any], rank: int) -> None:
    """torch's, as they were on this rank, or on the saved run's first."""
    cuda = torch.cuda.is_available()
    if "generators" in state:
        saved = state["generators"]
        on_cpu, on_cuda = saved[rank if rank < len(saved) else 0]
        if cuda and on_cuda is not None:
            torch.cuda.set_rng_state(on_cuda)
    else:
        on_cpu = state["rng"]
        if cuda and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    torch.set_rng_state(on_cpu)


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
    for path in reversed(Ranks().first(lambda: list_checkpoints(directory))):
        try:
            return path, *load_checkpoint(path, model, optimizers), damaged
        except DamagedCheckpoint as error:
            damaged.append(error)
    if not damaged:
        raise FileNotFoundError(f"no checkpoint at {directory}")
    damaged[0].args = (f"{damaged[0]}; none before it is whole",)
    raise damaged[0]
