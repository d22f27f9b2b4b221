"""Saving and loading a checkpoint: by one process, or by all those of a run together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from ...model import ModelConfig, Transformer
from ...model.transformer import unwrapped
from ...model.typed import typed
from ..files import remove_folder
from .folder import (
    MODEL,
    SHARDS,
    STATE,
    WEIGHTS,
    DamagedCheckpoint,
    earlier_whole,
    file_entries,
    find_checkpoint,
    is_sharded,
    list_checkpoints,
    verify_checkpoint,
    write_manifest,
)
from .ranks import Ranks


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

    model: a Transformer, or one inside torch.compile or DistributedDataParallel, or sharded by fully_shard.
    extra: further plain values and tensors for state.pt.  tokenizer_hash: of the tokenizer that made the data.
    The states of torch's random generators, CPU and CUDA, are saved with it.
    Where torch.distributed has several ranks, all of them call it, with the same arguments, on a file system that they
    share; extra is rank 0's. An optimizer's state that several ranks hold must be the same on each.
    Raises ValueError, before anything is written, when keep < 1, the step's checkpoint exists or the model is another
    module; OSError when it cannot be written, a full disk say, with nothing left of it. All ranks raise what one does.
    """
    directory = Path(directory)
    final = directory / f"step-{step:08d}"
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    ranks = Ranks()
    if ranks.first(final.exists):
        raise ValueError(f"step {step} has a checkpoint already: {final}")
    plain = _plain(model)
    state = {"step": step, "extra": extra or {}}
    save = _save_shards if ranks.size > 1 or _is_sharded(plain) else _save_whole
    try:
        with ranks.new_folder(final) as folder:
            files = save(folder, plain, optimizers, state, ranks)
            ranks.first(lambda: write_manifest(folder, step=step, tokenizer_hash=tokenizer_hash, files=files))
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors have errors of their own for a file that cannot be written; the cause is an OSError's
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"could not write {final}: {cause}") from error

    def remove_old() -> None:
        whole = earlier_whole(final)
        for old in whole[: max(0, len(whole) - (keep - 1))]:
            remove_folder(old)

    ranks.first(remove_old)
    return final


def _save_whole(
    folder: Path, model: Transformer, optimizers: Sequence[Optimizer], state: dict[str, Any], ranks: Ranks
) -> dict[str, Any]:
    """The files of one process; returns what is known of them by now: nothing."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS)
    _write_rest(
        folder,
        model,
        {
            **state,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    )
    return {}


def _save_shards(
    folder: Path, model: Transformer, optimizers: Sequence[Optimizer], state: dict[str, Any], ranks: Ranks
) -> dict[str, Any]:
    """The files of all ranks; returns what the manifest says of those that a rank has written and read again."""
    from . import shards  # torch.distributed.checkpoint takes a second to import

    parameters = shards.parameters_of(model)
    names = shards.optimized_names(parameters, optimizers)
    written = shards.write(folder / SHARDS, shards.tensors_of(parameters, optimizers), ranks)
    entries = ranks.together(lambda: file_entries(folder, written))
    cuda = torch.cuda.is_available()
    generators = ranks.together(lambda: (torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None))
    ranks.first(lambda: _write_rest(folder, model, {**state, "optimizers": names, "generators": generators}))
    return {name: entry for found in entries for name, entry in found.items()}


def _write_rest(folder: Path, model: Transformer, state: dict[str, Any]) -> None:
    (folder / MODEL).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    with (folder / STATE).open("wb") as file:
        torch.save(state, file)


def _plain(model: nn.Module) -> Transformer:
    """The Transformer inside torch.compile's or DistributedDataParallel's wrappers, which share its parameters.

    Raises ValueError on any other module, and on wrappers further inside, whose names a plain model would not know.
    """
    inner = unwrapped(model)
    if inner is None:
        raise ValueError(f"model must be a Transformer, got {type(model).__name__}")
    with torch.device("meta"):
        expected = Transformer(inner.config)
    if odd := sorted(dict(inner.named_parameters()).keys() ^ dict(expected.named_parameters()).keys()):
        raise ValueError(f"model must have the parameters of its config, got a difference in {odd[0]}")
    return inner


def _is_sharded(model: Transformer) -> bool:
    return any(hasattr(p, "device_mesh") for p in model.parameters())


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
    plain = _plain(model)
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
        raise ValueError(f"{path} holds {len(state['optimizers'])} optimizers, expected {len(optimizers)}")
    return state


def _restore(
    path: Path, manifest: dict[str, Any], model: Transformer, optimizers: Sequence[Optimizer], state: dict[str, Any]
) -> None:
    if is_sharded(manifest):
        from . import shards

        shards.read(path / SHARDS, model, optimizers, state["optimizers"])
        return
    sharded = _is_sharded(model)
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
