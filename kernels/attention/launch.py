"""The launchers, as torch operators: rooflight::flash_attention_fwd and rooflight::flash_attention_bwd.

Both take a dense batch (q (B, H, T, D), k and v (B, K, S, D), lse (B, H, T)) or, with cu_seqlens, packed sequences
(q (total_q, H, D), k and v (total_k, K, D), lse (H, total_q)); one set of kernels reads either through its strides.
FLOPs follow rooflight.kernels.cost: visible pairs only, two products forward and five backward, where, as in torch's
own formula for scaled_dot_product_attention, the recomputed scores count once.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..cost import flash_attention_cost, flash_attention_varlen_cost
from ..dispatch import call, define_op
from . import paths
from .portable import tiles
from .portable.backward import (
    _flash_attention_bwd_dkdv_kernel,
    _flash_attention_bwd_dq_kernel,
    _flash_attention_delta_kernel,
)
from .portable.forward import _flash_attention_fwd_kernel

LOG2E = math.log2(math.e)


def _strides(x: Tensor, varlen: bool) -> tuple[int, ...]:
    """Strides as (b, h, row, d); packed sequences stand in the first dimension and have no batch stride."""
    if not varlen:
        return x.stride()
    if x.dim() == 2:  # (H, total)
        return (0, *x.stride())
    total, head, dim = x.stride()
    return 0, head, total, dim


def _sizes(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, max_q: int, max_k: int) -> tuple[int, int, int, int, int]:
    """(B, H, K, T, S), T and S those of the longest sequence."""
    if cu_seqlens_q is not None:
        return cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1], max_q, max_k
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """The short vectors that kernels index without a stride: sinks and cu_seqlens."""
    return [None if x is None else x.contiguous() for x in vectors]


def _statistic_like(q: Tensor, varlen: bool) -> Tensor:
    """One fp32 (fp64 for fp64) for each query row: (B, H, T), or (H, total)."""
    shape = (q.shape[1], q.shape[0]) if varlen else q.shape[:3]
    return q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _outputs(q: Tensor, varlen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the factor for the backward that undoes the rounding of lse: empty for fp16 and bf16, where p
    itself rounds to far less.
    """
    lse = _statistic_like(q, varlen)
    return torch.empty_like(q), lse, torch.empty_like(lse) if q.dtype.itemsize > 2 else lse.new_empty(0)


def _given(unround: Tensor) -> Tensor | None:
    return unround if unround.dim() > 1 else None


def _score_factors(scale: float, softcap: float) -> tuple[float | None, float]:
    """What a score is multiplied by inside tanh (None without softcap) and in the base-2 exponent."""
    return (scale / softcap, softcap * LOG2E) if softcap > 0 else (None, scale * LOG2E)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products are IEEE unless the caller opted into TF32 through torch's own switch."""
    opted = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if opted and torch.version.hip is None else "ieee"


def _takes_hopper(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, bounds: tuple[Any, ...], softcap: float, sinks: Tensor | None
) -> bool:
    """Whether the hopper path serves this call (paths.py): a backward pass where dout is given."""
    ends, left, right = bounds

    def obstacle() -> str | None:
        from .hopper import backward, forward

        if dout is None:
            return forward.supports(q, k, v, ends, softcap, sinks is not None)
        return backward.supports(q, k, v, dout, ends, softcap)

    used = {"window": left is not None or bool(right), "packed": ends is not None}
    used |= {"softcap": softcap > 0, "sinks": sinks is not None}
    return paths.choose("forward" if dout is None else "backward", q, k, obstacle, **used) == "hopper"


