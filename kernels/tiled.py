"""FlashAttention-2's two algorithms in plain PyTorch, to be read beside the kernels (Dao 2023, algorithms 1 and 2).

Of the scores only a tile, BLOCK_Q queries by BLOCK_K keys, exists at a time; the forward keeps one number per query,
the log-sum-exp, and the backward computes each tile of probabilities anew from it. Tiles that the causal mask hides
whole are not visited. Gradients are bitwise deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .reference import visible_mask

__all__ = ["TiledAttentionFunction", "tiled_attention", "tiled_attention_backward"]

BLOCK_Q, BLOCK_K = 64, 64

# Shapes: q (..., T, D), k (..., S, D), v (..., S, D_v), leading axes that broadcast: k and v of a key-value head may
# stand once for several query heads. Query i stands at key position i + S - T, as everywhere here.


def _tiles(n_query: int, n_key: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """The visible tiles, query tile by query tile: rows of q, rows of k."""
    for q0 in range(0, n_query, BLOCK_Q):
        q1 = min(q0 + BLOCK_Q, n_query)
        end = min(n_key, q1 + n_key - n_query) if causal else n_key
        for k0 in range(0, end, BLOCK_K):
            yield slice(q0, q1), slice(k0, min(k0 + BLOCK_K, n_key))


def _statistics(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A tile of scale q k^T, fp32, and which of it is visible."""
    mask = visible_mask(q.shape[-2], k.shape[-2], causal, device=q.device)[rows, keys]
    return _statistics(q[..., rows, :]) @ _statistics(k[..., keys, :]).mT * scale, mask


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v (..., T, D_v) in q's dtype, and the log-sum-exp (..., T), fp32."""
    n_query, n_key = q.shape[-2], k.shape[-2]
    heads = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    out = _statistics(q).new_zeros(*heads, n_query, v.shape[-1])
    total = out.new_zeros(*heads, n_query, 1)
    top = torch.full_like(total, -math.inf)  # the greatest score so far
    for rows, keys in _tiles(n_query, n_key, causal):
        s, mask = _scores(q, k, rows, keys, causal, scale)
        before = top[..., rows, :]
        m = torch.maximum(before, s.masked_fill(~mask, -math.inf).amax(-1, keepdim=True))
        shift = m.masked_fill(m == -math.inf, 0)  # a row that has seen no key
        p = torch.exp(s - shift).masked_fill(~mask, 0)
        shrink = torch.exp(before - shift)  # of what was summed under the earlier maximum
        total[..., rows, :] = total[..., rows, :] * shrink + p.sum(-1, keepdim=True)
        out[..., rows, :] = out[..., rows, :] * shrink + p @ _statistics(v[..., keys, :])
        top[..., rows, :] = m
    out /= total.masked_fill(total == 0, 1)  # a row with no visible key stays 0
    return out.to(q.dtype), (top + total.log()).squeeze(-1)


def tiled_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv.

    With p = exp(s - lse): dv = p^T dout, ds = p (dout v^T - delta), delta = rowsum(dout out), dq = ds k, dk = ds^T q.
    """
    q32, k32, v32, dout = (_statistics(x) for x in (q, k, v, dout))
    delta = (dout * out).sum(-1, keepdim=True)
    shift = lse.masked_fill(lse == -math.inf, 0)[..., None]
    dq, dk, dv = torch.zeros_like(q32), torch.zeros_like(k32), torch.zeros_like(v32)
    for rows, keys in _tiles(q.shape[-2], k.shape[-2], causal):
        s, mask = _scores(q32, k32, rows, keys, causal, scale)
        p = torch.exp(s - shift[..., rows, :]).masked_fill(~mask, 0)
        do = dout[..., rows, :]
        ds = p * (do @ v32[..., keys, :].mT - delta[..., rows, :]) * scale
        dq[..., rows, :] += ds @ k32[..., keys, :]
        dk[..., keys, :] += (ds.mT @ q32[..., rows, :]).sum_to_size(k32[..., keys, :].shape)
        dv[..., keys, :] += (p.mT @ do).sum_to_size(v32[..., keys, :].shape)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class TiledAttentionFunction(torch.autograd.Function):
    """apply(q, k, v, is_causal=False) -> out (..., T, D_v): attention by this file's algorithms, on any device.

    q: (..., T, D).  k: (..., S, D).  v: (..., S, D_v).  Leading axes, of which three-dimensional inputs have one, are
    q's or 1.  Saves q, k, v, out and the log-sum-exp (..., T).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        ctx.options = is_causal, q.shape[-1] ** -0.5
        out, lse = tiled_attention(q, k, v, *ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *tiled_attention_backward(dout, *ctx.saved_tensors, *ctx.options), None
