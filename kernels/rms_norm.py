"""RMSNorm, optionally of a sum: y = h rstd (w + offset), h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps).

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4. With xhat = h rstd and g = (w + offset) dy:
dh = rstd (g - xhat mean(xhat g)) + dstream,  dw = sum over rows of dy xhat,  dx = dresidual = dh.

Forward: each program normalises a tile of rows; a row longer than one tile is read twice, the second time from L2.
Backward: a fixed number of programs stride over the rows. Each keeps its own fp32 sum of dw, a second kernel adds these
partial sums in a fixed order: no atomics, so the gradients are bitwise reproducible.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, reference
from .dispatch import call, check_device, check_dtype, define_op, refuse_transforms, runs_triton
from .launching import launch
from .rows import most_warps, multiprocessors, row_layout, statistics, tile_offsets

__all__ = ["RMSNormFunction", "rms_norm"]

# Elements of a tile of short rows: 16 a thread over 4 warps, two 16-byte loads of a 2-byte type.
SHORT_TILE = 2048
# The longest row that one tile holds; longer rows are looped over in tiles of LOOP_TILE. The largest sizes that compile
# for sm_80 and sm_90 without a spill (docs/artifacts.md).
FORWARD_TILE = 32768
BACKWARD_TILE = 8192
LOOP_TILE, LOOP_WARPS = 4096, 16
# Rows that the looped backward takes at once: its partial sums of dw go to memory and back once for all of them.
LOOP_ROWS = 4
# Warps of the backward's programs on one multiprocessor. All of them must be resident, at up to 128 registers a thread:
# each has the same share of the rows, so one that starts late ends late. 16 warps with 16 elements a thread have
# 32 KiB of h and dy on their way for each stage; a multiprocessor of an H200 needs 17 (bench/NOTES.md).
RESIDENT_WARPS = 16
# One program's tile of dw's partial sums: all of them for few columns, so that they are read in one go.
REDUCE_TILE, REDUCE_WARPS = 8192, 8

# ---------------------------------------------------------------- kernels


@triton.jit
def _load_scale(w_ptr, offset, cols, N, DTYPE: tl.constexpr):
    """w + offset (1, BLOCK_N); every row reads it, so it stays in L1."""
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
    return (w.to(DTYPE) + offset)[None, :]


@triton.jit
def _load_stream(
    x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, cols, mask, DTYPE: tl.constexpr, KEEP: tl.constexpr
):
    """h (ROWS, BLOCK_N): x, or x + residual rounded to the stream's dtype. KEEP: it will be read again."""
    KEPT: tl.constexpr = "evict_last" if KEEP else "evict_first"
    h = tl.load(x_ptr + tile_offsets(row, x_layout, cols), mask=mask, other=0.0, eviction_policy=KEPT).to(DTYPE)
    if residual_ptr is not None:
        at = residual_ptr + tile_offsets(row, residual_layout, cols)
        h += tl.load(at, mask=mask, other=0.0, eviction_policy=KEPT).to(DTYPE)
        h = h.to(stream_ptr.dtype.element_ty).to(DTYPE)
    return h


