"""The door for models: a checkpoint of ours or a Hugging Face folder, behind one function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from .. import kernels
from ..kernels import reference
from ..model import ModelConfig, Transformer, load_hf
from ..model.hf import is_hf, read_hf_config
from ..model.typed import typed
from .checkpoint import find_checkpoint, load_model, read_model_config
from .distributed import copy_parameters


@typed
def open_model(
    path: str | Path, *, device: str | torch.device = "cpu", ops: ModuleType | SimpleNamespace = kernels
) -> Transformer:
    """The model of a Hugging Face folder, a checkpoint, or a run's latest checkpoint, in evaluation mode.

    ops: the implementation, rooflight.kernels or rooflight.kernels.reference.
    Raises FileNotFoundError when there is none, ValueError on one that is damaged or not of this architecture.
    """
    if is_hf(path):
        return load_hf(path, ops, device=device).eval()
    return load_model(path, device=device, ops=ops)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model that open_model(path) opens, without its weights."""
    if is_hf(path):
        return read_hf_config(path)
    return read_model_config(path)


def require_model(name: str, path: str | Path) -> None:
    """Raise FileNotFoundError that names the option `name` where open_model(path) would find nothing to open."""
    if not is_hf(path):
        try:
            find_checkpoint(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {error}") from None


def copy_weights(path: str | Path, model: Transformer) -> None:
    """Give `model` the weights of the one that lies at `path`, which may have been made for another context_length.

    Of a sharded model each process reads all and keeps its part.
    Raises what open_model raises, and ValueError where the two differ in anything else.
    """
    given = open_model(path, ops=reference)
    ours, theirs = model.config.to_dict(), replace(given.config, context_length=model.config.context_length).to_dict()
    differing = ", ".join(
        f"{name} {theirs[name]!r} there, {ours[name]!r} here" for name in ours if ours[name] != theirs[name]
    )
    if differing:
        raise ValueError(f"init_from {path} holds another model: {differing}")
    copy_parameters(given, model)
