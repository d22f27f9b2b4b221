"""Eager PyTorch oracles: the public functions' names and signatures, with no Triton.

Each oracle is what a careful eager model would write: products in the inputs' dtype, statistics in fp32. Given fp64
inputs everything runs in fp64, so `op(*doubled)` is the truth and `op(*inputs)` shows eager PyTorch's own error. They
differentiate through autograd, materialise what the kernels do not, and check nothing: the public functions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "cross_entropy",
    "flash_attention",
    "flash_attention_varlen",
    "fp8_linear",
    "gelu",
    "key_distance",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_qkv",
    "swiglu",
    "visible_mask",
]


# The exponent of a format's largest number, 1.75 x 2^exponent: 448 and 57344.
FP8_EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
FP8_MULTIPLE = 16  # of which the sides of matrices must be that a GPU multiplies in fp8


def _statistics(x: Tensor) -> Tensor:
    """x in the precision that statistics are kept in: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)  (Zhang & Sennrich 2019, eq. 4).

    x: (..., N).  weight: (N,) or None.  Returns y in x's dtype; with residual (..., N), returns (y, x + residual),
    where the sum is what is normalised.
    """
    stream = x if residual is None else x + residual
    h = _statistics(stream)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, stream)


def visible_mask(
    n_query: int,
    n_key: int,
    causal: bool,
    window: int | tuple[int | None, int | None] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Boolean (T, S): key j is visible to query i, which stands at p = i + S - T (bottom-right alignment)."""
    position = torch.arange(n_query, device=device)[:, None] + (n_key - n_query)
    key = torch.arange(n_key, device=device)[None, :]
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    if causal:
        mask &= key <= position
    if window is not None:
        left, right = window if isinstance(window, Sequence) else (window, 0 if causal else window)
        if left is not None:
            mask &= key >= position - left
        if right is not None:
            mask &= key <= position + right
    return mask


