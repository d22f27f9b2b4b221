"""Inputs of the cross-entropies."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 3.0,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


def class_weights(V: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """(V,) of 0 to 2, every seventh 0."""
    weights = 2 * torch.rand(V, generator=torch.Generator().manual_seed(3))
    weights[::7] = 0
    return weights.to(device, dtype)


def targets(
    shape: tuple[int, ...], V: int, device: torch.device | str, ignored: float = 0.3, ignore_index: int = -100
) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(0, V, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < ignored, ignore_index).to(device)
