"""Launching the portable kernels: what the operators of ../launch.py do on every GPU, and under the interpreter.

Dense batches (q (B, H, T, D), k and v (B, K, S, D), lse (B, H, T)) or, with cu_seqlens, packed sequences
(q (total_q, H, D), k and v (total_k, K, D), lse (H, total_q)); the kernels read either through its strides.
left, right: how far a query sees from its own position, None without end.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...launching import launch
from . import tiles
from .backward import (
    _flash_attention_bwd_dkdv_kernel,
    _flash_attention_bwd_dq_kernel,
    _flash_attention_delta_kernel,
)
from .forward import _flash_attention_fwd_kernel

__all__ = ["Problem", "launch_backward", "launch_delta", "launch_forward"]

LOG2E = math.log2(math.e)


class Problem(NamedTuple):
    """What both passes are asked. T, S: of the longest sequence.  ends: cu_seqlens, int32, contiguous, or None."""

    T: int
    S: int
    ends_q: Tensor | None
    ends_k: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float

    def n_batch(self, q: Tensor) -> int:
        return q.shape[0] if self.ends_q is None else self.ends_q.shape[0] - 1


def _strides(x: Tensor, varlen: bool) -> tuple[int, ...]:
    """Strides as (b, h, row, d); packed sequences stand in the first dimension and have no batch stride."""
    strides = x.stride()
    if not varlen:
        return strides
    if len(strides) == 2:  # (H, total)
        return (0, *strides)
    total, head, dim = strides
    return 0, head, total, dim


def _score_factors(scale: float, softcap: float) -> tuple[float | None, float]:
    """What a score is multiplied by inside tanh (None without softcap) and in the base-2 exponent."""
    return (scale / softcap, softcap * LOG2E) if softcap > 0 else (None, scale * LOG2E)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products are IEEE unless the caller opted into TF32 through torch's own switch."""
    opted = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if opted and torch.version.hip is None else "ieee"


@cache
def _constants(name: str, tile: tiles.Tile, head_dim: int, precision: str) -> dict[str, Any]:
    """The compile-time arguments of a kernel, and Triton's options."""
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": tiles.block_d(head_dim), "BLOCK_M": tile.block_m}
    if name != "delta":
        constants |= {"BLOCK_N": tile.block_n, "PRECISION": precision}
    # Triton 3.10 is to change the default of fused multiply-adds, and 3.9 warns of it
    return constants | {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def _run(kernel: Any, name: str, q: Tensor, n_row: int, n_head: int, *args: Any) -> None:
    """Launch one program for each tile of rows of each head; `name` "dkdv" walks keys, the others queries."""
    head_dim = q.shape[-1]
    tile = tiles.choose(name, head_dim, q.dtype, q.device)
    n_program = -(-n_row // (tile.block_n if name == "dkdv" else tile.block_m)) * n_head
    if n_program > 0:
        launch(kernel, (n_program,), *args, **_constants(name, tile, head_dim, _precision(q.dtype)))


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, unround: Tensor | None, p: Problem
) -> None:
    """Write out, lse (natural log) and, where it is given, the factor that undoes the rounding of lse."""
    varlen = p.ends_q is not None
    H = q.shape[1]
    _run(
        _flash_attention_fwd_kernel, "fwd", q, p.T, p.n_batch(q) * H,
        q, k, v, sinks, out, lse, unround, p.ends_q, p.ends_k,
        _strides(q, varlen), _strides(k, varlen), _strides(v, varlen), _strides(out, varlen), _strides(lse, varlen),
        H, k.shape[1], p.T, p.S, p.left, p.right, *_score_factors(p.scale, p.softcap),
    )  # fmt: skip


def launch_delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, p: Problem) -> tuple[Tensor, Tensor]:
    """lse2, the base-2 log-sum-exp (+inf for rows that see no key), and delta, rowsum(dout * out) less dlse."""
    varlen = p.ends_q is not None
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    H = out.shape[1]
    _run(
        _flash_attention_delta_kernel, "delta", out, p.T, p.n_batch(out) * H,
        out, dout, lse, dlse, lse2, delta, None, None, p.ends_q, _strides(out, varlen), _strides(dout, varlen),
        None if dlse is None else _strides(dlse, varlen), _strides(lse, varlen), H, p.T, None,
    )  # fmt: skip
    return lse2, delta


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse2: Tensor, delta: Tensor, unround: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, p: Problem,
) -> None:  # fmt: skip
    """Write dq, dk and dv, of any strides, from what launch_delta returns."""
    varlen = p.ends_q is not None
    H, K, n_batch = q.shape[1], k.shape[1], p.n_batch(q)
    strides = (
        _strides(q, varlen), _strides(k, varlen), _strides(v, varlen), _strides(dout, varlen), _strides(delta, varlen)
    )  # fmt: skip
    sizes = (H, K, p.T, p.S, p.left, p.right, p.scale, *_score_factors(p.scale, p.softcap))
    inputs = (q, k, v, dout, lse2, delta, unround)
    _run(
        _flash_attention_bwd_dkdv_kernel, "dkdv", q, p.S, n_batch * K,
        *inputs, dk, dv, p.ends_q, p.ends_k, *strides, _strides(dk, varlen), _strides(dv, varlen), *sizes,
    )  # fmt: skip
    _run(
        _flash_attention_bwd_dq_kernel, "dq", q, p.T, n_batch * H,
        *inputs, dq, p.ends_q, p.ends_k, *strides, _strides(dq, varlen), *sizes,
    )  # fmt: skip
