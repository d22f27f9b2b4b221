"""The door for models: a checkpoint of ours or a Hugging Face folder, behind one function."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from .. import kernels
from ..model import Transformer, load_hf
from ..model.hf import is_hf
from .checkpoint import load_model


def open_model(path: str | Path, *, device: str | torch.device = "cpu", ops: ModuleType = kernels) -> Transformer:
    """The model of a Hugging Face folder, a checkpoint, or a run's latest checkpoint, in evaluation mode.

    ops: the implementation, rooflight.kernels or rooflight.kernels.reference.
    Raises FileNotFoundError when there is none, ValueError on one that is damaged or not of this architecture.
    """
    if is_hf(path):
        return load_hf(path, ops, device=device).eval()
    return load_model(path, device=device, ops=ops)
