"""RMSNorm, optionally of a sum: y = h rstd (w + offset), h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps).

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4. With xhat = h rstd and g = (w + offset) dy:
dh = rstd (g - xhat mean(xhat g)) + dstream,  dw = sum over rows of dy xhat,  dx = dresidual = dh.

Forward: each program normalises a tile of rows; a row longer than one tile is read twice, the second time from L2.
Backward: a fixed number of programs stride over the rows. Each keeps the fp32 sum of dw over its rows in registers, a
second kernel adds these partial sums in a fixed order: no atomics, so the gradients are bitwise reproducible. Of rows
longer than a tile a kernel before it computes mean(xhat g), so that a program can own a tile's columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, dispatch, reference
from . import rms_norm_tiles as tiles
from .dispatch import apply, call, check_device, check_dtype, check_number, checked_once, define_op, runs_triton
from .launching import TENSOR, Plan
from .rows import Layout, multiprocessors, row_layout, statistics, tile_offsets

__all__ = ["RMSNormFunction", "rms_norm"]

# ---------------------------------------------------------------- kernels


@triton.jit
def _load_scale(w_ptr, offset, cols, N, DTYPE: tl.constexpr):
    """w + offset (1, BLOCK_N); every row reads it, so it stays in L1. A pipelined loop would fetch it for each anew."""
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
    return (w.to(DTYPE) + offset)[None, :]


@triton.jit
def _load_h(
    x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, cols, mask, DTYPE: tl.constexpr, KEPT: tl.constexpr
):
    """h (ROWS, BLOCK_N): x, or x + residual rounded to the stream's dtype. KEPT: a policy of eviction."""
    h = tl.load(x_ptr + tile_offsets(row, x_layout, cols), mask=mask, other=0.0, eviction_policy=KEPT).to(DTYPE)
    if residual_ptr is not None:
        at = residual_ptr + tile_offsets(row, residual_layout, cols)
        h += tl.load(at, mask=mask, other=0.0, eviction_policy=KEPT).to(DTYPE)
        h = h.to(stream_ptr.dtype.element_ty).to(DTYPE)
    return h


