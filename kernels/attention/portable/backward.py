"""The backward kernels: a preprocess, then one pass for dk and dv and one for dq (Dao 2023, algorithm 2, split in two).

With p = e^(z - lse) recomputed from the saved log-sum-exp (times `unround` for fp32: see the forward), and
delta = rowsum(dout * out) - dlse:

    dv = p^T dout      dp = dout v^T      ds = p (dp - delta)      dq = scale ds k      dk = scale ds^T q

(softcap: ds is further multiplied by 1 - tanh^2; ALiBi's bias is in z, a constant.) The gradient of the log-sum-exp
enters through delta alone, since d lse / d z = p. Two passes recompute the scores twice, and in return each gradient
tile has one writer that adds in one order: no atomics, bitwise the same in every run. The dk/dv program of a key-value
head walks all of its query heads.
"""

import triton
import triton.language as tl

from ...elementwise import tanh
from ..blocks import (
    alibi_slope,
    base_2,
    distance,
    first_row_tile,
    head_pointer,
    is_visible,
    load_tile,
    partial_or_whole,
    row_offsets,
    sequence,
    store_tile,
    visible_blocks,
)


@triton.jit(do_not_specialize=["T", "n_row_tile"])
def _flash_attention_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,  # None: no gradient through the log-sum-exp
    lse2_ptr,  # None: not by row
    delta_ptr,  # None: not by row
    tiles_ptr,  # (H, row tiles, 2, BLOCK_M): lse2 and delta by row tile, +inf and 0 past the end; None: not by tile
    added_ptr,  # (H, row tiles): counters to zero, or None
    cu_seqlens_q_ptr,
    out_strides,
    dout_strides,
    dlse_strides,
    lse_strides,  # lse2's and delta's too
    H,
    T,
    n_row_tile,  # of a head
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, and lse2, the log-sum-exp in base 2, +inf for rows that see no key (p = 0)."""
    n_tile = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    b = pid // n_tile // H
    h = pid // n_tile % H
    first = pid % n_tile * BLOCK_M
    start, T = sequence(cu_seqlens_q_ptr, b, T)
    if first >= T:
        return
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    out_ptr = head_pointer(out_ptr, out_strides, b, h, start)
    dout_ptr = head_pointer(dout_ptr, dout_strides, b, h, start)
    lse_ptr = head_pointer(lse_ptr, lse_strides, b, h, start)
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    out = load_tile(out_ptr, out_strides, first, rows, cols, T, HEAD_DIM, True).to(ACC)
    dout = load_tile(dout_ptr, dout_strides, first, rows, cols, T, HEAD_DIM, True).to(ACC)
    delta = tl.sum(out * dout, 1)
    in_range = first + rows < T
    offsets = row_offsets(first, rows, lse_strides[2])
    lse2 = base_2(tl.load(lse_ptr + offsets, mask=in_range, other=float("-inf")))
    if dlse_ptr is not None:
        dlse_ptr = head_pointer(dlse_ptr, dlse_strides, b, h, start)
        delta -= tl.load(dlse_ptr + row_offsets(first, rows, dlse_strides[2]), mask=in_range, other=0.0).to(ACC)
    if lse2_ptr is not None:
        tl.store(head_pointer(lse2_ptr, lse_strides, b, h, start) + offsets, lse2, mask=in_range)
    if delta_ptr is not None:
        tl.store(head_pointer(delta_ptr, lse_strides, b, h, start) + offsets, delta, mask=in_range)
    if tiles_ptr is not None:
        tile = tl.cast(h, tl.int64) * n_row_tile
        tile += first_row_tile(cu_seqlens_q_ptr, b, start, T, BLOCK_M) + first // BLOCK_M
        tiles_ptr += tile * (2 * BLOCK_M)
        tl.store(tiles_ptr + rows, lse2)
        tl.store(tiles_ptr + BLOCK_M + rows, delta)
        if added_ptr is not None:
            tl.store(added_ptr + tile, 0)


@triton.jit
def _load_rows(ptr, strides, first, rows, T, PAST: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """A statistic of some rows, PAST past T: lse2 +inf makes p 0 there."""
    ptrs = ptr + row_offsets(first, rows, strides[2])
    return tl.load(ptrs, mask=first + rows < T, other=PAST) if CHECK_ROWS else tl.load(ptrs)


@triton.jit
def _accumulate_dkdv(
    dk,  # (BLOCK_N, BLOCK_D)
    dv,
    k,
    v,
    j,  # (BLOCK_N,) key rows
    alibi,  # the query head's slope, or None
    q_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    unround_ptr,
    q_strides,
    dout_strides,
    lse_strides,
    lo,
    full_lo,
    full_hi,
    hi,
    lower,
    upper,
    T,
    S,
    cap_scale,
    exp_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """Add what the blocks of queries that see j in part (MASK) or whole give. Scores stand transposed."""
    cols = tl.arange(0, k.shape[1])
    rows = tl.arange(0, BLOCK_M)
    start, stop, jump = partial_or_whole(lo, full_lo, full_hi, hi, MASK)
    for m in tl.range(start, stop, BLOCK_M):
        m += tl.where(m < full_lo, 0, jump)
        q = load_tile(q_ptr, q_strides, m, rows, cols, T, HEAD_DIM, MASK)
        lse2 = _load_rows(lse2_ptr, lse_strides, m, rows, T, float("inf"), MASK)
        delta = _load_rows(delta_ptr, lse_strides, m, rows, T, 0.0, MASK)
        z = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)
        if cap_scale is not None:
            z = tanh(z * cap_scale)
            slope = 1.0 - z * z
        if alibi is not None:
            z -= alibi * distance(j - (m + S - T), rows)
        if MASK:
            z = tl.where(is_visible((m + rows)[None, :], j[:, None], lower, upper, S), z, float("-inf"))
        p = tl.math.exp2(z * exp_scale - lse2[None, :])
        if unround_ptr is not None:
            p *= _load_rows(unround_ptr, lse_strides, m, rows, T, 0.0, MASK)[None, :]
        dout = load_tile(dout_ptr, dout_strides, m, rows, cols, T, HEAD_DIM, MASK)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=dv.dtype)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=dk.dtype)
        ds = p * (dp - delta[None, :])
        if cap_scale is not None:
            ds *= slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def _flash_attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    unround_ptr,
    slopes_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    lse_strides,  # delta's and unround's too
    slopes_strides,
    dk_strides,
    dv_strides,
    H,
    K,
    T,
    S,
    left,
    right,
    scale,
    cap_scale,
    exp_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_tile = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    b = pid // n_tile // K
    h_kv = pid // n_tile % K
    first = pid % n_tile * BLOCK_N
    start_q, T = sequence(cu_seqlens_q_ptr, b, T)
    start_k, S = sequence(cu_seqlens_k_ptr, b, S)
    if first >= S:
        return
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    k_ptr = head_pointer(k_ptr, k_strides, b, h_kv, start_k)
    v_ptr = head_pointer(v_ptr, v_strides, b, h_kv, start_k)
    k = load_tile(k_ptr, k_strides, first, rows, cols, S, HEAD_DIM, True)
    v = load_tile(v_ptr, v_strides, first, rows, cols, S, HEAD_DIM, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)

    lower = None if left is None else S - T - left
    upper = None if right is None else S - T + right
    # key j is seen by the queries j - upper .. j - lower
    first_query = None if right is None else T - S - right
    last_query = None if left is None else T - S + left
    last = tl.minimum(first + BLOCK_N, S) - 1
    lo, full_lo, full_hi, hi = visible_blocks(first, last, first_query, last_query, T, BLOCK_M)
    j = first + rows
    group = H // K
    for h in tl.range(h_kv * group, h_kv * group + group):
        q = head_pointer(q_ptr, q_strides, b, h, start_q)
        dout = head_pointer(dout_ptr, dout_strides, b, h, start_q)
        lse2 = head_pointer(lse2_ptr, lse_strides, b, h, start_q)
        delta = head_pointer(delta_ptr, lse_strides, b, h, start_q)
        unround = None if unround_ptr is None else head_pointer(unround_ptr, lse_strides, b, h, start_q)
        alibi = alibi_slope(slopes_ptr, slopes_strides, b, h, exp_scale, ACC)
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, j, alibi, q, dout, lse2, delta, unround, q_strides, dout_strides, lse_strides,
            lo, full_lo, full_hi, hi, lower, upper, T, S, cap_scale, exp_scale, HEAD_DIM, BLOCK_M, PRECISION, True,
        )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, j, alibi, q, dout, lse2, delta, unround, q_strides, dout_strides, lse_strides,
            lo, full_lo, full_hi, hi, lower, upper, T, S, cap_scale, exp_scale, HEAD_DIM, BLOCK_M, PRECISION, False,
        )  # fmt: skip

    dk_ptr = head_pointer(dk_ptr, dk_strides, b, h_kv, start_k)
    dv_ptr = head_pointer(dv_ptr, dv_strides, b, h_kv, start_k)
    store_tile(dk_ptr, dk_strides, first, rows, cols, S, dk * scale, HEAD_DIM)
    store_tile(dv_ptr, dv_strides, first, rows, cols, S, dv, HEAD_DIM)


@triton.jit
def _accumulate_dq(
    dq,  # (BLOCK_M, BLOCK_D)
    q,
    dout,
    lse2,
    delta,
    unround,
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
    """Add what the blocks of keys that are visible in part (MASK) or whole give to dq."""
    cols = tl.arange(0, q.shape[1])
    rows = tl.arange(0, BLOCK_N)
    start, stop, jump = partial_or_whole(lo, full_lo, full_hi, hi, MASK)
    for n in tl.range(start, stop, BLOCK_N):
        n += tl.where(n < full_lo, 0, jump)
        k = load_tile(k_ptr, k_strides, n, rows, cols, S, HEAD_DIM, MASK)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)  # (BLOCK_M, BLOCK_N)
        if cap_scale is not None:
            z = tanh(z * cap_scale)
            slope = 1.0 - z * z
        if alibi is not None:
            z -= alibi * distance(position - n, rows)
        if MASK:
            z = tl.where(is_visible(i[:, None], (n + rows)[None, :], lower, upper, S), z, float("-inf"))
        p = tl.math.exp2(z * exp_scale - lse2[:, None])
        if unround is not None:
            p *= unround[:, None]
        v = load_tile(v_ptr, v_strides, n, rows, cols, S, HEAD_DIM, MASK)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
        ds = p * (dp - delta[:, None])
        if cap_scale is not None:
            ds *= slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
    return dq


@triton.jit
def _flash_attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    unround_ptr,
    slopes_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    lse_strides,  # delta's and unround's too
    slopes_strides,
    dq_strides,
    H,
    K,
    T,
    S,
    left,
    right,
    scale,
    cap_scale,
    exp_scale,
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
    first = (n_tile - 1 - pid % n_tile) * BLOCK_M
    start_q, T = sequence(cu_seqlens_q_ptr, b, T)
    start_k, S = sequence(cu_seqlens_k_ptr, b, S)
    if first >= T:
        return
    q_ptr = head_pointer(q_ptr, q_strides, b, h, start_q)
    k_ptr = head_pointer(k_ptr, k_strides, b, h // (H // K), start_k)
    v_ptr = head_pointer(v_ptr, v_strides, b, h // (H // K), start_k)
    dout_ptr = head_pointer(dout_ptr, dout_strides, b, h, start_q)
    lse2_ptr = head_pointer(lse2_ptr, lse_strides, b, h, start_q)
    delta_ptr = head_pointer(delta_ptr, lse_strides, b, h, start_q)
    lower = None if left is None else S - T - left
    upper = None if right is None else S - T + right

    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr, q_strides, first, rows, cols, T, HEAD_DIM, True)
    dout = load_tile(dout_ptr, dout_strides, first, rows, cols, T, HEAD_DIM, True)
    lse2 = _load_rows(lse2_ptr, lse_strides, first, rows, T, float("inf"), True)
    delta = _load_rows(delta_ptr, lse_strides, first, rows, T, 0.0, True)
    if unround_ptr is None:
        unround = None
    else:
        unround_ptr = head_pointer(unround_ptr, lse_strides, b, h, start_q)
        unround = _load_rows(unround_ptr, lse_strides, first, rows, T, 0.0, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    last = tl.minimum(first + BLOCK_M, T) - 1
    lo, full_lo, full_hi, hi = visible_blocks(first, last, lower, upper, S, BLOCK_N)
    i = first + rows
    alibi = alibi_slope(slopes_ptr, slopes_strides, b, h, exp_scale, ACC)
    position = None if alibi is None else i + (S - T)
    dq = _accumulate_dq(
        dq, q, dout, lse2, delta, unround, i, position, alibi, k_ptr, v_ptr, k_strides, v_strides,
        lo, full_lo, full_hi, hi, lower, upper, S, cap_scale, exp_scale, HEAD_DIM, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, dout, lse2, delta, unround, i, position, alibi, k_ptr, v_ptr, k_strides, v_strides,
        lo, full_lo, full_hi, hi, lower, upper, S, cap_scale, exp_scale, HEAD_DIM, BLOCK_N, PRECISION, True,
    )  # fmt: skip
    dq_ptr = head_pointer(dq_ptr, dq_strides, b, h, start_q)
    store_tile(dq_ptr, dq_strides, first, rows, cols, T, dq * scale, HEAD_DIM)
