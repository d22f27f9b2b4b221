"""The operators rooflight::flash_attention_fwd and rooflight::flash_attention_bwd: which path's launcher serves a call.

Both take a dense batch (q (B, H, T, D), k and v (B, K, S, D), lse (B, H, T)) or, with cu_seqlens, packed sequences
(q (total_q, H, D), k and v (total_k, K, D), lse (H, total_q)). paths.py chooses; what the hopper path cannot do on
this machine after all goes to the portable one.
FLOPs follow rooflight.kernels.cost: visible pairs only, two products forward and five backward, where, as in torch's
own formula for scaled_dot_product_attention, the recomputed scores count once.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..cost import flash_attention_cost, flash_attention_varlen_cost
from ..dispatch import call, define_op, runs_triton
from ..tiled import tiled_attention, tiled_attention_backward
from . import padding, paths, plain
from .checks import check_bounds
from .portable import launch as portable
from .portable.launch import Problem


def _statistic_like(q: Tensor, varlen: bool) -> Tensor:
    """One fp32 (fp64 for fp64) for each query row: (B, H, T), or (H, total). For kernels each head's rows start at a
    multiple of 64 bytes, so that loads of them are vectors and kernels the same whatever T.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not runs_triton(q):
        return torch.empty((q.shape[1], q.shape[0]) if varlen else q.shape[:3], dtype=dtype, device=q.device)
    if varlen:
        total, H, _ = q.shape
        return torch.empty_strided((H, total), (-(-total // 16) * 16, 1), dtype=dtype, device=q.device)
    B, H, T, _ = q.shape
    n_row = -(-T // 16) * 16
    return torch.empty_strided((B, H, T), (H * n_row, n_row, 1), dtype=dtype, device=q.device)


def outputs_like(q: Tensor, varlen: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse, and the factor for the backward that undoes the rounding of lse: None for fp16 and bf16, where p itself
    rounds to far less.
    """
    unround = _statistic_like(q, varlen) if q.dtype.itemsize > 2 else None
    return torch.empty_like(q), _statistic_like(q, varlen), unround


def _given(unround: Tensor | None) -> Tensor | None:
    """Of what the operator returns, where None is an empty tensor: a checkpoint counts what either saves."""
    return None if unround is None or unround.dim() == 1 else unround


def _problem(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_q: int, max_k: int, *rest: Any
) -> Problem:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return Problem(q.shape[2], k.shape[2], None, None, *rest)
    if cu_seqlens_q.device.type == "cpu":  # on a GPU reading them would stall the stream in every call
        check_bounds("q", cu_seqlens_q, max_q, q.shape[0])
        check_bounds("k", cu_seqlens_k, max_k, k.shape[0])
    return Problem(max_q, max_k, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *rest)


@cache
def _hopper(pass_: str) -> ModuleType:
    from .hopper import backward, forward

    return forward if pass_ == "forward" else backward


def _by_hopper(pass_: str, asked: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    """Whether the hopper path did it: its launch_forward or launch_backward of `args`, where it supports(*asked)."""
    try:
        hopper = _hopper(pass_)
        if (why := hopper.supports(*asked)) is None:
            getattr(hopper, f"launch_{pass_}")(*args)
            return True
    except Exception as error:
        paths.give_up(pass_, error)
    else:
        paths.step_back(why)
    return False


def _path(pass_: str, q: Tensor, k: Tensor, p: Problem, sinks: Tensor | None) -> str:
    windowed = p.left is not None or bool(p.right)
    used = (
        windowed, p.ends_q is not None, p.softcap > 0, sinks is not None, p.slopes is not None, p.T < paths.SHORT
    )  # fmt: skip
    return paths.choose(pass_, q, k, used)


def flash_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    out, lse, unround = outputs_like(q, cu_seqlens_q is not None)
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    p = _problem(q, k, *bounds, left, right, scale, softcap, alibi_slopes)
    if not runs_triton(q):
        plain.launch_forward(q, k, v, sinks, out, lse, p)
        return out, lse, unround
    seen = (p.ends_q, p.ends_k, p.T, p.S, left, right, scale)
    if not (
        _path("forward", q, k, p, sinks) == "hopper"
        and _by_hopper("forward", (q, k, v, p.ends_q, softcap, sinks is not None), (q, k, v, out, lse, *seen))
    ):
        sinks = None if sinks is None else sinks.contiguous()
        portable.launch_forward(q, k, v, sinks, out, lse, unround, p)
    if p.ends_q is not None:
        padding.clear(p, (out, lse, -math.inf))
    return out, lse, unround


def _fake_fwd(q: Tensor, k: Any, v: Any, sinks: Any, cu_seqlens_q: Any, *args: Any) -> Any:
    return outputs_like(q, cu_seqlens_q is not None)


def flash_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    unround: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    p = _problem(q, k, *bounds, left, right, scale, softcap, alibi_slopes)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = None
    if sinks is not None:
        delta = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device)
    if not runs_triton(q):
        plain.launch_backward(q, k, v, dout, dlse, sinks, dq, dk, dv, delta, p)
        if sinks is None or delta is None:
            return dq, dk, dv, None
        return dq, dk, dv, _sink_gradient(sinks, lse, delta, p.ends_q is not None)
    seen = (p.ends_q, p.ends_k, p.T, p.S, left, right, scale)
    written = (q, k, v, out, dout, lse, dlse, dq, dk, dv, delta, *seen)
    if not (
        _path("backward", q, k, p, sinks) == "hopper"
        and _by_hopper("backward", (q, k, v, dout, p.ends_q, softcap), written)
    ):
        delta = portable.launch_backward(q, k, v, out, dout, lse, dlse, _given(unround), dq, dk, dv, p)
    if p.ends_q is not None:
        padding.clear(p, (dq, None if sinks is None else delta, 0.0), (dk, dv))
    if sinks is None or delta is None:
        return dq, dk, dv, None
    return dq, dk, dv, _sink_gradient(sinks, lse, delta, cu_seqlens_q is not None)


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, varlen: bool) -> Tensor:
    """dsink = -sum over rows of e^(sink - lse) delta: a softmax gradient whose value vector is zero."""
    sink = sinks.to(lse.dtype)[:, None]
    share = torch.exp(sink - lse).masked_fill_(lse == -math.inf, 0)
    return -(share * delta).sum(1 if varlen else (0, 2)).to(sinks.dtype)


def _fake_bwd(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, unround: Any, sinks: Any, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dsinks = None if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _flops(
    backward: bool, q: Any, k: Any, ends_q: Any, ends_k: Any, max_q: int, max_k: int, left: Any, right: Any
) -> int:
    """FLOPs of one pass, by rooflight.kernels.cost."""
    window = sys.maxsize if left is None else left, sys.maxsize if right is None else right
    H, K, D = q.shape[1], k.shape[1], q.shape[-1]
    if ends_q is None:
        B, T, S = q.shape[0], q.shape[2], k.shape[2]
        return flash_attention_cost(B, H, K, T, S, D, False, window, q.dtype, backward=backward).flops
    seqlens_q, seqlens_k = _lengths(ends_q, max_q), _lengths(ends_k, max_k)
    return flash_attention_varlen_cost(seqlens_q, seqlens_k, H, K, D, False, window, q.dtype, backward=backward).flops


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Sequence lengths; all of them the longest where cu_seqlens has no values (fake tensors)."""
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type != "meta":
        return cu_seqlens.diff().tolist()
    return [longest] * (cu_seqlens.shape[0] - 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *options = inputs
    ctx.options = options[:6]
    slopes = options[6] if len(options) > 6 else None
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens_q, cu_seqlens_k, slopes)
    ctx.set_materialize_grads(False)


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Of the operator, which returns more than an eager call."""
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    q, k, v, out, *rest, slopes = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 13
        dout = out.new_zeros(()).expand_as(out)  # only the log-sum-exp was used
    dq, dk, dv, dsinks = call(bwd_op, dout, dlse, q, k, v, out, *rest, *ctx.options, slopes)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *(None,) * 9


bwd_op = define_op(flash_attention_bwd, _fake_bwd)
fwd_op = define_op(flash_attention_fwd, _fake_fwd, setup_context=_save_operator, backward=_backward)


class FlashAttentionFunction(torch.autograd.Function):
    """apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, left, right, scale, softcap).

    Returns (out, lse): flash_attention without its checks, always in Triton. cu_seqlens None is a dense batch; left and
    right are how far a query sees from its own position, None without end. alibi_slopes may follow.

    apply(q, k, v, is_causal=False) returns out alone, with q of shape (B, H, T, D) or (B, T, D), and saves a
    log-sum-exp of shape (B, H, T) or (B, T). On plain CPU tensors it runs rooflight.kernels.tiled's loops.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        if len(inputs) <= 4:
            return _short_forward(ctx, *inputs)
        out, lse, unround = call(fwd_op, *inputs)
        _save(ctx, inputs, (out, lse, _given(unround)))
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _short_backward(ctx, *gradients) if len(gradients) == 1 else _backward(ctx, *gradients)


def _short_forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    q4, k4, v4 = (x[:, None] if x.dim() == 3 else x for x in (q, k, v))  # (B, heads, T, D)
    scale = q.shape[-1] ** -0.5
    if runs_triton(q):
        ctx.options = (q4.shape[2], k4.shape[2], None, 0 if is_causal else None, scale, 0.0)
        out, lse, unround = call(fwd_op, q4, k4, v4, None, None, None, *ctx.options)
    else:
        ctx.options = (is_causal, scale)
        out, lse = tiled_attention(*_grouped(q4, k4, v4), *ctx.options)
        out, lse, unround = out.flatten(1, 2), lse.flatten(1, 2), None
    if q.dim() == 3:
        out, lse = out[:, 0], lse[:, 0]
    ctx.save_for_backward(q, k, v, out, lse, _given(unround))
    return out


def _short_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *saved, unround = ctx.saved_tensors
    shape = saved[0].shape
    if len(shape) == 3:
        dout, *saved = (x[:, None] for x in (dout, *saved))
    q, k, v, out, lse = saved
    if runs_triton(q):
        gradients = call(bwd_op, dout, None, q, k, v, out, lse, unround, None, None, None, *ctx.options)[:3]
    else:
        H, K = q.shape[1], k.shape[1]
        dout, out, lse = (x.unflatten(1, (K, H // K)) for x in (dout, out, lse))
        q, k, v = _grouped(q, k, v)
        gradients = (x.flatten(1, 2) for x in tiled_attention_backward(dout, q, k, v, out, lse, *ctx.options))
    return *(x[:, 0] if len(shape) == 3 else x for x in gradients), None


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, K, H / K, T, D), k and v (B, K, 1, S, D): heads that share keys side by side."""
    return q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]


@register_flop_formula(fwd_op.overloadpacket, get_raw=True)
def _fwd_flops(q: Any, k: Any, v: Any, sinks: Any, *args: Any, **_: Any) -> int:
    return _flops(False, q, k, *args[:6])


@register_flop_formula(bwd_op.overloadpacket, get_raw=True)
def _bwd_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, unround: Any, sinks: Any, *args: Any, **kw: Any
) -> int:
    return _flops(True, q, k, *args[:6])