@triton.jit
def _store_normed(y_ptr, stream_ptr, w_ptr, offset, h, rstd, row, cols, mask, N, HAS_RESIDUAL: tl.constexpr):
    at = row.to(tl.int64)[:, None] * N + cols[None, :]
    y = h * rstd[:, None]
    if w_ptr is not None:
        y *= _load_scale(w_ptr, offset, cols, N, h.dtype)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_RESIDUAL:
        tl.store(stream_ptr + at, h.to(stream_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd_kernel(
    x_ptr, x_layout, residual_ptr, residual_layout, w_ptr, y_ptr, stream_ptr, rstd_ptr, M, N, eps, offset,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(M.dtype) * ROWS + tl.arange(0, ROWS)
    live = (row >= 0) & (row < M)  # row wraps below 0 when M is within a tile of 2^31
    cols = tl.arange(0, BLOCK_N)
    mask = live[:, None] & (cols < N)[None, :]
    h = _load_stream(x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, cols, mask, DTYPE, not ONE_TILE)
    squares = h * h
    if not ONE_TILE:
        for start in range(BLOCK_N, N, BLOCK_N):
            at = start + cols
            mask = live[:, None] & (at < N)[None, :]
            h = _load_stream(x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, at, mask, DTYPE, True)
            squares += h * h
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / N + eps)
    tl.store(rstd_ptr + row, rstd, mask=live)
    if ONE_TILE:
        _store_normed(y_ptr, stream_ptr, w_ptr, offset, h, rstd, row, cols, mask, N, residual_ptr is not None)
    else:
        for start in range(0, N, BLOCK_N):
            at = start + cols
            mask = live[:, None] & (at < N)[None, :]
            h = _load_stream(x_ptr, x_layout, residual_ptr, residual_layout, stream_ptr, row, at, mask, DTYPE, False)
            _store_normed(y_ptr, stream_ptr, w_ptr, offset, h, rstd, row, at, mask, N, residual_ptr is not None)


@triton.jit
def _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, scale, rstd, row, cols, mask, DTYPE: tl.constexpr):
    """xhat, dy and g = scale dy, each (ROWS, BLOCK_N)."""
    xhat = tl.load(h_ptr + tile_offsets(row, h_layout, cols), mask=mask, other=0.0).to(DTYPE) * rstd[:, None]
    dy = tl.load(dy_ptr + tile_offsets(row, dy_layout, cols), mask=mask, other=0.0).to(DTYPE)
    return xhat, dy, dy * scale if scale is not None else dy


@triton.jit
def _store_dh(dh_ptr, dstream_ptr, dstream_layout, xhat, g, mean, rstd, row, cols, mask, N, DTYPE: tl.constexpr):
    dh = (g - xhat * mean[:, None]) * rstd[:, None]
    if dstream_ptr is not None:
        dh += tl.load(dstream_ptr + tile_offsets(row, dstream_layout, cols), mask=mask, other=0.0).to(DTYPE)
    tl.store(dh_ptr + row.to(tl.int64)[:, None] * N + cols[None, :], dh.to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_bwd_kernel(
    h_ptr, h_layout, dy_ptr, dy_layout, dstream_ptr, dstream_layout, w_ptr, rstd_ptr, dh_ptr, partial_ptr, M, N, offset,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    if partial_ptr is not None:
        partial_ptr += program.to(tl.int64) * N  # this program's row of (programs, N)
    dw = tl.zeros((ROWS, BLOCK_N), DTYPE)
    # not in the loop, whose pipeline would fetch it for every row anew
    scale = _load_scale(w_ptr, offset, cols, N, DTYPE) if ONE_TILE and w_ptr is not None else None
    for tile in tl.range(program, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = (row >= 0) & (row < M)
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        if ONE_TILE:
            mask = live[:, None] & (cols < N)[None, :]
            xhat, dy, g = _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, scale, rstd, row, cols, mask, DTYPE)
            mean = tl.sum(xhat * g, axis=1) / N
            _store_dh(dh_ptr, dstream_ptr, dstream_layout, xhat, g, mean, rstd, row, cols, mask, N, DTYPE)
            dw += dy * xhat
        else:
            products = tl.zeros((ROWS, BLOCK_N), DTYPE)
            for start in range(0, N, BLOCK_N):
                at = start + cols
                mask = live[:, None] & (at < N)[None, :]
                part = _load_scale(w_ptr, offset, at, N, DTYPE) if w_ptr is not None else None
                xhat, dy, g = _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, part, rstd, row, at, mask, DTYPE)
                products += xhat * g
            mean = tl.sum(products, axis=1) / N
            tl.debug_barrier()  # other threads may have written the partial sums read below
            for start in range(0, N, BLOCK_N):
                at = start + cols
                mask = live[:, None] & (at < N)[None, :]
                part = _load_scale(w_ptr, offset, at, N, DTYPE) if w_ptr is not None else None
                xhat, dy, g = _load_pair(h_ptr, h_layout, dy_ptr, dy_layout, part, rstd, row, at, mask, DTYPE)
                _store_dh(dh_ptr, dstream_ptr, dstream_layout, xhat, g, mean, rstd, row, at, mask, N, DTYPE)
                if partial_ptr is not None:
                    seen = tl.load(partial_ptr + at, mask=at < N, other=0.0)
                    seen = tl.where(tile == program, 0.0, seen)  # the first row finds the memory uninitialised
                    tl.store(partial_ptr + at, seen + tl.sum(dy * xhat, axis=0), mask=at < N)
    if ONE_TILE and partial_ptr is not None:
        tl.store(partial_ptr + cols, tl.sum(dw, axis=0), mask=cols < N)


@triton.jit
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


@cache
def _tile(N: int, longest: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the warps that work on it."""
    columns = max(triton.next_power_of_2(N), 16)
    if columns > longest:
        return 1, LOOP_TILE, LOOP_WARPS
    rows = max(1, SHORT_TILE // columns)
    return rows, columns, min(max(rows * columns // 512, 4), most_warps())


@cache
def _backward_tile(N: int, many: bool, element_size: int) -> tuple[int, int, int, int]:
    """The backward's _tile, and how many tiles of rows its loop is ahead. many: rows for all multiprocessors."""
    rows, columns, warps = _tile(N, BACKWARD_TILE)
    if columns < N:
        rows = LOOP_ROWS if many else 1
        return rows, columns // rows, warps, 1
    # In fp32 the buffers for rows to come would not fit a small GPU, and two rows' not AMD's shared memory.
    return rows, columns, warps, 1 if element_size > 2 else 3 if most_warps() == 32 else 2


@cache
def _reduced_columns(N: int) -> int:
    """Columns of dw that one program sums: from a sector of memory, 32 bytes, to a line, for about 256 programs."""
    return min(32, max(8, triton.next_power_of_2(N) // 256))


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the stream x + residual (empty without a residual) and rstd (rows,)."""
    N = x.shape[-1]
    y, stream, rstd = _rms_norm_fwd_fake(x, weight, eps, residual, weight_offset)
    M = rstd.numel()
    if M == 0:
        return y, stream, rstd
    # With a residual a second row stands in registers.
    rows, columns, warps = _tile(N, FORWARD_TILE if residual is None else FORWARD_TILE // 2)
    x, x_layout = row_layout(x)
    residual_layout = None
    if residual is not None:
        residual, residual_layout = row_layout(residual)
    if weight is not None:
        weight = weight.contiguous()
    launch(
        _rms_norm_fwd_kernel, (-(-M // rows),),
        x, x_layout, residual, residual_layout, weight, y, stream, rstd, M, N, eps, weight_offset,
        ROWS=rows, BLOCK_N=columns, ONE_TILE=columns >= N, DTYPE=statistics(x.dtype)[1], num_warps=warps,
    )  # fmt: skip
    return y, stream, rstd


def rms_norm_bwd(
    dy: Tensor, dstream: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    needs_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dh, contiguous in h's dtype, and dw (empty unless needed)."""
    N, M = h.shape[-1], rstd.numel()
    dh, dw = _rms_norm_bwd_fake(dy, dstream, h, weight, rstd, weight_offset, needs_dw)
    if M == 0:
        return dh, dw.zero_()
    processors = multiprocessors(h.device)
    many = processors * 2 * LOOP_ROWS <= M
    rows, columns, warps, stages = _backward_tile(N, many, h.element_size())
    programs = min(-(-M // rows), processors * max(1, RESIDENT_WARPS // warps))
    h, h_layout = row_layout(h)
    dy, dy_layout = row_layout(dy)
    dstream_layout = None
    if dstream is not None:
        dstream, dstream_layout = row_layout(dstream)
    if weight is not None:
        weight = weight.contiguous()
    partial = torch.empty(programs, N, dtype=rstd.dtype, device=h.device) if needs_dw else None
    launch(
        _rms_norm_bwd_kernel, (programs,),
        h, h_layout, dy, dy_layout, dstream, dstream_layout, weight, rstd, dh, partial, M, N, weight_offset,
        ROWS=rows, BLOCK_N=columns, ONE_TILE=columns >= N, STAGES=stages, DTYPE=statistics(h.dtype)[1],
        num_warps=warps,
    )  # fmt: skip
    if partial is not None:
        columns = _reduced_columns(N)
        launch(
            _rms_norm_dw_kernel, (-(-N // columns),),
            partial, dw, programs, N, ROWS=REDUCE_TILE // columns, BLOCK_N=columns, num_warps=REDUCE_WARPS,
        )  # fmt: skip
    return dh, dw


def _rms_norm_fwd_fake(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    if residual is None:
        stream = x.new_empty(0)
    else:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        stream = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=statistics(stream.dtype)[0])
    return torch.empty_like(x, memory_format=torch.contiguous_format), stream, rstd


def _rms_norm_bwd_fake(
    dy: Tensor, dstream: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    needs_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dw = weight.new_empty(weight.shape) if needs_dw and weight is not None else h.new_empty(0)
    return torch.empty_like(h, memory_format=torch.contiguous_format), dw


def _fwd_flops(x: Any, weight: Any, eps: float, residual: Any, *args: Any, **kwargs: Any) -> int:
    M, N = _matrix(x)
    return cost.rms_norm_cost(M, N, residual=residual is not None, weight=weight is not None).flops


def _bwd_flops(dy: Any, dstream: Any, h: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    M, N = _matrix(h)
    return cost.rms_norm_cost(M, N, residual=dstream is not None, weight=weight is not None, backward=True).flops


def _matrix(shape: Any) -> tuple[int, int]:
    return torch.Size(shape[:-1]).numel(), shape[-1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual, ctx.weight_offset = inputs
    _, stream, rstd = output
    ctx.save_for_backward(x if residual is None else stream, weight, rstd)
    ctx.mark_non_differentiable(*((stream, rstd) if residual is None else (rstd,)))
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None = None, drstd: Tensor | None = None) -> Any:
    h, weight, rstd = ctx.saved_tensors
    needs_dx, needs_dw, _, needs_dresidual, _ = ctx.needs_input_grad
    if ctx.dtypes[1] is None:
        dstream = None  # of the empty output, whatever its gradient
    dh, dw = dstream, None
    if dy is not None:
        dh, dw = call(_bwd, dy, dstream, h, weight, rstd, ctx.weight_offset, needs_dw)
    dx = dh.to(ctx.dtypes[0]) if needs_dx and dh is not None else None
    dresidual = dh.to(ctx.dtypes[1]) if needs_dresidual and dh is not None else None
    return dx, dw if needs_dw else None, None, dresidual, None


_bwd = define_op(rms_norm_bwd, _rms_norm_bwd_fake, _bwd_flops)
_fwd = define_op(rms_norm_fwd, _rms_norm_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)

# ---------------------------------------------------------------- public


class RMSNormFunction(torch.autograd.Function):
    """apply(x, weight, eps, residual, weight_offset): rms_norm without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0] if inputs[3] is None else output[:2]

    backward = staticmethod(_backward)


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
    Raises ValueError on a shape, dtype or device mismatch and on eps <= 0.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., N) with N >= 1, got {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps: expected > 0, got {eps}")
    check_dtype("x", x)
    check_device(("x", x), ("weight", weight), ("residual", residual))
    if weight is not None:
        check_dtype("weight", weight)
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight: expected shape ({x.shape[-1]},), the last of x, got {tuple(weight.shape)}")
    if residual is not None:
        check_dtype("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not runs_triton(x):
        return reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    if torch.compiler.is_compiling():
        y, stream, _ = _fwd(x, weight, eps, residual, weight_offset)
        return y if residual is None else (y, stream)
    refuse_transforms("rms_norm")
    if not torch.is_grad_enabled():  # nothing to save
        y, stream, _ = call(_fwd, x, weight, eps, residual, weight_offset)
        return y if residual is None else (y, stream)
    return RMSNormFunction.apply(x, weight, eps, residual, weight_offset)
