"""Optimizers: AdamW, Muon, the parameter groups of a transformer, clipping by the global norm, and schedules.

Muon takes the hidden matrices; embeddings, the output head and the norms stay with AdamW.
"""

from .adamw import AdamW
from .build import OPTIMIZERS, build_optimizers, clip_grad_norm, low_precision, split_parameters
from .muon import Muon, orthogonalize
from .schedule import SCHEDULES, get_lr_cosine_schedule, lr_factor

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamW",
    "Muon",
    "build_optimizers",
    "clip_grad_norm",
    "get_lr_cosine_schedule",
    "low_precision",
    "lr_factor",
    "orthogonalize",
    "split_parameters",
]
