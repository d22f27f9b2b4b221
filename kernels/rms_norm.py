"""RMSNorm, optionally of a sum: y = h rstd (w + offset), h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps).

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4. With xhat = h rstd and g = (w + offset) dy:
dh = rstd (g - xhat mean(xhat g)) + dstream,  dw = sum over rows of dy xhat,  dx = dresidual = dh.

kernels: rms_norm_kernels.py; their tiles: rms_norm_tiles.py.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import cost, dispatch, plain
from . import rms_norm_tiles as tiles
from .dispatch import (
    apply,
    bare_apply,
    call,
    check_device,
    check_dtype,
    check_number,
    checked_once,
    define_op,
    runs_triton,
)
from .known import Known, prepared
from .launching import TENSOR, Plan
from .rms_norm_kernels import (
    _rms_norm_bwd_kernel,
    _rms_norm_dw_kernel,
    _rms_norm_fwd_kernel,
    _rms_norm_mean_kernel,
)
from .rows import Layout, multiprocessors, row_layout, statistics

__all__ = ["RMSNormFunction", "rms_norm"]

# ---------------------------------------------------------------- launchers


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the stream x + residual (none without a residual) and rstd (rows,)."""
    x, layout = row_layout(x)
    residual, residual_layout = (None, None) if residual is None else row_layout(residual)
    weight = None if weight is None else weight.contiguous()
    y, stream, rstd = _rms_norm_fwd_fake(x, weight, eps, residual, weight_offset)
    if rstd.numel() > 0:
        N, widest = x.shape[-1], (y if stream is None else stream).element_size()
        plan = _forward_plan(
            rstd.numel(), N, x.dtype, widest, x.device, layout, residual_layout, eps, weight_offset,
            tiles.forward_tile(N, widest, residual is not None),
        )  # fmt: skip
        plan(x, residual, weight, y, stream, rstd)
    return y, stream, rstd