def _run(kernel: Any, name: str, q: Tensor, n_row: int, n_head: int, args: tuple[Any, ...]) -> None:
    """Launch one program for each tile of rows of each head; `name` "dkdv" walks keys, the others queries."""
    tile = tiles.choose(name, q.shape[-1], q.dtype, q.device)
    block = tile.block_n if name == "dkdv" else tile.block_m
    grid = (-(-n_row // block) * n_head,)
    if grid[0] == 0:
        return
    blocks: dict[str, Any] = {"HEAD_DIM": q.shape[-1], "BLOCK_D": tiles.block_d(q.shape[-1]), "BLOCK_M": tile.block_m}
    if name != "delta":
        blocks |= {"BLOCK_N": tile.block_n, "PRECISION": _precision(q.dtype)}
    # Triton 3.10 is to change the default of fused multiply-adds, and 3.9 warns of it
    kernel[grid](*args, **blocks, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


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
) -> tuple[Tensor, Tensor, Tensor]:
    varlen = cu_seqlens_q is not None
    B, H, K, T, S = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    out, lse, unround = _outputs(q, varlen)
    sinks, *ends = _contiguous(sinks, cu_seqlens_q, cu_seqlens_k)
    if _takes_hopper(q, k, v, None, (ends[0], left, right), softcap, sinks):
        from .hopper.forward import launch_forward

        launch_forward(q, k, v, out, lse, ends[0], ends[1], T, S, left, right, scale)
        return out, lse, unround
    strides = (_strides(x, varlen) for x in (q, k, v, out, lse))
    sizes = (H, K, T, S, left, right, *_score_factors(scale, softcap))
    tensors = (q, k, v, sinks, out, lse, _given(unround))
    _run(_flash_attention_fwd_kernel, "fwd", q, T, B * H, (*tensors, *ends, *strides, *sizes))
    return out, lse, unround


def _fake_fwd(q: Tensor, k: Any, v: Any, sinks: Any, cu_seqlens_q: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(q, cu_seqlens_q is not None)


def flash_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    unround: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    varlen = cu_seqlens_q is not None
    B, H, K, T, S = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    ends = _contiguous(cu_seqlens_q, cu_seqlens_k)
    if _takes_hopper(q, k, v, dout, (ends[0], left, right), softcap, sinks):
        from .hopper.backward import launch_backward

        delta = None if sinks is None else torch.empty_like(lse)
        inputs, grads = (q, k, v, out, dout, lse, dlse), (dq, dk, dv, delta)
        launch_backward(*inputs, *grads, ends[0], ends[1], T, S, left, right, scale)
        dsinks = q.new_empty(0) if sinks is None or delta is None else _sink_gradient(sinks, lse, delta, varlen)
        return dq, dk, dv, dsinks
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    sq, sk, sv, so, sdo, slse, sdq, sdk, sdv = (_strides(x, varlen) for x in (q, k, v, out, dout, lse, dq, dk, dv))
    sdlse = None if dlse is None else _strides(dlse, varlen)
    _run(
        _flash_attention_delta_kernel, "delta", q, T, B * H,
        (out, dout, lse, dlse, lse2, delta, None, None, ends[0], so, sdo, sdlse, slse, H, T, None),
    )  # fmt: skip
    sizes = (H, K, T, S, left, right, scale, *_score_factors(scale, softcap))
    inputs = (q, k, v, dout, lse2, delta, _given(unround))
    _run(
        _flash_attention_bwd_dkdv_kernel, "dkdv", q, S, B * K,
        (*inputs, dk, dv, *ends, sq, sk, sv, sdo, slse, sdk, sdv, *sizes),
    )  # fmt: skip
    _run(
        _flash_attention_bwd_dq_kernel, "dq", q, T, B * H,
        (*inputs, dq, *ends, sq, sk, sv, sdo, slse, sdq, *sizes),
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0) if sinks is None else _sink_gradient(sinks, lse, delta, varlen)


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, varlen: bool) -> Tensor:
    """dsink = -sum over rows of e^(sink - lse) delta: a softmax gradient whose value vector is zero."""
    sink = sinks.to(lse.dtype)[:, None]
    share = torch.exp(sink - lse).masked_fill_(lse == -math.inf, 0)
    return -(share * delta).sum(1 if varlen else (0, 2)).to(sinks.dtype)


def _fake_bwd(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, unround: Any, sinks: Any, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    q, k, v, out, *rest = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 12
        dout = out.new_zeros(()).expand_as(out)  # only the log-sum-exp was used
    dq, dk, dv, dsinks = call(bwd_op, dout, dlse, q, k, v, out, *rest, *ctx.options)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *(None,) * 8


bwd_op = define_op(flash_attention_bwd, _fake_bwd)
fwd_op = define_op(flash_attention_fwd, _fake_fwd, setup_context=_save, backward=_backward)


class FlashAttentionFunction(torch.autograd.Function):
    """apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, left, right, scale, softcap).

    Returns (out, lse): flash_attention without its checks, always in Triton. cu_seqlens None is a dense batch; left and
    right are how far a query sees from its own position, None without end.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = call(fwd_op, *inputs)
        _save(ctx, inputs, output)
        return output[:2]

    backward = staticmethod(_backward)


@register_flop_formula(fwd_op.overloadpacket, get_raw=True)
def _fwd_flops(q: Any, k: Any, v: Any, sinks: Any, *args: Any, **_: Any) -> int:
    return _flops(False, q, k, *args[:6])


@register_flop_formula(bwd_op.overloadpacket, get_raw=True)
def _bwd_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, unround: Any, sinks: Any, *args: Any, **kw: Any
) -> int:
    return _flops(True, q, k, *args[:6])