@triton.jit
def _store_normed(y_ptr, stream_ptr, scale, h, rstd, row, cols, mask, N, HAS_RESIDUAL: tl.constexpr):
    at = row.to(tl.int64)[:, None] * N + cols[None, :]
    y = h * rstd[:, None]
    if scale is not None:
        y *= scale
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_RESIDUAL:
        tl.store(stream_ptr + at, h.to(stream_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd_kernel(
    x_ptr, x_layout, residual_ptr, residual_layout, w_ptr, y_ptr, stream_ptr, rstd_ptr, M, N, eps, offset,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    SCALE_FIRST: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    held = _load_scale(w_ptr, offset, cols, N, DTYPE) if w_ptr is not None and SCALE_FIRST else None
    for tile in tl.range(tl.program_id(0), (M - 1) // ROWS + 1, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = (row >= 0) & (row < M)  # row wraps below 0 when M is within a tile of 2^31
        mask = live[:, None] & (cols < N)[None, :]
        KEPT: tl.constexpr = ONCE if ONE_TILE else "evict_last"
        h = _load_h(x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, cols, mask, DTYPE, KEPT)
        squares = h * h
        if not ONE_TILE:
            for start in range(BLOCK_N, N, BLOCK_N):
                at = start + cols
                mask = live[:, None] & (at < N)[None, :]
                h = _load_h(
                    x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, at, mask, DTYPE, "evict_last"
                )
                squares += h * h
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / N + eps)
        tl.store(rstd_ptr + row, rstd, mask=live)
        if ONE_TILE:
            scale = held if SCALE_FIRST or w_ptr is None else _load_scale(w_ptr, offset, cols, N, DTYPE)
            _store_normed(y_ptr, stream_ptr, scale, h, rstd, row, cols, mask, N, residual_ptr is not None)
        else:
            for start in range(0, N, BLOCK_N):
                at = start + cols
                mask = live[:, None] & (at < N)[None, :]
                h = _load_h(x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, at, mask, DTYPE, ONCE)
                scale = _load_scale(w_ptr, offset, at, N, DTYPE) if w_ptr is not None else None
                _store_normed(y_ptr, stream_ptr, scale, h, rstd, row, at, mask, N, residual_ptr is not None)


@triton.jit
def _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, scale, rstd, row, cols, mask, DTYPE: tl.constexpr):
    """xhat, dy and g = scale dy, each (ROWS, BLOCK_N)."""
    xhat = tl.load(h_ptr + tile_offsets(row, h_layout, cols), mask=mask, other=0.0).to(DTYPE) * rstd[:, None]
    dy = tl.load(dy_ptr + tile_offsets(row, dy_layout, cols), mask=mask, other=0.0).to(DTYPE)
    return xhat, dy, dy * scale if scale is not None else dy


@triton.jit
def _rms_norm_mean_kernel(
    h_ptr, h_layout, dy_ptr, dy_layout, w_ptr, rstd_ptr, mean_ptr, N, offset,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """mean (M,) of xhat g along rows longer than the backward's tile; a program a row."""
    row = tl.program_id(0) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((1, BLOCK_N), DTYPE)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        scale = _load_scale(w_ptr, offset, cols, N, DTYPE) if w_ptr is not None else None
        mask = (cols < N)[None, :]
        xhat, _dy, g = _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, scale, rstd, row, cols, mask, DTYPE)
        products += xhat * g
    tl.store(mean_ptr + row, tl.sum(products, axis=1) / N)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_bwd_kernel(
    h_ptr, h_layout, dy_ptr, dy_layout, dstream_ptr, dstream_layout, w_ptr, rstd_ptr, mean_ptr, dh_ptr, partial_ptr,
    M, N, offset,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, HOLD_SCALE: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dh and partial sums of dw (programs, N); program (i, j) takes every so many rows of the j-th tile of columns."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros((ROWS, BLOCK_N), DTYPE)
    held = _load_scale(w_ptr, offset, cols, N, DTYPE) if w_ptr is not None and HOLD_SCALE else None
    tiles = (M - 1) // ROWS + 1
    for step in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        tile = step if mean_ptr is None else tiles - 1 - step  # the mean kernel left the last rows in L2
        row = tile * ROWS + tl.arange(0, ROWS)
        live = (row >= 0) & (row < M)
        mask = live[:, None] & (cols < N)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        scale = held
        if w_ptr is not None and not HOLD_SCALE:
            scale = tl.zeros((1, BLOCK_N), DTYPE)
            if tile >= 0:  # always: no pipeline takes a load out of a branch, and L1 has it
                scale = _load_scale(w_ptr, offset, cols, N, DTYPE)
        xhat, dy, g = _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, scale, rstd, row, cols, mask, DTYPE)
        dw += dy * xhat
        mean = tl.sum(xhat * g, axis=1) / N if mean_ptr is None else tl.load(mean_ptr + row, mask=live, other=0.0)
        dh = (g - xhat * mean[:, None]) * rstd[:, None]
        if dstream_ptr is not None:
            dh += tl.load(dstream_ptr + tile_offsets(row, dstream_layout, cols), mask=mask, other=0.0).to(DTYPE)
        tl.store(dh_ptr + row.to(tl.int64)[:, None] * N + cols[None, :], dh.to(dh_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * N + cols, tl.sum(dw, axis=0), mask=cols < N)


@triton.jit(do_not_specialize=["PROGRAMS"])
def _rms_norm_dw_kernel(partial_ptr, dw_ptr, PROGRAMS, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """dw (N,) from its partial sums (PROGRAMS, N), always added in the same order."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), partial_ptr.dtype.element_ty)
    for start in range(0, PROGRAMS, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < PROGRAMS)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=cols < N)


# ---------------------------------------------------------------- launchers


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the stream x + residual (none without a residual) and rstd (rows,)."""
    N = x.shape[-1]
    y, stream, rstd = _rms_norm_fwd_fake(x, weight, eps, residual, weight_offset)
    M = rstd.shape[0]
    if M == 0:
        return y, stream, rstd
    x, x_layout = row_layout(x)
    residual, residual_layout = (None, None) if residual is None else row_layout(residual)
    weight = None if weight is None else weight.contiguous()
    element_size = (x if stream is None else stream).dtype.itemsize
    tile = tiles.forward_tile(N, element_size, residual is not None)
    plan = _forward_plan(M, N, x.dtype, element_size, x.device, x_layout, residual_layout, eps, weight_offset, tile)
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
    N, M = h.shape[-1], rstd.numel()
    dh, dw = _rms_norm_bwd_fake(dy, dstream, h, weight, rstd, weight_offset, needs_dw)
    if M == 0:
        return dh, None if dw is None else dw.zero_()
    h, h_layout = row_layout(h)
    dy, dy_layout = row_layout(dy)
    dstream, dstream_layout = (None, None) if dstream is None else row_layout(dstream)
    weight = None if weight is None else weight.contiguous()
    tile = tiles.backward_tile(M, N, multiprocessors(h.device), h.dtype.itemsize, dstream is not None)
    programs, mean_plan, plan, dw_plan = _backward_plans(
        M, N, h.dtype, h.device, h_layout, dy_layout, dstream_layout, float(weight_offset), tile
    )
    mean = None
    if mean_plan is not None:
        mean_plan(h, dy, weight, rstd, mean := torch.empty_like(rstd))
    partial = torch.empty_strided((programs, N), (N, 1), dtype=rstd.dtype, device=h.device) if dw is not None else None
    plan(h, dy, dstream, weight, rstd, mean, dh, partial)
    if partial is not None:
        dw_plan(partial, dw)
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
    x, weight, _, residual, ctx.weight_offset = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.dtypes = None if residual is None else (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of the operator, which returns more than an eager call."""
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1 if ctx.dtypes is None else 2 :])


def _backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None = None, drstd: Tensor | None = None) -> Any:
    h, weight, rstd = ctx.saved_tensors
    needs_dx, needs_dw, _, needs_dresidual, _ = ctx.needs_input_grad
    if ctx.dtypes is None:
        dstream = None  # of the empty output, whatever its gradient
    dh, dw = dstream, None
    if dy is not None:
        dh, dw = call(_bwd, dy, dstream, h, weight, rstd, ctx.weight_offset, needs_dw)
    dx, dresidual = (dh if needs else None for needs in (needs_dx, needs_dresidual))
    if ctx.dtypes is not None:
        dx, dresidual = (x if x is None else x.to(to) for x, to in zip((dx, dresidual), ctx.dtypes, strict=True))
    return dx, dw if needs_dw else None, None, dresidual, None


_bwd = define_op(rms_norm_bwd, _rms_norm_bwd_fake, _bwd_flops)
_fwd = define_op(rms_norm_fwd, _rms_norm_fwd_fake, _fwd_flops, setup_context=_save_operator, backward=_backward)

# ---------------------------------------------------------------- public


class RMSNormFunction(torch.autograd.Function):
    """apply(x, weight, eps, residual, weight_offset): rms_norm without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0] if inputs[3] is None else output[:2]

    backward = staticmethod(_backward)


@checked_once
def _checked(
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
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors the eager
    oracle. Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch, on eps <= 0 and on a tensor for a number.
    """
    eps, weight_offset = _checked(x, weight, eps, residual, weight_offset)
    if not runs_triton(x):
        result = reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
        return result.contiguous() if isinstance(result, Tensor) else (result[0].contiguous(), result[1].contiguous())
    if torch.compiler.is_compiling():
        y, stream, _ = _fwd(x, weight, eps, residual, weight_offset)
        return y if residual is None else (y, stream)
    if not (torch.is_grad_enabled() or dispatch.are_wrapped(x, weight, residual)):  # nothing to save
        dispatch.refuse_transforms("rms_norm")
        y, stream, _ = call(_fwd, x, weight, eps, residual, weight_offset)
        return y if residual is None else (y, stream)
    return apply("rms_norm", RMSNormFunction, x, weight, eps, residual, weight_offset)
