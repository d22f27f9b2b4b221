"""Launching the portable kernels: what the operators of ../launch.py do on every GPU, and under the interpreter.

Dense batches (q (B, H, T, D), k and v (B, K, S, D), lse (B, H, T)) or, with cu_seqlens, packed sequences
(q (total_q, H, D), k and v (total_k, K, D), lse (H, total_q)); the kernels read either through its strides.
left, right: how far a query sees from its own position, None without end.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...launching import TENSOR, Plan
from . import tiles
from .backward import (
    _flash_attention_bwd_dkdv_kernel,
    _flash_attention_bwd_dq_kernel,
    _flash_attention_delta_kernel,
)
from .forward import _flash_attention_fwd_kernel

__all__ = ["Problem", "launch_backward", "launch_forward"]

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
    slopes: Tensor | None  # ALiBi's, (H,) or (n_batch, H)

    def n_batch(self, q: Tensor) -> int:
        return q.shape[0] if self.ends_q is None else self.ends_q.shape[0] - 1


Strides = tuple[int, ...]


def _strides(strides: Strides, varlen: bool) -> Strides:
    """Strides as (b, h, row, d); packed sequences stand in the first dimension and have no batch stride."""
    if not varlen:
        return strides
    if len(strides) == 2:  # (H, total)
        return (0, *strides)
    total, head, dim = strides
    return 0, head, total, dim


def _slopes_strides(slopes: Tensor | None) -> Strides | None:
    """As (b, h): the same for every sequence, or one row for each."""
    return None if slopes is None else (0, *slopes.stride())[-2:]


def _score_factors(scale: float, softcap: float) -> tuple[float | None, float]:
    """What a score is multiplied by inside tanh (None without softcap) and in the base-2 exponent."""
    return (scale / softcap, softcap * LOG2E) if softcap > 0 else (None, scale * LOG2E)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products are IEEE unless the caller opted into TF32 through torch's own switch."""
    opted = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if opted and torch.version.hip is None else "ieee"


def _plan(
    kernel: Any, name: str, head_dim: int, dtype: torch.dtype, device: torch.device, n_row: int, n_head: int, *args: Any
) -> Plan | None:
    """One program for each tile of rows of each head; `name` "dkdv" walks keys, the others queries. None: no rows."""
    tile = tiles.choose(name, head_dim, dtype, device)
    n_program = -(-n_row // (tile.block_n if name == "dkdv" else tile.block_m)) * n_head
    if n_program == 0:
        return None
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": tiles.block_d(head_dim), "BLOCK_M": tile.block_m}
    if name != "delta":
        constants |= {"BLOCK_N": tile.block_n, "PRECISION": _precision(dtype)}
    # Triton 3.10 is to change the default of fused multiply-adds, and 3.9 warns of it
    constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return Plan(kernel, (n_program,), *args, **constants)


@lru_cache(maxsize=512)
def _forward_plan(
    version: int, precision: str, dtype: torch.dtype, device: torch.device, varlen: bool,
    n_batch: int, H: int, K: int, head_dim: int, sq: Strides, sk: Strides, sv: Strides, so: Strides, slse: Strides,
    sslopes: Strides | None, T: int, S: int, left: int | None, right: int | None, scale: float, softcap: float,
) -> Plan | None:  # fmt: skip
    return _plan(
        _flash_attention_fwd_kernel, "fwd", head_dim, dtype, device, T, n_batch * H,
        *(TENSOR,) * 10, *(_strides(x, varlen) for x in (sq, sk, sv, so, slse)), sslopes,
        H, K, T, S, left, right, *_score_factors(scale, softcap),
    )  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, unround: Tensor | None, p: Problem
) -> None:
    """Write out, lse (natural log) and, where it is given, the factor that undoes the rounding of lse."""
    T, S, ends_q, ends_k, *rest, slopes = p
    shape = q.shape
    plan = _forward_plan(
        tiles.version(), _precision(q.dtype), q.dtype, q.device, ends_q is not None,
        p.n_batch(q), shape[1], k.shape[1], shape[-1], q.stride(), k.stride(), v.stride(), out.stride(), lse.stride(),
        _slopes_strides(slopes), T, S, *rest,
    )  # fmt: skip
    if plan is not None:
        plan(q, k, v, sinks, slopes, out, lse, unround, ends_q, ends_k)


@lru_cache(maxsize=512)
def _backward_plans(
    version: int, precision: str, dtype: torch.dtype, device: torch.device, varlen: bool,
    n_batch: int, H: int, K: int, head_dim: int, strides: tuple[Strides, ...], sdlse: Strides | None,
    sslopes: Strides | None, T: int, S: int, left: int | None, right: int | None, scale: float, softcap: float,
) -> tuple[Plan | None, Plan | None, Plan | None]:  # fmt: skip
    """delta, dk and dv, dq.  strides: of q, k, v, out, dout, lse, dq, dk, dv."""
    sq, sk, sv, so, sdo, slse, sdq, sdk, sdv = (_strides(x, varlen) for x in strides)
    sdlse = None if sdlse is None else _strides(sdlse, varlen)
    sizes = (H, K, T, S, left, right, scale, *_score_factors(scale, softcap))
    of = (head_dim, dtype, device)
    return (
        _plan(
            _flash_attention_delta_kernel, "delta", *of, T, n_batch * H,
            *(TENSOR,) * 6, None, None, TENSOR, so, sdo, sdlse, slse, H, T, None,
        ),
        _plan(
            _flash_attention_bwd_dkdv_kernel, "dkdv", *of, S, n_batch * K,
            *(TENSOR,) * 12, sq, sk, sv, sdo, slse, sslopes, sdk, sdv, *sizes,
        ),
        _plan(
            _flash_attention_bwd_dq_kernel, "dq", *of, T, n_batch * H,
            *(TENSOR,) * 11, sq, sk, sv, sdo, slse, sslopes, sdq, *sizes,
        ),
    )  # fmt: skip


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None,
    unround: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, p: Problem,
) -> Tensor:  # fmt: skip
    """Write dq, dk and dv, of any strides; returns delta, rowsum(dout * out) less dlse, as lse.

    lse2 is lse in base 2, +inf for rows that see no key.
    """
    T, S, ends_q, ends_k, *rest, slopes = p
    shape = q.shape
    lse2, delta = (torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device) for _ in range(2))
    delta_plan, keys_plan, queries_plan = _backward_plans(
        tiles.version(), _precision(q.dtype), q.dtype, q.device, ends_q is not None,
        p.n_batch(q), shape[1], k.shape[1], shape[-1],
        tuple([x.stride() for x in (q, k, v, out, dout, lse, dq, dk, dv)]),
        None if dlse is None else dlse.stride(), _slopes_strides(slopes), T, S, *rest,
    )  # fmt: skip
    if delta_plan is not None:
        delta_plan(out, dout, lse, dlse, lse2, delta, ends_q)
    if keys_plan is not None:
        keys_plan(q, k, v, dout, lse2, delta, unround, slopes, dk, dv, ends_q, ends_k)
    if queries_plan is not None:
        queries_plan(q, k, v, dout, lse2, delta, unround, slopes, dq, ends_q, ends_k)
    return delta
