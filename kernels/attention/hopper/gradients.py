"""How the Hopper backward writes its gradients: rows of dk and dv, and dq's fp32 accumulator and what rounds it to dq.

The accumulator holds row tiles of BLOCK_M queries, (H, row tiles, BLOCK_M * D), sequence after sequence. A row tile has
two parts, one from each warpgroup: the halves of its columns, or for BLOCK_M = 128 of its rows. A part stands in the
order in which a warpgroup's threads hold a (64, COLS) product: a thread's values in groups of four, side by side with
its neighbours', so that a warp writes 512 contiguous bytes with one instruction, to shared memory without a conflict.
To TMA the accumulator is a matrix of LINE numbers a row, one row of shared memory's swizzle, and a row tile one box.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...launching import TENSOR, Plan
from .. import blocks
from ..blocks import first_row_tile, head_pointer, sequence, store_tile
from .blocks import gl, gluon

gluon_head_pointer = gluon.jit(blocks.head_pointer.fn)


@gluon.jit
def to_fragments(x, COLS: gl.constexpr):
    """A (64, COLS) accumulator flat, each thread's registers in groups of four: no data moves."""
    x = gl.reshape(x, [4, 2, 8, COLS // 8, 4, 2])  # warp, half, row, column, lane, pair
    return gl.reshape(gl.permute(x, [3, 0, 2, 4, 1, 5]), [64 * COLS])


@gluon.jit
def programs_before(first, m, left, T, S, BLOCK_N: gl.constexpr):
    """How many programs add to the row tile from query m before the program of keys first ..: those to its left."""
    n = first // BLOCK_N
    if left is not None:  # less the tiles of keys that none of these rows sees
        n -= gl.maximum(m + S - T - left, 0) // BLOCK_N
    return n


@gluon.jit
def store_rows(ptr, strides, b, h, start, first, length, tile, layout: gl.constexpr):
    """Rows first .. of a head, those below `length`."""
    rows = first + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    cols = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    offsets = gl.cast(rows, gl.int64)[:, None] * strides[2] + gl.cast(cols, gl.int64)[None, :] * strides[3]
    ptr = gluon_head_pointer(ptr, strides, b, h, start)
    gl.store(ptr + offsets, gl.cast(tile, ptr.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit(do_not_specialize=["T", "n_row_tile"])
def _flash_attention_dq_kernel(
    accumulator_ptr,
    added_ptr,  # None: zeros where nothing was added
    dq_ptr,
    cu_seqlens_q_ptr,
    dq_strides,
    H,
    T,
    n_row_tile,
    scale,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """dq = scale * accumulator, out of the order of the registers."""
    n_tile = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    b = pid // n_tile // H
    h = pid // n_tile % H
    first = pid % n_tile * BLOCK_M
    start, length = sequence(cu_seqlens_q_ptr, b, T)
    if first >= length:
        return
    tile = pid % n_tile + first_row_tile(cu_seqlens_q_ptr, b, start, T, BLOCK_M)
    COLS: tl.constexpr = HEAD_DIM * BLOCK_M // 128
    tile += tl.cast(h, tl.int64) * n_row_tile
    is_set = True if added_ptr is None else tl.load(added_ptr + tile) > 0
    accumulator_ptr += tile * BLOCK_M * HEAD_DIM
    dq_ptr = head_pointer(dq_ptr, dq_strides, b, h, start)
    rows = tl.arange(0, 64)
    cols = tl.arange(0, COLS)
    for c in tl.static_range(2):
        x = tl.load(accumulator_ptr + c * 64 * COLS + tl.arange(0, 64 * COLS), mask=is_set, other=0.0)
        x = tl.permute(tl.reshape(x, [COLS // 8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
        x = tl.reshape(x, [64, COLS]) * scale
        if BLOCK_M == 64:
            store_tile(dq_ptr, dq_strides, first, rows, c * COLS + cols, length, x, HEAD_DIM)
        else:
            store_tile(dq_ptr, dq_strides, first, c * 64 + rows, cols, length, x, HEAD_DIM)


def rounding_plan(
    strides: tuple[int, ...],
    H: int,
    n_row_tile: int,
    n_sequence: int,
    T: int,
    scale: float,
    block_m: int,
    head_dim: int,
) -> Plan:
    """dq, by its strides (b, h, row, d), from the accumulator; for these two, how many programs added to each row tile
    between them, and cu_seqlens_q: plan(accumulator, added, dq, cu_seqlens_q).
    """
    return Plan(
        _flash_attention_dq_kernel, (n_sequence * H * triton.cdiv(T, block_m),),
        *(TENSOR,) * 4, strides, H, T, n_row_tile, scale, block_m, head_dim,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
