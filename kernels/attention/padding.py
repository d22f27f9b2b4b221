"""Rows of packed tensors that no sequence holds: the batch's padding, past cu_seqlens[-1]. They are made 0.

The attention kernels walk sequences and never touch them; left as allocated, a NaN there would reach the gradient of
whatever made q. Nothing is read back from the GPU: a launch of a few programs finds the rows itself. Rows of a sequence
past its max_seqlen, which a GPU cannot refuse without a wait, are not walked either, and are cleared too.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import TENSOR, Plan
from .portable.launch import Problem

__all__ = ["clear"]

ROWS = 16  # of a tile
PARTS = 8  # programs for each sequence, and for the padding
WARPS = 4


@triton.jit
def _clear_rows(ptr, strides, heads, first, last, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in rows first .. last - 1 of ptr (total, heads, D): every PARTS-th tile, from this program's on."""
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    step = tl.num_programs(1) * ROWS
    for start in range(first + tl.program_id(1) * ROWS, last, step):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & (cols < HEAD_DIM)[None, :]
        offsets = rows.to(tl.int64)[:, None] * strides[0] + cols[None, :] * strides[2]
        for h in range(heads):
            at = ptr + tl.cast(h, tl.int64) * strides[1] + offsets
            tl.store(at, tl.zeros([ROWS, BLOCK_D], ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unreached(cu_seqlens_ptr, b, n_sequence, total, longest):
    """First row and end of what is not walked: sequence b past `longest`, or for b = n_sequence the padding."""
    is_sequence = b < n_sequence
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + b + 1, mask=is_sequence, other=0).to(tl.int64)
    first = tl.where(is_sequence, start + longest, start)
    return first, tl.where(is_sequence, end, total)


@triton.jit(do_not_specialize=["n_sequence", "total_q", "total_k", "longest_q", "longest_k"])
def _clear_kernel(
    q_ptr,  # out or dq, (total_q, H, D)
    statistic_ptr,  # lse or delta, (H, total_q), or None
    k_ptr,  # dk, (total_k, K, D), or None
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    statistic_strides,
    k_strides,
    v_strides,
    H,
    K,
    n_sequence,
    total_q,
    total_k,
    longest_q,
    longest_k,
    statistic,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(0)
    first, last = _unreached(cu_seqlens_q_ptr, b, n_sequence, total_q, longest_q)
    _clear_rows(q_ptr, q_strides, H, first, last, HEAD_DIM, BLOCK_D, ROWS)
    if statistic_ptr is not None:
        for start in range(first + tl.program_id(1) * ROWS, last, tl.num_programs(1) * ROWS):
            rows = start + tl.arange(0, ROWS)
            for h in range(H):
                at = statistic_ptr + tl.cast(h, tl.int64) * statistic_strides[0]
                at += rows.to(tl.int64) * statistic_strides[1]
                tl.store(at, tl.full([ROWS], statistic, statistic_ptr.dtype.element_ty), mask=rows < last)
    if k_ptr is not None:
        first, last = _unreached(cu_seqlens_k_ptr, b, n_sequence, total_k, longest_k)
        _clear_rows(k_ptr, k_strides, K, first, last, HEAD_DIM, BLOCK_D, ROWS)
        _clear_rows(v_ptr, v_strides, K, first, last, HEAD_DIM, BLOCK_D, ROWS)


Strides = tuple[int, ...]


@lru_cache(maxsize=512)
def _plan(
    device: torch.device, n_sequence: int, q_shape: torch.Size, k_shape: torch.Size | None, strides: Strides,
    statistic_strides: Strides | None, k_strides: Strides | None, v_strides: Strides | None,
    longest_q: int, longest_k: int, statistic: float,
) -> Plan:  # fmt: skip
    total_q, H, D = q_shape
    total_k, K, _ = (0, 0, 0) if k_shape is None else k_shape
    return Plan(
        _clear_kernel, (n_sequence + 1, PARTS),
        *(TENSOR,) * 6, strides, statistic_strides, k_strides, v_strides,
        H, K, n_sequence, total_q, total_k, longest_q, longest_k, statistic,
        HEAD_DIM=D, BLOCK_D=triton.next_power_of_2(D), ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip


def clear(p: Problem, queries: tuple[Tensor, Tensor | None, float], keys: tuple[Tensor, Tensor] | None = None) -> None:
    """Zero the rows that no packed sequence of p holds, in tensors that its kernels wrote.

    queries: (total_q, H, D), a statistic (H, total_q) or None, and the statistic's value in those rows.
    keys: two of (total_k, K, D).
    """
    x, rows, value = queries
    k, v = (None, None) if keys is None else keys
    if p.ends_q is None or (x.numel() == 0 and (k is None or k.numel() == 0)):
        return
    plan = _plan(
        x.device, p.ends_q.shape[0] - 1, x.shape, None if k is None else k.shape, x.stride(),
        None if rows is None else rows.stride(), None if k is None else k.stride(), None if v is None else v.stride(),
        p.T, p.S, value,
    )  # fmt: skip
    plan(x, rows, k, v, p.ends_q, p.ends_k)
