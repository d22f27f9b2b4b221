"""RMSNorm's kernels: y = h rstd (w + offset), h = x + residual, and its gradients (rms_norm.py has the mathematics).

Forward: each program normalises a tile of rows; a row longer than one tile is read twice, the second time from L2.
Backward: a fixed number of programs stride over the rows. Each keeps the fp32 sum of dw over its rows in registers, a
second kernel adds these partial sums in a fixed order: no atomics, so the gradients are bitwise reproducible. Of rows
longer than a tile a kernel before it computes mean(xhat g), so that a program can own a tile's columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import tile_offsets

__all__ = ["_rms_norm_bwd_kernel", "_rms_norm_dw_kernel", "_rms_norm_fwd_kernel", "_rms_norm_mean_kernel"]


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