@lru_cache(maxsize=512)
def _forward_plan(
    M: int, N: int, dtype: torch.dtype, element_size: int, device: torch.device, x_layout: Layout,
    residual_layout: Layout | None, eps: float, weight_offset: float, tile: tiles.Tile,
) -> Plan:  # fmt: skip
    rows, columns, warps, stages, scale_first, once, _ = tile
    programs = -(-M // rows)
    if stages > 1:
        programs = min(
            programs, multiprocessors(device) * max(1, tiles.FORWARD_BYTES // (rows * columns * element_size))
        )
    return Plan(
        _rms_norm_fwd_kernel, (programs,),
        TENSOR, x_layout, TENSOR, residual_layout, *(TENSOR,) * 4, M, N, float(eps), float(weight_offset),
        ROWS=rows, BLOCK_N=columns, ONE_TILE=columns >= N, STAGES=stages, DTYPE=statistics(dtype)[1],
        SCALE_FIRST=columns >= N and (stages > 1 or scale_first), ONCE="evict_first" if once else "", num_warps=warps,
    )  # fmt: skip


def rms_norm_bwd(
    dy: Tensor, dstream: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    needs_dw: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dh, contiguous in h's dtype, and dw, where it is needed."""
    (h, h_layout), (dy, dy_layout) = row_layout(h), row_layout(dy)
    dstream, dstream_layout = (None, None) if dstream is None else row_layout(dstream)
    weight = None if weight is None else weight.contiguous()
    dh, dw = _rms_norm_bwd_fake(dy, dstream, h, weight, rstd, weight_offset, needs_dw)
    N, M = h.shape[-1], rstd.numel()
    if M == 0:
        return dh, None if dw is None else dw.zero_()
    tile = tiles.backward_tile(M, N, multiprocessors(h.device), h.dtype.itemsize, dstream is not None)
    programs, mean_plan, plan, dw_plan = _backward_plans(
        M, N, h.dtype, h.device, h_layout, dy_layout, dstream_layout, float(weight_offset), tile
    )
    mean = sums = None
    if mean_plan is not None:
        mean_plan(h, dy, weight, rstd, mean := torch.empty_like(rstd))
    if dw is not None:
        sums = torch.empty_strided((programs, N), (N, 1), dtype=rstd.dtype, device=h.device)
    plan(h, dy, dstream, weight, rstd, mean, dh, sums)
    if dw is not None:
        dw_plan(sums, dw)
    return dh, dw


@lru_cache(maxsize=512)
def _backward_plans(
    M: int, N: int, dtype: torch.dtype, device: torch.device, h_layout: Layout, dy_layout: Layout,
    dstream_layout: Layout | None, weight_offset: float, tile: tiles.Tile,
) -> tuple[int, Plan | None, Plan, Plan]:  # fmt: skip
    """Programs, each with partial sums of its own; the rows' means, where a row has several panels; dh; dw."""
    DTYPE = statistics(dtype)[1]
    rows, columns, warps, stages, *_, resident = tile
    panels = -(-N // columns)
    programs = max(1, min(-(-M // rows), multiprocessors(device) * max(1, resident // warps) // panels))
    mean_plan = Plan(
        _rms_norm_mean_kernel, (M,), TENSOR, h_layout, TENSOR, dy_layout, *(TENSOR,) * 3, N, weight_offset,
        BLOCK_N=tiles.LOOP_TILE, DTYPE=DTYPE, num_warps=tiles.LOOP_WARPS,
    )  # fmt: skip
    plan = Plan(
        _rms_norm_bwd_kernel, (programs, panels),
        TENSOR, h_layout, TENSOR, dy_layout, TENSOR, dstream_layout, *(TENSOR,) * 5, M, N, weight_offset,
        ROWS=rows, BLOCK_N=columns, HOLD_SCALE=columns <= tiles.BACKWARD_TILE, STAGES=stages, DTYPE=DTYPE,
        num_warps=warps,
    )  # fmt: skip
    columns = tiles.reduced_columns(N)
    dw_plan = Plan(
        _rms_norm_dw_kernel, (-(-N // columns),), TENSOR, TENSOR, programs, N,
        ROWS=tiles.REDUCE_ROWS, BLOCK_N=columns, num_warps=tiles.REDUCE_WARPS,
    )  # fmt: skip
    return programs, mean_plan if panels > 1 else None, plan, dw_plan


def _rms_norm_fwd_fake(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    stream, dtype = None, x.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
        stream = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = torch.empty_strided((math.prod(x.shape[:-1]),), (1,), dtype=statistics(dtype)[0], device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stream, rstd


def _rms_norm_bwd_fake(
    dy: Tensor, dstream: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    needs_dw: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dw = None
    if needs_dw and weight is not None:
        dw = torch.empty_strided(weight.shape, (1,), dtype=weight.dtype, device=h.device)
    return torch.empty_like(h, memory_format=torch.contiguous_format), dw


def _fwd_flops(x: Any, weight: Any, eps: float, residual: Any, *args: Any, **kwargs: Any) -> int:
    M, N = torch.Size(x[:-1]).numel(), x[-1]
    return cost.rms_norm_cost(M, N, residual=residual is not None, weight=weight is not None).flops


def _bwd_flops(dy: Any, dstream: Any, h: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    M, N = torch.Size(h[:-1]).numel(), h[-1]
    return cost.rms_norm_cost(M, N, residual=dstream is not None, weight=weight is not None, backward=True).flops


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, _, residual, weight_offset = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.options = weight_offset, None if residual is None else (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of the operator, which returns more than an eager call."""
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1 if ctx.options[1] is None else 2 :])


def _backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None = None, drstd: Tensor | None = None) -> Any:
    h, weight, rstd = ctx.saved_tensors
    weight_offset, dtypes = ctx.options
    needs_dx, needs_dw, _, needs_dresidual, *_ = ctx.needs_input_grad
    if dtypes is None:
        dstream = None  # of the empty output, whatever its gradient
    dh, dw = dstream, None
    if dy is not None:
        tensors = dy, dstream, h, weight, rstd
        run = _prepared_bwd(tiles.asked("backward"), *tensors, weight_offset, needs_dw)
        if run is None or torch.is_grad_enabled():
            dh, dw = call(_bwd, *tensors, weight_offset, needs_dw)
        else:
            dh, dw = run(*tensors)
    dx, dresidual = dh if needs_dx else None, dh if needs_dresidual else None
    if dtypes is not None:
        dx, dresidual = (x if x is None else x.to(to) for x, to in zip((dx, dresidual), dtypes, strict=True))
    return dx, dw if needs_dw else None, None, dresidual, None, None


@prepared
def _prepared_bwd(
    dy: Tensor, dstream: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    needs_dw: bool,
) -> Any:  # fmt: skip
    return Known(
        lambda dy, dstream, h, weight, rstd: rms_norm_bwd(dy, dstream, h, weight, rstd, weight_offset, needs_dw)
    )


_bwd = define_op(rms_norm_bwd, _rms_norm_bwd_fake, _bwd_flops)
_fwd = define_op(rms_norm_fwd, _rms_norm_fwd_fake, _fwd_flops, setup_context=_save_operator, backward=_backward)

# ---------------------------------------------------------------- public


class RMSNormFunction(torch.autograd.Function):
    """apply(x, weight, eps, residual, weight_offset): rms_norm without its checks, always in Triton."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float,
        run: Any = None,
    ) -> Any:  # fmt: skip
        """run: rms_norm_fwd of such tensors, where it is known."""
        if run is None:
            y, stream, rstd = call(_fwd, x, weight, eps, residual, weight_offset)
        else:
            y, stream, rstd = run(x, weight, residual)
        _save(ctx, (x, weight, eps, residual, weight_offset), (y, stream, rstd))
        return y if residual is None else (y, stream)

    backward = staticmethod(_backward)


def _check(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float
) -> tuple[float, float]:
    """eps and weight_offset, once everything is as rms_norm wants it."""
    check_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., N) with N >= 1, got {tuple(x.shape)}")
    eps, weight_offset = check_number("eps", eps), check_number("weight_offset", weight_offset)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected > 0 and finite, got {eps}")
    if weight is not None:
        check_dtype("weight", weight)
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight: expected shape ({x.shape[-1]},), the last of x, got {tuple(weight.shape)}")
    if residual is not None:
        check_dtype("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_device(("x", x), ("weight", weight), ("residual", residual))
    return eps, weight_offset


_checked = checked_once(_check)


@prepared
def _prepared(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float) -> Any:
    eps, weight_offset = _check(x, weight, eps, residual, weight_offset)
    if not runs_triton(x):
        return None
    return Known(lambda x, weight, residual: rms_norm_fwd(x, weight, eps, residual, weight_offset))


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset), h = x or x + residual (Zhang & Sennrich 2019, eq. 4).

    x: (..., N), fp32, fp16 or bf16, any strides (four or more leading dimensions that do not merge are copied).
    weight: (N,) of any of these dtypes, or None for 1.  residual: x's shape.  weight_offset: 1.0 for Gemma's 1 + w.
    Returns y, contiguous, of x's shape and dtype; with residual (y, x + residual), the sum in the promoted dtype,
    rounded before it is normalised.
    Statistics, dw's sums and every product are fp32; rstd is saved, fp32, one per row. No tensor given is written, and
    under autocast nothing is cast: y has x's dtype whatever the weight's.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors eager
    PyTorch. Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch, on eps <= 0 and on a tensor for a number.
    """
    run = _prepared(tiles.asked("forward"), x, weight, eps, residual, weight_offset)
    if run is not None:
        if torch.is_grad_enabled():
            return bare_apply(RMSNormFunction)(x, weight, eps, residual, weight_offset, run)
        y, stream, _ = run(x, weight, residual)
        return y if residual is None else (y, stream)
    eps, weight_offset = _checked(x, weight, eps, residual, weight_offset)
    if not runs_triton(x):
        return plain.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    if torch.compiler.is_compiling():
        y, stream, _ = _fwd(x, weight, eps, residual, weight_offset)
        return y if residual is None else (y, stream)
    if not (torch.is_grad_enabled() or dispatch.are_wrapped(x, weight, residual)):  # nothing to save
        dispatch.refuse_transforms("rms_norm")
        y, stream, _ = call(_fwd, x, weight, eps, residual, weight_offset)
        return y if residual is None else (y, stream)
    return apply("rms_norm", RMSNormFunction, x, weight, eps, residual, weight_offset)
