"""What the attention tests share: drawn inputs, small tiles, the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rooflight.kernels import reference
from rooflight.kernels.attention import flash_attention, flash_attention_varlen, tiles
from support.tolerance import gaussian, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def tile(block_m: int, block_n: int) -> Iterator[None]:
    """Every kernel with this tile: small ones make several, partial and skipped tiles out of short sequences."""
    with mock.patch.object(tiles, "choose", return_value=tiles.Tile(block_m, block_n)):
        yield


def draw(
    B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype, device: Any = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """q, k and v of a dense batch."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, H, T, D), "k": (B, K, S, D), "v": (B, K, S, D)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for name, shape in shapes.items()
    }


def draw_sinks(H: int, dtype: torch.dtype, device: Any = "cpu", seed: int = 0) -> Tensor:
    """One logit per head."""
    return torch.randn(H, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(device, dtype)


def judge_attention(
    inputs: dict[str, Any], *, varlen: bool = False, grad: Callable[..., Tensor] = gaussian, **options: Any
) -> None:
    """Output, log-sum-exp and every gradient against the oracle in fp64; nothing may be NaN."""
    ours, oracle = (
        (flash_attention_varlen, reference.flash_attention_varlen)
        if varlen
        else (flash_attention, reference.flash_attention)
    )
    judge(ours, oracle, inputs, grad=grad, return_lse=True, **options)
