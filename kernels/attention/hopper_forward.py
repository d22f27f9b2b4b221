"""The forward kernel for Hopper: draft."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .hopper_blocks import (
    ELEMENT,
    as_heads,
    block_order,
    describe,
    fence_async_shared,
    gl,
    gluon,
    load_rows,
    masked_block,
    mbarrier,
    new_barriers,
    partition_barrier,
    sequence,
    slot,
    tile_of,
    tma,
    tma_obstacle,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN2: gl.constexpr = gl.constexpr(math.log(2))


@gluon.jit
def _tile(t, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """What the t-th tile is: where it stands, and the blocks of keys it visits."""
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, H, T, S, left, right, n_head, n_tile, GROUP = sizes
    bh, m = tile_of(t, n_tile, n_head, GROUP)
    b = bh // H
    first = m * BLOCK_M
    start_q, T = sequence(cu_seqlens_q_ptr, b, T)
    start_k, S = sequence(cu_seqlens_k_ptr, b, S)
    lower = None if left is None else S - T - left
    upper = None if right is None else S - T + right
    order = block_order(first, gl.minimum(first + BLOCK_M, T) - 1, lower, upper, S, BLOCK_N)
    if cu_seqlens_q_ptr is not None:
        b = 0
    return b, bh % H, first, start_q, start_k, T, S, order


@gluon.jit
def _produce(q_desc, k_desc, v_desc, buffers, barriers, sizes, groups,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    CONSUMERS: gl.constexpr = BLOCK_M // 64
    q_buf, k_buf, v_buf = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_clean, turn = barriers
    n_total = sizes[7] * sizes[8]
    D: gl.constexpr = q_desc.block_shape[3]
    g = 0
    n_done = 0
    for t in range(gl.program_id(0), n_total, gl.num_programs(0)):
        b, h, first, start_q, start_k, T, S, order = _tile(t, sizes, BLOCK_M, BLOCK_N)
        hi, full_hi, n_whole, n_masked, n_block = order
        if first < T:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (n_done + 1) % 2)
                load_rows(q_desc, b, h, start_q + first + c * 64, q_full.index(c), q_buf.index(c))
            for i in range(n_block):
                n = gl.where(i < n_masked, masked_block(i, hi, full_hi, n_whole), full_hi - 1 - (i - n_masked))
                row = start_k + n * BLOCK_N
                s, parity = slot(g + i, STAGES)
                mbarrier.wait(k_empty.index(s), parity ^ 1)
                load_rows(k_desc, b, h // groups, row, k_full.index(s), k_buf.index(s))
                mbarrier.wait(v_empty.index(s), parity ^ 1)
                load_rows(v_desc, b, h // groups, row, v_full.index(s), v_buf.index(s))
            g += n_block
            n_done += 1


@gluon.jit
def _softmax(z, m_i, l_i, exp_scale, MASK: gl.constexpr):
    """Online softmax of the scores z in base 2: (p, factor of what was summed before, m, l)."""
    m_new = gl.maximum(m_i, gl.max(z, 1) * exp_scale)
    # a row that has seen no key yet has m = -inf: subtract 0 instead, since -inf - -inf is NaN
    shift = gl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = gl.exp2(z * exp_scale - shift[:, None])
    rescale = gl.exp2(m_i - shift)
    return p, rescale, m_new, l_i * rescale + gl.sum(p, 1)


@gluon.jit
def _mask(z, i, j, lower, upper, S):
    visible = (j < S)[None, :]
    if upper is not None:
        visible = visible & (j[None, :] <= (i + upper)[:, None])
    if lower is not None:
        visible = visible & (j[None, :] >= (i + lower)[:, None])
    return gl.where(visible, z, float("-inf"))


@gluon.jit
def _consume(q_desc, work, buffers, barriers, sizes, exp_scale, c: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr):  # fmt: skip
    CONSUMERS: gl.constexpr = BLOCK_M // 64
    q_buf, k_buf, v_buf = buffers
    out_desc, out_ptr, lse_ptr, out_strides, lse_strides = work
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_clean, turn = barriers
    HEAD_DIM: gl.constexpr = q_desc.block_shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = q_buf.index(c).reshape([64, HEAD_DIM])
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    g = 0
    n_done = 0
    for t in range(gl.program_id(0), sizes[7] * sizes[8], gl.num_programs(0)):
        b, h, first, start_q, start_k, T, S, order = _tile(t, sizes, BLOCK_M, BLOCK_N)
        hi, full_hi, n_whole, n_masked, n_block = order
        if first < T:
            lower = None if sizes[5] is None else S - T - sizes[5]
            upper = None if sizes[6] is None else S - T + sizes[6]
            i = first + c * 64 + gl.arange(0, 64, row_layout)
            m_i = gl.full([64], float("-inf"), gl.float32, row_layout)
            l_i = gl.full([64], 0.0, gl.float32, row_layout)
            o = gl.zeros([64, HEAD_DIM], gl.float32, o_layout)
            s, parity = slot(g, STAGES)
            mbarrier.wait(q_full.index(c), n_done % 2)
            mbarrier.wait(k_full.index(s), parity)
            z = warpgroup_mma(
                q, k_buf.index(s).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            z = warpgroup_mma_wait(0, [z])
            mbarrier.arrive(k_empty.index(s), count=1)
            z = _mask(z, i, (hi - 1) * BLOCK_N + cols, lower, upper, S)
            p, rescale, m_i, l_i = _softmax(z, m_i, l_i, exp_scale, True)
            p = gl.convert_layout(p.to(DTYPE), p_layout)
            s, parity = slot(g + 1, STAGES)
            mbarrier.wait(k_full.index(s), parity, pred=n_block > 1)
            for MASK in gl.static_range(1, -1, -1):
                start = 1 if MASK else gl.maximum(n_masked, 1)
                stop = n_masked if MASK else n_block
                for n in range(start, stop):
                    s, parity = slot(g + n, STAGES)
                    z = warpgroup_mma(
                        q,
                        k_buf.index(s).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0)),
                        zero,
                        use_acc=False,
                        is_async=True,
                    )
                    s_v, parity_v = slot(g + n - 1, STAGES)
                    mbarrier.wait(v_full.index(s_v), parity_v)
                    o = warpgroup_mma(p, v_buf.index(s_v).reshape([BLOCK_N, HEAD_DIM]), o, is_async=True)
                    z = warpgroup_mma_wait(1, [z])
                    mbarrier.arrive(k_empty.index(s), count=1)
                    if MASK:
                        z = _mask(z, i, masked_block(n, hi, full_hi, n_whole) * BLOCK_N + cols, lower, upper, S)
                    p_new, rescale, m_i, l_i = _softmax(z, m_i, l_i, exp_scale, MASK)
                    s_n, parity_n = slot(g + n + 1, STAGES)
                    mbarrier.wait(k_full.index(s_n), parity_n, pred=n + 1 < n_block)
                    o = warpgroup_mma_wait(0, [o])
                    mbarrier.arrive(v_empty.index(s_v), count=1)
                    o = o * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
                    p = gl.convert_layout(p_new.to(DTYPE), p_layout)
            s, parity = slot(g + n_block - 1, STAGES)
            mbarrier.wait(v_full.index(s), parity)
            o = warpgroup_mma(p, v_buf.index(s).reshape([BLOCK_N, HEAD_DIM]), o, is_async=True)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(v_empty.index(s), count=1)
            l_i = gl.where(l_i == 0, 1.0, l_i)
            lse = (m_i + gl.log2(l_i)) * LN2
            gl.store(
                lse_ptr
                + gl.cast(b, gl.int64) * lse_strides[0]
                + gl.cast(h, gl.int64) * lse_strides[1]
                + (start_q + i) * lse_strides[2],
                lse,
                mask=i < T,
            )
            o = o * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
            q.store(o.to(DTYPE))
            fence_async_shared()
            tma_store(out_desc, [b, h, start_q + first + c * 64, 0], q_buf.index(c))
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(c), count=1)
            g += n_block
            n_done += 1


@gluon.jit
def _flash_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, out_strides, lse_strides, sizes, groups, exp_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PING_PONG: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = BLOCK_M // 64
    HEAD_DIM: gl.constexpr = q_desc.block_shape[3]
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    barriers = (
        new_barriers(CONSUMERS, 1),
        new_barriers(CONSUMERS, 1),
        new_barriers(STAGES, 1),
        new_barriers(STAGES, CONSUMERS),
        new_barriers(STAGES, 1),
        new_barriers(STAGES, CONSUMERS),
        new_barriers(1, CONSUMERS),
        new_barriers(CONSUMERS, 1),
    )
    work = (out_desc, out_ptr, lse_ptr, out_strides, lse_strides)
    buffers = (q_buf, k_buf, v_buf)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (q_desc, work, buffers, barriers, sizes, exp_scale, 0, BLOCK_M, BLOCK_N, STAGES, PING_PONG)),
                (_consume, (q_desc, work, buffers, barriers, sizes, exp_scale, 1, BLOCK_M, BLOCK_N, STAGES, PING_PONG)),
                (_produce, (q_desc, k_desc, v_desc, buffers, barriers, sizes, groups, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (q_desc, work, buffers, barriers, sizes, exp_scale, 0, BLOCK_M, BLOCK_N, STAGES, PING_PONG)),
                (_consume, (q_desc, work, buffers, barriers, sizes, exp_scale, 1, BLOCK_M, BLOCK_N, STAGES, PING_PONG)),
                (_consume, (q_desc, work, buffers, barriers, sizes, exp_scale, 2, BLOCK_M, BLOCK_N, STAGES, PING_PONG)),
                (_produce, (q_desc, k_desc, v_desc, buffers, barriers, sizes, groups, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


def launch_forward(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    T,
    S,
    left,
    right,
    scale,
    tile=(128, 128, 2),
    pp=False,
    regs=(24, 240),
):
    varlen = cu_seqlens_q is not None
    BM, BN, NS = tile
    H, K = q.shape[1], k.shape[1]
    n_head = (cu_seqlens_q.shape[0] - 1 if varlen else q.shape[0]) * H
    n_tile = -(-T // BM)
    GROUP = 4
    sizes = (cu_seqlens_q, cu_seqlens_k, H, T, S, left, right, n_head, n_tile, GROUP)
    grid = (n_head * n_tile,)
    _flash_attention_fwd_hopper_kernel[grid](
        describe(q, 64, varlen),
        describe(k, BN, varlen),
        describe(v, BN, varlen),
        describe(out, 64, varlen),
        out,
        lse,
        as_heads(out, varlen).stride()[:3],
        (0, *lse.stride()) if varlen else lse.stride(),
        sizes,
        H // K,
        scale * math.log2(math.e),
        BM,
        BN,
        NS,
        pp,
        *regs,
        num_warps=4,
        maxnreg=None,
    )
