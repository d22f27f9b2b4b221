"""The checks of targets and of what may be asked of them, which both cross-entropies share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import check_device, check_dtype, check_number, check_tensor

__all__ = ["check_labels", "check_target"]


def check_target(target: Tensor, shape: torch.Size, reduction: str) -> None:
    """Raise ValueError unless target is an int64 tensor of the given shape and reduction a known one."""
    check_tensor("target", target)
    if target.shape != shape:
        raise ValueError(f"target: expected shape {tuple(shape)}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected dtype int64, got {str(target.dtype).removeprefix('torch.')}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def check_labels(label_smoothing: Any, class_weight: Any, like: tuple[str, Tensor], V: int) -> Any:
    """label_smoothing as a number; raises ValueError where it or class_weight is not as cross_entropy takes it."""
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    check_tensor("class_weight", class_weight, optional=True)
    if class_weight is not None:
        check_dtype("class_weight", class_weight)
        if class_weight.shape != (V,):
            raise ValueError(f"class_weight: expected shape ({V},), got {tuple(class_weight.shape)}")
        if class_weight.requires_grad:
            raise ValueError("class_weight: expected a tensor that requires no gradient (none is computed), got one")
        check_device(like, ("class_weight", class_weight))
    return label_smoothing
