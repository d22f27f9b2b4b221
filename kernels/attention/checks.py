"""Input checks of the public functions: each raises ValueError naming the argument, its value and what was expected."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..dispatch import check_device, check_dtype, check_flag, check_integer, check_number, check_tensor

MAX_HEAD_DIM = 512

Window = int | tuple[int | None, int | None] | None


def _check_rank(name: str, tensor: Tensor, axes: str) -> None:
    rank = axes.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected shape ({axes}), got {tuple(tensor.shape)}")


def check_types(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, return_lse: bool) -> None:
    """Tensors and a flag, before anything is asked of them."""
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    check_tensor("sinks", sinks, optional=True)
    check_flag("return_lse", return_lse)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, varlen: bool) -> None:
    """Ranks, matching sizes, heads, head size, dtypes and devices."""
    axes_q, axes_kv = ("total_q, H, D", "total_k, K, D") if varlen else ("B, H, T, D", "B, K, S, D")
    _check_rank("q", q, axes_q)
    _check_rank("k", k, axes_kv)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if not varlen and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected batch size {q.shape[0]}, as q, got shape {tuple(k.shape)}")
    n_head, n_kv_head, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    if k.shape[-1] != head_dim:
        raise ValueError(f"k: expected head size {head_dim}, as q, got shape {tuple(k.shape)}")
    for name, tensor in (("q", q), ("v", v)):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head size of 1 to {MAX_HEAD_DIM}, got shape {tuple(tensor.shape)}")
    if n_kv_head == 0 or n_head == 0 or n_head % n_kv_head != 0:
        raise ValueError(f"k: expected a number of heads that divides q's {n_head}, got shape {tuple(k.shape)}")
    check_dtype("q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected dtype {q.dtype}, as q, got {tensor.dtype}")
    if sinks is not None:
        if sinks.shape != (n_head,):
            raise ValueError(f"sinks: expected shape ({n_head},), one per query head, got {tuple(sinks.shape)}")
        check_dtype("sinks", sinks)
    check_device(("q", q), ("k", k), ("v", v), ("sinks", sinks))


def check_slopes(slopes: Tensor, q: Tensor, n_batch: int) -> None:
    """ALiBi's slopes: fp32, one for each query head, or for each of each of the n_batch sequences; constants."""
    check_tensor("alibi_slopes", slopes)
    n_head = q.shape[1]
    if slopes.dtype != torch.float32 or (slopes.shape != (n_head,) and slopes.shape != (n_batch, n_head)):
        raise ValueError(
            f"alibi_slopes: expected float32 of shape ({n_head},) or ({n_batch}, {n_head}), "
            f"got {slopes.dtype}{tuple(slopes.shape)}"
        )
    if slopes.requires_grad:
        raise ValueError("alibi_slopes: expected a tensor that requires no gradient (none is computed), got one")
    check_device(("q", q), ("alibi_slopes", slopes))


def check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    """A mask of flash_attention: bool, and it broadcasts to (B, H, T, S)."""
    check_tensor("mask", mask)
    full = (*q.shape[:3], k.shape[2])
    sizes = mask.shape[::-1]
    fits = len(sizes) <= 4 and all(size in (1, whole) for size, whole in zip(sizes, full[::-1], strict=False))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(f"mask: expected bool that broadcasts to {full}, got {mask.dtype}{tuple(mask.shape)}")
    check_device(("q", q), ("mask", mask))


def check_sequences(name: str, cu_seqlens: Tensor, max_seqlen: int, q: Tensor) -> int:
    """Type, shape, dtype and device of cu_seqlens_q or cu_seqlens_k (`name` is "q" or "k"); returns max_seqlen."""
    check_tensor(f"cu_seqlens_{name}", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens_{name}: expected shape (sequences + 1,) and dtype int32, "
            f"got {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}"
        )
    check_device(("q", q), (f"cu_seqlens_{name}", cu_seqlens))
    max_seqlen = check_integer(f"max_seqlen_{name}", max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen_{name}: expected at least 0, got {max_seqlen}")
    return max_seqlen


def check_bounds(name: str, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """Raise ValueError where the values of cu_seqlens_q or cu_seqlens_k, a CPU tensor, do not fit."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] > total or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name}: expected values that rise from 0 to at most {total}, got {ends}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen_{name}: expected at least {max(lengths)}, got {max_seqlen}")


def score_numbers(scale: float | None, softcap: float, head_dim: int) -> tuple[float, float]:
    """scale, or 1 / sqrt(head_dim), and softcap, both checked."""
    scale = head_dim**-0.5 if scale is None else check_number("scale", scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")
    softcap = check_number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number, at least 0 (0: none), got {softcap}")
    return scale, softcap


def reach(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """How far left and right of its own position a query sees; None is without end."""
    check_flag("causal", causal)
    if window is None:
        return None, 0 if causal else None
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window: expected a size or (left, right), at least 0, got {window}")
    left, right = (None if size is None else check_integer("window", size) for size in pair)
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"window: expected a size or (left, right), at least 0, got {window}")
    return left, 0 if causal else right
