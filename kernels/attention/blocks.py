"""What the attention kernels share: addresses, masked tiles, the visible range of blocks, the score function.

Every tensor is addressed as (b, h, row, d) with four strides. Packed sequences (varlen) have a batch stride of 0 and
start at row cu_seqlens[b]. Offsets are 64-bit: one head of a long (B, T, H, D) tensor alone can pass 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(cu_seqlens_ptr, b, length):
    """First row and length of sequence b, `length` at most; (0, length) when cu_seqlens_ptr is None."""
    if cu_seqlens_ptr is None:
        start = 0
    else:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.minimum(tl.load(cu_seqlens_ptr + b + 1) - start, length)
    return start, length


@triton.jit
def head_pointer(ptr, strides, b, h, start):
    """Address of row `start` of head (b, h)."""
    offset = tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    return ptr + offset + tl.cast(start, tl.int64) * strides[2]


@triton.jit
def first_row_tile(cu_seqlens_q_ptr, b, start_q, T, BLOCK_M: tl.constexpr):
    """Sequence b's first row tile, where each has its own; packed sequences have room to round up."""
    return b * tl.cdiv(T, BLOCK_M) if cu_seqlens_q_ptr is None else start_q // BLOCK_M + b


@triton.jit
def row_offsets(first, rows, stride):
    """64-bit offsets of rows first + rows: a scalar that moves with the loop plus a vector that does not."""
    return tl.cast(first, tl.int64) * stride + rows.to(tl.int64) * stride


@triton.jit
def tile_offsets(first, rows, cols, strides):
    """64-bit offsets of a tile: (len(rows), len(cols))."""
    return (
        tl.cast(first, tl.int64) * strides[2]
        + rows.to(tl.int64)[:, None] * strides[2]
        + cols.to(tl.int64)[None, :] * strides[3]
    )


@triton.jit
def load_tile(ptr, strides, first, rows, cols, length, HEAD_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Tile (len(rows), len(cols)) at row `first`; zeros past HEAD_DIM, and past `length` rows when CHECK_ROWS."""
    ptrs = ptr + tile_offsets(first, rows, cols, strides)
    if CHECK_ROWS and cols.shape[0] != HEAD_DIM:
        tile = tl.load(ptrs, mask=(first + rows < length)[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(ptrs, mask=(first + rows < length)[:, None], other=0.0)
    elif cols.shape[0] != HEAD_DIM:
        tile = tl.load(ptrs, mask=(cols < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(ptr, strides, first, rows, cols, length, tile, HEAD_DIM: tl.constexpr):
    """Store the rows below `length` and the columns below HEAD_DIM of a tile."""
    ptrs = ptr + tile_offsets(first, rows, cols, strides)
    mask = (first + rows < length)[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible_blocks(first, last, lower, upper, length, BLOCK: tl.constexpr):
    """Blocks of the other axis that rows first..last (inclusive) see, where row i sees i + lower <= j <= i + upper.

    Returns (lo, full_lo, full_hi, hi): blocks in [full_lo, full_hi) are visible to every row, those in [lo, full_lo)
    and [full_hi, hi) in part. lower or upper None is no bound on that side.
    """
    lo = 0
    full_lo = 0
    hi = length
    full_hi = length // BLOCK * BLOCK
    if upper is not None:
        hi = tl.maximum(tl.minimum(length, last + upper + 1), 0)
        full_hi = tl.maximum(tl.minimum(length, first + upper + 1), 0) // BLOCK * BLOCK
    if lower is not None:
        lo = tl.maximum(first + lower, 0) // BLOCK * BLOCK
        full_lo = tl.cdiv(tl.maximum(last + lower, 0), BLOCK) * BLOCK
        full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK) * BLOCK)
        full_hi = tl.maximum(full_lo, full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def partial_or_whole(lo, full_lo, full_hi, hi, MASK: tl.constexpr):
    """One loop over the partial blocks of both ends (MASK) or over the whole ones: (start, stop, jump).

    For n in range(start, stop, BLOCK) the block stands at n, and from full_lo on at n + jump. Two loops over two
    ranges would keep the invariants of both alive, and spill.
    """
    if MASK:
        start, stop, jump = lo, hi - (full_hi - full_lo), full_hi - full_lo
    else:
        start, stop, jump = full_lo, full_hi, 0
    return start, stop, jump


@triton.jit
def is_visible(i, j, lower, upper, n_key):
    """Mask of query i against key j, broadcast: j < n_key and i + lower <= j <= i + upper."""
    visible = j < n_key
    if lower is not None:
        visible = visible & (j >= i + lower)
    if upper is not None:
        visible = visible & (j <= i + upper)
    return visible


@triton.jit
def alibi_slope(slopes_ptr, strides, b, h, exp_scale, ACC: tl.constexpr):
    """Head (b, h)'s slope for scores that are still to be multiplied by exp_scale; None where there is none."""
    if slopes_ptr is None:
        slope = None
    else:
        offset = tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
        slope = tl.load(slopes_ptr + offset).to(ACC) * 1.4426950408889634 / exp_scale
    return slope


@triton.jit
def distance(i, j):
    """|i - j|, (len(i), len(j)), in fp32: exact below 2^24, and integers are converted by row and column alone."""
    return tl.abs(i.to(tl.float32)[:, None] - j.to(tl.float32)[None, :])


@triton.jit
def base_2(lse):
    """A natural log-sum-exp in base 2; +inf, hence p = 0, for rows that see no key."""
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
