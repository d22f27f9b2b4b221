"""FlashAttention: softmax(scale q k^T + mask) v without the score matrix in memory (Dao 2023, FlashAttention-2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import apply, autocast_dtype, bare_apply, check_tensor, checked_once, in_layout_of, runs_triton
from .checks import Window, check_inputs, check_mask, check_sequences, check_slopes, check_types, reach, score_numbers
from .launch import FlashAttentionFunction, fwd_op
from .plain import scaled_dot_product, sdpa_serves
from .prepared import KnownAttention, find, state

__all__ = ["FlashAttentionFunction", "flash_attention", "flash_attention_varlen"]


_known = bare_apply(KnownAttention)
_autocasts_anywhere = torch._C._is_any_autocast_enabled


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside torch.autocast, the tensors in its dtype, as scaled_dot_product_attention takes them."""
    if not (torch.compiler.is_compiling() or _autocasts_anywhere()):
        return tensors
    for name, x in zip("qkv", tensors, strict=True):
        check_tensor(name, x)
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


@checked_once
def _checked(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, causal: bool, window: Window, scale: float | None,
    softcap: float, return_lse: bool, varlen: bool,
) -> tuple[int | None, int | None, float, float]:  # fmt: skip
    """How far a query sees to the left and right, scale and softcap, once everything fits."""
    check_types(q, k, v, sinks, return_lse)
    check_inputs(q, k, v, sinks, varlen=varlen)
    return *reach(causal, window), *score_numbers(scale, softcap, q.shape[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by the operator."""
    width = v.shape[-1]
    if width != q.shape[-1]:  # zeros add nothing to a score, nor to the output's first features
        widest = max(width, q.shape[-1])
        q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    if torch.compiler.is_compiling():
        out, lse, _ = fwd_op(q, k, v, *args)
    else:
        out, lse = apply("flash_attention", FlashAttentionFunction, q, k, v, *args)
    return out if width == out.shape[-1] else out[..., :width], lse


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v  (Dao 2023; grouped queries: Ainslie et al. 2023).

    q: (B, H, T, D).  k, v: (B, K, S, D), H a multiple of K, D up to 512; fp32, fp16 or bf16, one dtype and device, any
    strides. Returns (B, H, T, D) in q's dtype and memory layout. v's head size may be another: the kernels then run on
    copies filled up with zeros to the larger of the two, and the result is a view.

    Query i stands at key position p = i + S - T.
    causal: key j is visible when j <= p.
    scale: multiplies q k^T; 1 / sqrt(D) when None.
    window: (left, right) keeps p - left <= j <= p + right, None being no bound; an int w is (w, 0) when causal, else
        (w, w).
    softcap: c > 0 replaces a score s by c tanh(s / c), before the mask.
    sinks: (H,), one differentiable logit per head that joins the softmax's denominator (Xiao et al. 2024).
    return_lse: also return the log-sum-exp (B, H, T), fp32, natural log, sink included, differentiable.
    mask: bool, broadcasts to (B, H, T, S); a key is visible where it is true and causal and window let it be. No kernel
    reads one: with it the eager oracle runs, on every device, and the scores are in memory.
    alibi_slopes: (H,) or (B, H), fp32: slope s adds -s |p - j| to a score, after the softcap, before the mask (Press et
        al. 2022, section 3; `kernels.alibi_slopes` makes the standard ones). Constants, which get no gradient.

    A row with no visible key gives output 0, log-sum-exp -inf (the sink's value with sinks) and zero gradients.
    Products accumulate in fp32; fp32 inputs are multiplied in IEEE precision unless
    torch.backends.cuda.matmul.fp32_precision is "tf32". The backward is bitwise deterministic; a second derivative and
    torch.func transforms raise NotImplementedError.
    Inside torch.autocast q, k and v are cast to its dtype.

    CUDA tensors run the Triton kernels, CPU tensors the same kernels under TRITON_INTERPRET=1 (fp64 too), and else
    torch's scaled_dot_product_attention where it has the semantics, or the same operator in eager fp32 products
    (docs/semantics.md).

    Raises ValueError on a shape, dtype or device mismatch, on D or H out of range, on a scale <= 0, a softcap < 0 or a
    window < 0, and on a tensor where a number is expected: it would receive no gradient.
    """
    q, k, v = _autocast(q, k, v)
    if mask is None and alibi_slopes is None:
        found = find(state(), q, k, v, sinks, causal, window, scale, softcap, return_lse)
        if found is not None:
            return _known(q, k, v, found) if torch.is_grad_enabled() else found[0](q, k, v)[0]
    left, right, scale, softcap = _checked(q, k, v, sinks, causal, window, scale, softcap, return_lse, False)
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, q.shape[0])
    if mask is not None:
        return _masked(q, k, v, mask, causal, scale, window, softcap, sinks, return_lse, alibi_slopes)
    biased = softcap != 0 or sinks is not None or alibi_slopes is not None
    plain = left is None and right in (None, 0) and not (biased or return_lse)
    if plain and not runs_triton(q) and sdpa_serves(q, k, right == 0):
        return scaled_dot_product(q, k, v, right == 0, scale)
    out, lse = _attend(q, k, v, sinks, None, None, q.shape[2], k.shape[2], left, right, scale, softcap, alibi_slopes)
    return (out, lse) if return_lse else out


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, scale: float, window: Window, softcap: float,
    sinks: Tensor | None, return_lse: bool, alibi_slopes: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle, on fp32 copies where the inputs are narrower."""
    check_mask(mask, q, k)
    wide = (x.float() if x.dtype.itemsize < 4 else x for x in (q, k, v))
    out, lse = reference.flash_attention(
        *wide, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks, return_lse=True, mask=mask,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out = out.to(q.dtype)
    if out.shape == q.shape:
        out = in_layout_of(q, out)
    return (out, lse) if return_lse else out


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
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attention over packed sequences: sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1.

    q: (total_q, H, D).  k, v: (total_k, K, D).  cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32, rising from 0 to
    the total or less.  max_seqlen_q, max_seqlen_k: at least the longest length.  alibi_slopes: (H,) or (sequences, H).
    Everything else as flash_attention, each sequence by itself. Returns (total_q, H, D), and with return_lse also the
    log-sum-exp (H, total_q). Rows past the last sequence are padding: output 0, log-sum-exp -inf, zero gradients.

    Raises ValueError as flash_attention does, and on cu_seqlens or max_seqlen that do not fit; the values of cu_seqlens
    are checked on the CPU alone, since reading them from a GPU would stall it in every call: there rows of a sequence
    past max_seqlen are left out as padding is.
    """
    q, k, v = _autocast(q, k, v)
    left, right, scale, softcap = _checked(q, k, v, sinks, causal, window, scale, softcap, return_lse, True)
    max_seqlen_q = check_sequences("q", cu_seqlens_q, max_seqlen_q, q)
    max_seqlen_k = check_sequences("k", cu_seqlens_k, max_seqlen_k, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: expected cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, got {tuple(cu_seqlens_k.shape)}"
        )
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, cu_seqlens_q.shape[0] - 1)
    options = (max_seqlen_q, max_seqlen_k, left, right, scale, softcap, alibi_slopes)
    out, lse = _attend(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *options)
    return (out, lse) if return_lse else out
