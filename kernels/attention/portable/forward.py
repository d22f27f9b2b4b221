"""The forward kernel: online softmax over key blocks (Dao 2023, FlashAttention-2, algorithm 1).

For a tile of queries, over blocks of keys, with z = scale q k^T (softcap: z = c tanh(scale q k^T / c); ALiBi: less
slope |i + S - T - j|):

    m' = max(m, rowmax z)      l <- l e^(m - m') + rowsum e^(z - m')      acc <- acc e^(m - m') + e^(z - m') v

and at the end out = acc / l, lse = m + ln l. Everything is in base 2, the scale folded into the exponent. A sink starts
the recurrence at m = sink, l = 1. Blocks that the mask leaves whole are neither masked nor bounds-checked; blocks that
it hides are never visited.

An lse of 10 rounds by up to 5e-7, which shifts every p of its row by that share in the backward, where eager's softmax
is good to 1e-7. For fp32 inputs the forward therefore saves `unround` = e^(lse - m) / l too: p = e^(z - lse) unround.
"""

import triton
import triton.language as tl

from ...elementwise import tanh
from ..blocks import (
    alibi_slope,
    base_2,
    distance,
    head_pointer,
    is_visible,
    load_tile,
    partial_or_whole,
    row_offsets,
    sequence,
    store_tile,
    visible_blocks,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_D)
    l_i,  # (BLOCK_M,) row sums
    m_i,  # (BLOCK_M,) row maxima, base 2
    q,  # (BLOCK_M, BLOCK_D)
    i,  # (BLOCK_M,) query rows
    position,  # (BLOCK_M,) the keys that they stand at; None without alibi
    alibi,  # the head's slope, or None
    k_ptr,
    v_ptr,
    k_strides,
    v_strides,
    lo,
    full_lo,
    full_hi,
    hi,
    lower,
    upper,
    S,
    cap_scale,
    exp_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """Fold the blocks of keys that are visible in part (MASK) or whole into (acc, l_i, m_i)."""
    cols = tl.arange(0, q.shape[1])
    rows = tl.arange(0, BLOCK_N)
    start, stop, jump = partial_or_whole(lo, full_lo, full_hi, hi, MASK)
    for n in tl.range(start, stop, BLOCK_N):
        n += tl.where(n < full_lo, 0, jump)
        k = load_tile(k_ptr, k_strides, n, rows, cols, S, HEAD_DIM, MASK)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)  # (BLOCK_M, BLOCK_N)
        if cap_scale is not None:
            z = tanh(z * cap_scale)
        if alibi is not None:
            z -= alibi * distance(position - n, rows)
        if MASK:
            z = tl.where(is_visible(i[:, None], (n + rows)[None, :], lower, upper, S), z, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(z, 1) * exp_scale)
        # a row that has seen no key yet has m = -inf: subtract 0 instead, since -inf - -inf is NaN
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
        p = tl.math.exp2(z * exp_scale - shift[:, None])
        rescale = tl.math.exp2(m_i - shift)
        l_i = l_i * rescale + tl.sum(p, 1)
        v = load_tile(v_ptr, v_strides, n, rows, cols, S, HEAD_DIM, MASK)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=["T"])
def _flash_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,  # (H,) or None
    slopes_ptr,  # ALiBi's, or None
    out_ptr,
    lse_ptr,
    unround_ptr,  # as lse, or None
    cu_seqlens_q_ptr,  # (B + 1,) or None for a dense batch
    cu_seqlens_k_ptr,
    q_strides,  # (b, h, row, d), as every stride tuple
    k_strides,
    v_strides,
    out_strides,
    lse_strides,
    slopes_strides,  # (b, h), or None
    H,
    K,
    T,  # of the longest sequence
    S,
    left,  # None: no bound
    right,
    cap_scale,  # scale / softcap, or None
    exp_scale,  # (softcap or scale) * log2 e
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_tile = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    b = pid // n_tile // H
    h = pid // n_tile % H
    first = (n_tile - 1 - pid % n_tile) * BLOCK_M  # under a causal mask the last rows have the most work: start there
    start_q, T = sequence(cu_seqlens_q_ptr, b, T)
    start_k, S = sequence(cu_seqlens_k_ptr, b, S)
    if first >= T:
        return
    q_ptr = head_pointer(q_ptr, q_strides, b, h, start_q)
    k_ptr = head_pointer(k_ptr, k_strides, b, h // (H // K), start_k)
    v_ptr = head_pointer(v_ptr, v_strides, b, h // (H // K), start_k)
    out_ptr = head_pointer(out_ptr, out_strides, b, h, start_q)
    lse_ptr = head_pointer(lse_ptr, lse_strides, b, h, start_q)
    lower = None if left is None else S - T - left
    upper = None if right is None else S - T + right

    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr, q_strides, first, rows, cols, T, HEAD_DIM, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if sinks_ptr is None:
        m_i = tl.full([BLOCK_M], float("-inf"), ACC)
        l_i = tl.zeros([BLOCK_M], ACC)
    else:
        sink = tl.load(sinks_ptr + h).to(ACC)
        m_i = tl.zeros([BLOCK_M], ACC) + sink * LOG2E
        l_i = tl.full([BLOCK_M], 1.0, ACC)

    last = tl.minimum(first + BLOCK_M, T) - 1
    lo, full_lo, full_hi, hi = visible_blocks(first, last, lower, upper, S, BLOCK_N)
    i = first + rows
    alibi = alibi_slope(slopes_ptr, slopes_strides, b, h, exp_scale, ACC)
    position = None if alibi is None else i + (S - T)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, i, position, alibi, k_ptr, v_ptr, k_strides, v_strides, lo, full_lo, full_hi, hi,
        lower, upper, S, cap_scale, exp_scale, HEAD_DIM, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, i, position, alibi, k_ptr, v_ptr, k_strides, v_strides, lo, full_lo, full_hi, hi,
        lower, upper, S, cap_scale, exp_scale, HEAD_DIM, BLOCK_N, PRECISION, True,
    )  # fmt: skip

    l_i = tl.where(l_i == 0, 1.0, l_i)  # no visible key: acc is 0 and m_i is -inf
    lse = (m_i + tl.math.log2(l_i)) * LN2
    if sinks_ptr is not None:
        lse = tl.where((l_i == 1.0) & (m_i == sink * LOG2E), sink, lse)  # not rounded on the way through base 2
    offsets = row_offsets(first, rows, lse_strides[2])
    tl.store(lse_ptr + offsets, lse, mask=i < T)
    if unround_ptr is not None:
        unround_ptr = head_pointer(unround_ptr, lse_strides, b, h, start_q)
        unround = tl.where(lse == float("-inf"), 1.0, tl.math.exp2(base_2(lse) - m_i) / l_i)
        tl.store(unround_ptr + offsets, unround, mask=i < T)
    store_tile(out_ptr, out_strides, first, rows, cols, T, acc / l_i[:, None], HEAD_DIM)