def key_distance(n_query: int, n_key: int, device: torch.device | None = None) -> Tensor:
    """|p - j| (T, S), int64: how far key j is from the position p = i + S - T of query i."""
    position = torch.arange(n_query, device=device)[:, None] + (n_key - n_query)
    return (position - torch.arange(n_key, device=device)).abs()


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v, with the score matrix in memory (Vaswani et al. 2017, eq. 1).

    q: (B, H, T, D).  k: (B, K, S, D).  v: (B, K, S, D_v).  H a multiple of K.  mask: bool, broadcasts to (B, H, T, S).
    alibi_slopes: (H,) or (B, H), a bias of -slope |i + S - T - j| (Press et al. 2022, section 3).
    Returns (B, H, T, D_v), and with return_lse the natural log-sum-exp (B, H, T) in fp32 (fp64 for fp64), sinks
    included.
    """
    n_query, n_key = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = _statistics(q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype)[..., None, None]
        scores = scores - slopes * key_distance(n_query, n_key, q.device)
    visible = visible_mask(n_query, n_key, causal, window, q.device)
    mask = visible if mask is None else visible & mask
    # A row with no visible key must give 0 and zero gradients, not NaN: keep every -inf out of the arithmetic.
    floor = torch.finfo(scores.dtype).min
    top = (
        scores.masked_fill(~mask, floor).amax(-1, keepdim=True) if n_key else scores.new_full((*q.shape[:3], 1), floor)
    )
    if sinks is not None:
        sink = _statistics(sinks)[:, None, None]
        top = torch.maximum(top, sink)
    top = top.detach()
    p = torch.exp(torch.where(mask, scores - top, 0)) * mask
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = (p / total).to(v.dtype) @ v
    if not return_lse:
        return out
    return out, (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attention over packed sequences, one at a time.

    q: (total_q, H, D).  k, v: (total_k, K, D).  cu_seqlens: (sequences + 1,), int32, from 0 to the total or less.
    Returns (total_q, H, D), and with return_lse the log-sum-exp (H, total_q): 0 and -inf past the last sequence.
    """
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[-1])], []
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        qi, ki, vi = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out, lse = flash_attention(
            qi, ki, vi, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, return_lse=True,
            alibi_slopes=alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = len(q) - ends_q[-1]
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[-1]))
    lses.append(q.new_full((q.shape[1], rest), float("-inf"), dtype=_statistics(q[:0]).dtype))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of features by a position-dependent angle (Su et al. 2021, eq. 34).

    q: (B, H, T, D).  k: (B, K, T, D).  cos, sin: (positions, R / 2), R <= D even; features past R pass unchanged.
    positions: (T,) or (B, T), rows of cos and sin; None is 0 .. T-1.  Pairs are (i, i + R/2), or (2i, 2i + 1) when
    interleaved.
    """
    n_token, half = q.shape[2], cos.shape[-1]
    index = torch.arange(n_token, device=q.device) if positions is None else positions
    c, s = cos[index], sin[index]
    if index.dim() == 2:  # (B, T, R/2): the same angles for every head
        c, s = c[:, None], s[:, None]

    def rotate(x: Tensor) -> Tensor:
        turned, rest = _statistics(x[..., : 2 * half]), x[..., 2 * half :]
        pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
        dim = -1 if interleaved else -2
        a, b = pairs.unbind(dim)
        cc, ss = c.to(a.dtype), s.to(a.dtype)
        turned = torch.stack((a * cc - b * ss, b * cc + a * ss), dim).flatten(-2).to(x.dtype)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    return rotate(q), rotate(k)


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, *, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """rope of the q and k in qkv (B, T, (H + 2 K) D), and a copy of its v: (B, H, T, D), twice (B, K, T, D)."""
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).transpose(1, 2)
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), 1)
    return *rope(q, k, cos, sin, positions=positions), v.clone()


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up  (Shazeer 2020, eq. 5).  gate, up: (..., F), any shape alike.  Returns gate's dtype.

    Without up, gate holds both: (..., 2 F), gate first.
    """
    if up is None:
        gate, up = gate.chunk(2, -1)
    return (F.silu(_statistics(gate)) * _statistics(up)).to(gate.dtype)


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2  (Hendrycks & Gimpel 2016, §2), torch's own."""
    return F.gelu(x, approximate="tanh")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(logits)[target] + z_loss * logsumexp(logits)^2 per row  (z-loss: Chowdhery et al. 2022, section 5).

    logits: (..., V).  target: (...), int64.  Rows whose target is ignore_index count neither in the loss nor in the
    mean; a batch with no other row gives 0.  label_smoothing: of the target, spread over all classes (Szegedy et al.
    2016, section 7).  class_weight: (V,), what each class counts; the mean is over the sum of the targets' own.
    Returns fp32 (fp64 for fp64): a scalar for "mean" and "sum", (...) for "none".
    """
    x = _statistics(logits)
    lse = torch.logsumexp(x, -1)
    kept = target != ignore_index
    index = target.masked_fill(~kept, 0)
    nll = lse - x.gather(-1, index[..., None]).squeeze(-1)
    loss = (1 - label_smoothing) * nll + z_loss * lse.square()
    weight = None if class_weight is None else class_weight.to(x.dtype)
    if weight is not None:
        loss = weight[index] * loss
    if label_smoothing > 0:
        each = lse[..., None] - x
        loss = loss + label_smoothing * (each if weight is None else weight * each).mean(-1)
    loss = loss.masked_fill(~kept, 0)
    if reduction != "mean":
        return loss if reduction == "none" else loss.sum()
    if weight is None:
        return loss.sum() / kept.sum().clamp(min=1)
    total = weight[index].masked_fill(~kept, 0).sum()
    return loss.sum() / total.masked_fill(total == 0, 1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    keep_gradients: bool | None = None,
) -> Tensor:
    """cross_entropy of x weight^T, with the logits in memory.

    x: (..., N).  weight: (V, N).  target: (...).  softcap c > 0 replaces a logit z by c tanh(z / c).
    keep_gradients changes when the kernels compute the gradients, nothing here.
    """
    logits = _statistics(F.linear(x, weight.to(x.dtype)))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(
        logits, target, ignore_index=ignore_index, z_loss=z_loss, label_smoothing=label_smoothing,
        class_weight=class_weight, reduction=reduction,
    )  # fmt: skip


def fp8_quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in an fp8 format, and the scale, (), fp32: the least power of two from 2^-126 on that keeps x in range.

    x: any shape, a float dtype.  Where it is not finite the scale is NaN.
    """
    amax = x.detach().abs().amax().float().clamp(min=2.0**-126)
    mantissa, exponent = torch.frexp(amax)  # in [0.5, 1)
    exponent = exponent + (mantissa > 0.875).int() - 1 - FP8_EXPONENTS[dtype]
    # by its bits: ldexp multiplies by a pow that need not be exact
    scale = (exponent.clamp(min=-126) + 127 << 23).view(torch.float32)
    return (_statistics(x.detach()) / scale).to(dtype), torch.where(amax.isfinite(), scale, torch.nan)


def fp8_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a b^T) scale_a scale_b of fp8 operands (M, K) and (N, K), summed in fp32 (fp64 for fp64), then rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # "meta" has no autocast
    with nullcontext() if a.device.type == "meta" else torch.autocast(a.device.type, enabled=False):
        return (a.to(wide) @ b.to(wide).T * (scale_a.to(wide) * scale_b.to(wide))).to(dtype)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = fp8_quantize(x, torch.float8_e4m3fn)
        w8, w_scale = fp8_quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.weight_dtype = weight.dtype
        return fp8_product(x8.flatten(0, -2), w8, x_scale, w_scale, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = fp8_quantize(dy.flatten(0, -2), torch.float8_e5m2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = fp8_product(g8, w8.T, g_scale, w_scale, dy.dtype).view_as(x8)
        if ctx.needs_input_grad[1]:
            dw = fp8_product(g8.T, x8.flatten(0, -2).T, g_scale, x_scale, ctx.weight_dtype)
        return dx, dw


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of operands rounded to fp8, forward and backward (Micikevicius et al. 2022): e4m3, and e5m2 for dy.

    x: (..., K).  weight: (N, K).  Returns (..., N) in x's dtype; dw has the weight's.
    """
    if x.numel() == 0:  # which has no largest magnitude
        return F.linear(x, weight.to(x.dtype))
    return _FP8Linear.apply(x, weight)
