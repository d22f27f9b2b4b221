"""Attention on a plain CPU tensor: torch's scaled_dot_product_attention, or eager products by sequence.

Eager keeps the promise of the kernels: q k^T, the softmax and p v in fp32 (fp64 for fp64), whatever the inputs' dtype,
the result in q's layout. It holds a sequence's score matrix; the backward computes the matrix anew and, with
p = softmax(z), z = scale q k^T (softcap: z = c tanh(scale q k^T / c); ALiBi: less slope |i + S - T - j|) and
delta = rowsum(p * dp) - dlse, has

    dv = p^T dout      dp = dout v^T      ds = p (dp - delta)      dq = scale ds k      dk = scale ds^T q

It serves the operators of launch.py, so that torch.compile and torch.export see one operator whatever the lengths are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import in_layout_of, known
from ..reference import key_distance, visible_mask
from ..rows import statistics
from .portable.launch import Problem

__all__ = ["launch_backward", "launch_forward", "scaled_dot_product", "sdpa_serves"]


def sdpa_serves(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether torch's scaled_dot_product_attention has the semantics for these lengths and this mask.

    It aligns the causal mask to the first key, and has no word on queries that see no key.
    """
    T, S = q.shape[2], k.shape[2]
    return known(S > 0) and (not causal or known(T == S) or known(T == 1))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention, in q's layout where v is as wide."""
    is_causal = causal and known(q.shape[2] == k.shape[2])  # else one query, the last: it sees every key
    grouped = not known(q.shape[1] == k.shape[1])  # takes a bool, and equal numbers of heads too
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return in_layout_of(q, out) if out.shape == q.shape else out


def _sequences(p: Problem) -> Iterator[tuple[slice | None, slice | None, Tensor | None]]:
    """The rows of q and of k of each packed sequence, and its slopes; of a dense batch None, None and all, once."""
    if p.ends_q is None or p.ends_k is None:
        yield None, None, p.slopes
        return
    ends_q, ends_k = p.ends_q.tolist(), p.ends_k.tolist()
    for i in range(len(ends_q) - 1):
        slopes = p.slopes[i] if p.slopes is not None and p.slopes.dim() == 2 else p.slopes
        yield slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1]), slopes


def _view(x: Tensor, rows: slice | None) -> Tensor:
    """x (B, heads, T, D), or those rows of x (total, heads, D), as (1, heads, T, D)."""
    return x if rows is None else x[rows].transpose(0, 1)[None]


def _statistic(x: Tensor, rows: slice | None) -> Tensor:
    """x (B, H, T), or those rows of x (H, total), as (1, H, T)."""
    return x if rows is None else x[None, :, rows]


def _by_key_head(x: Tensor, K: int) -> Tensor:
    """x (B, H, T, N), a key head's query heads one after the other: (B, K, H / K T, N)."""
    B, H, T, N = x.shape
    return x.reshape(B, K, H // K * T, N)


def _scores(q: Tensor, k: Tensor, slopes: Tensor | None, p: Problem) -> tuple[Tensor, Tensor | None]:
    """z (B, H, T, S), -inf where hidden, and with a softcap its derivative; q and k are fp32 or fp64."""
    (B, H, T, _), (K, S) = q.shape, k.shape[1:3]
    z = (_by_key_head(q, K) @ k.mT).view(B, H, T, S).mul_(p.scale)
    derivative = None
    if p.softcap > 0:
        z = torch.tanh(z / p.softcap)
        derivative = 1 - z.square()
        z *= p.softcap
    if slopes is not None:
        z -= slopes.to(z.dtype)[..., None, None] * key_distance(T, S, q.device)
    if p.left is not None or p.right is not None:
        z.masked_fill_(~visible_mask(T, S, False, (p.left, p.right), q.device), -math.inf)
    return z, derivative


def _softmax(z: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row by row, 0 where no key is visible, and the log-sum-exp (B, H, T); sinks join the sum. z is overwritten."""
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(z.dtype)[:, None, None]
        top = torch.maximum(top, sink)
    shift = top.masked_fill(top == -math.inf, 0)
    weights = z.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sink - shift)
    lse = shift + total.log()
    return weights.div_(total.masked_fill_(total == 0, 1)), lse.squeeze(-1)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, p: Problem) -> None:
    """Write out and lse (natural log): 0 and -inf in rows past the last packed sequence."""
    if q.is_meta:
        return
    if p.ends_q is not None:
        out.zero_()
        lse.fill_(-math.inf)
    wide, K = statistics(q.dtype)[0], k.shape[1]
    for rows, keys, slopes in _sequences(p):
        qi, ki, vi = _view(q, rows).to(wide), _view(k, keys).to(wide), _view(v, keys).to(wide)
        weights, statistic = _softmax(_scores(qi, ki, slopes, p)[0], sinks)
        _view(out, rows).copy_((_by_key_head(weights, K) @ vi).view(qi.shape))
        _statistic(lse, rows).copy_(statistic)


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, sinks: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, delta: Tensor | None, p: Problem,
) -> None:  # fmt: skip
    """Write dq, dk and dv, and delta where it is given: 0 in rows past the last packed sequence."""
    if q.is_meta:
        return
    if p.ends_q is not None:
        for x in (dq, dk, dv, delta):
            if x is not None:
                x.zero_()
    wide, K = statistics(q.dtype)[0], k.shape[1]
    for rows, keys, slopes in _sequences(p):
        qi, ki, vi = _view(q, rows).to(wide), _view(k, keys).to(wide), _view(v, keys).to(wide)
        z, derivative = _scores(qi, ki, slopes, p)
        weights, _ = _softmax(z, sinks)
        do = _by_key_head(_view(dout, rows).to(wide), K)
        _view(dv, keys).copy_(_by_key_head(weights, K).mT @ do)
        dp = (do @ vi.mT).view(weights.shape)
        d = (weights * dp).sum(-1)
        if dlse is not None:
            d -= _statistic(dlse, rows)
        if delta is not None:
            _statistic(delta, rows).copy_(d)
        ds = dp.sub_(d[..., None]).mul_(weights)
        if derivative is not None:
            ds *= derivative
        ds = _by_key_head(ds, K).mul_(p.scale)
        _view(dq, rows).copy_((ds @ ki).view(qi.shape))
        _view(dk, keys).copy_(ds.mT @ _by_key_head(qi, K))
