"""The backward kernel for Hopper: dk, dv and dq in one pass over the scores (Shah et al. 2024, FlashAttention-3, §3).

A program owns BLOCK_N keys of a key-value head, half of them in each of two consumer warpgroups, and walks the tiles of
BLOCK_M queries that see them, in all query heads of the group. Scores stand transposed (keys by queries), so that p and
ds leave the registers only once, as the shared tile that dq is multiplied from:

    s = k q^T      p = 2^(scale log2(e) s - lse2)      dp = v dout^T      ds = p (dp - delta)
    dv += p dout   dk += ds q                          dq += ds^T k       (dk and dq times scale at the end)

Each warpgroup multiplies its own keys, except for dq, which sums over all keys of the program: there it takes half of
the columns, or of the rows where BLOCK_M is 128. Products are issued so that one is always under way while the
exponentials and ds are computed: dp beside p, dv beside ds; and with 128 queries in two halves, the second half's
scores beside the first half's p and the first half's dv and dk beside the second half's p. The last dk runs while dq
goes to shared memory.

dq sums over programs, in fp32, in a buffer of its own, which a second kernel rounds (gradients.py). The producer, which
also loads the tiles by TMA, adds a tile of dq to it by one TMA reduction while the consumers go on (turns.py). fp32
addition is not associative, so programs take turns: a counter for each row tile says how many have added, and the
producer waits until all keys to the left are in. Programs start in that order, so whom one waits for is always running.
Walking rows from the last to the first, heavy tiles first, they wait least: on an H200 turns cost 1 % at T = 8192, head
size 128, and 5 % at T = 1024, head size 64 (when dq left by atomics). ordered=False drops them.

What is kept for each row, lse2 and delta, the delta kernel writes by row tile, as dq's sum stands: every tile whole,
with lse2 = inf and delta = 0 past a sequence's end, so that p is 0 there and every TMA address a multiple of 16 bytes.

dk and dv fill more than half of a consumer's registers: what the loop does not use must not be in the others. Where the
program stands is therefore worked out once, and read from shared memory before the loop and after (place.py).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ...launching import TENSOR, Plan
from ..portable.backward import _flash_attention_delta_kernel
from .blocks import (
    ELEMENT,
    LINE,
    boxes,
    extents,
    fence_async_shared,
    gl,
    gluon,
    line_boxes,
    mbarrier,
    new_barriers,
    planned,
    row_boxes,
    slot,
    tma,
    tma_obstacle,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .gradients import rounding_plan, store_rows, to_fragments
from .loads import Problem, with_lengths
from .place import find_place, place_of, unknown_zero
from .turns import produce

BLOCK_M = {64: 128, 128: 64}  # queries, by head size: what the registers hold
BLOCK_N = 128  # keys, 64 in each warpgroup
STAGES = 2
GROUP = 16  # heads in flight together: fewer wait longer for their turns, more share less of the L2 cache
CONSUMER_REGISTERS = 240  # and 24 remain for each thread of the producer


@gluon.jit
def _probabilities(z, lse2, m, masked, since, until, exp_scale, layout: gl.constexpr):
    """p of queries m .. against the keys of a warpgroup, (keys, queries)."""
    if masked:
        i = m + gl.arange(0, z.shape[1], gl.SliceLayout(0, layout))
        visible = i[None, :] >= since[:, None]
        if until is not None:
            visible = visible & (i[None, :] <= until[:, None])
        z = gl.where(visible, z, float("-inf"))
    return gl.exp2(z * exp_scale - lse2[None, :])


@gluon.jit
def _consume(work, c: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
             VARLEN: gl.constexpr):  # fmt: skip
    """Keys c * BLOCK_N / 2 .. of the program: dk and dv, and part c of dq."""
    dk_desc, dv_desc, grads, buffers, barriers, problem, scale, exp_scale = work
    q_buf, dout_buf, k_buf, v_buf, rows_buf, ds_buf, dq_buf, here = buffers
    full, empty, ds_full, dq_full, dq_empty, done = barriers
    KEYS: gl.constexpr = BLOCK_N // 2
    COLS: gl.constexpr = HEAD_DIM * BLOCK_M // 128  # of dq's part: 64 rows of them
    DTYPE: gl.constexpr = q_buf.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    _, _, group, first, _, _, T, S, lo, full_lo, full_hi, n_block = place_of(here)
    left, right = problem.left, problem.right
    j = first + c * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, s_layout))
    # key j is seen by the queries since .. until; of rows past T, lse2 = inf makes p 0
    since = gl.where(j < S, 0 if right is None else T - S - right + j, T)
    until = None if left is None else T - S + left + j
    dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, dk_layout)
    dv = gl.zeros([KEYS, HEAD_DIM], gl.float32, dk_layout)
    zero_s = gl.zeros([KEYS, 64], gl.float32, s_layout)
    zero_dq = gl.zeros([64, COLS], gl.float32, dq_layout)
    mbarrier.wait(full.index(STAGES + 1), 0, pred=n_block > 0)
    g = 0
    for _ in range(group):
        for n in range(n_block):
            m = lo + (n_block - 1 - n) * BLOCK_M
            masked = (m < full_lo) | (m >= full_hi)
            s, parity = slot(g, STAGES)
            zero = unknown_zero(here)  # else their descriptors are made before the loop, and spill
            k_all = k_buf.index(zero).reshape([BLOCK_N, HEAD_DIM])
            k = k_all.slice(c * KEYS, KEYS)
            v = v_buf.index(zero).reshape([BLOCK_N, HEAD_DIM]).slice(c * KEYS, KEYS)
            q = q_buf.index(s).reshape([BLOCK_M, HEAD_DIM])
            dout = dout_buf.index(s).reshape([BLOCK_M, HEAD_DIM])
            lse2 = rows_buf.index(s).slice(0, BLOCK_M)
            delta = rows_buf.index(s).slice(BLOCK_M, BLOCK_M)
            ds_tile = ds_buf.index(g % 2)
            mbarrier.wait(full.index(s), parity)
            if BLOCK_M == 64:
                z = warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                dp = warpgroup_mma(v, dout.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                z = warpgroup_mma_wait(1, [z])
                p = _probabilities(z, lse2.load(row_layout), m, masked, since, until, exp_scale, s_layout)
                dv = warpgroup_mma(gl.convert_layout(gl.cast(p, DTYPE), p_layout), dout, dv, is_async=True)
                dp = warpgroup_mma_wait(1, [dp])
                ds = gl.cast(p * (dp - delta.load(row_layout)[None, :]), DTYPE)
                ds_tile.slice(c * KEYS, KEYS).store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(0), count=1)
                ds_part = ds_tile
                k_part = k_all.slice(c * COLS, COLS, 1)
            else:
                q0, q1 = q.slice(0, 64), q.slice(64, 64)
                dout0, dout1 = dout.slice(0, 64), dout.slice(64, 64)
                z0 = warpgroup_mma(k, q0.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                dp0 = warpgroup_mma(v, dout0.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                z1 = warpgroup_mma(k, q1.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                z0 = warpgroup_mma_wait(2, [z0])
                p0 = _probabilities(
                    z0, lse2.slice(0, 64).load(row_layout), m, masked, since, until, exp_scale, s_layout
                )
                dp0 = warpgroup_mma_wait(1, [dp0])
                dp1 = warpgroup_mma(v, dout1.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                ds0 = gl.cast(p0 * (dp0 - delta.slice(0, 64).load(row_layout)[None, :]), DTYPE)
                dv = warpgroup_mma(gl.convert_layout(gl.cast(p0, DTYPE), p_layout), dout0, dv, is_async=True)
                ds_tile.slice(c * KEYS, KEYS).slice(0, 64, 1).store(ds0)
                dk = warpgroup_mma(gl.convert_layout(ds0, p_layout), q0, dk, is_async=True)
                z1 = warpgroup_mma_wait(3, [z1])
                p1 = _probabilities(
                    z1, lse2.slice(64, 64).load(row_layout), m + 64, masked, since, until, exp_scale, s_layout
                )
                dp1 = warpgroup_mma_wait(2, [dp1])
                ds1 = gl.cast(p1 * (dp1 - delta.slice(64, 64).load(row_layout)[None, :]), DTYPE)
                ds_tile.slice(c * KEYS, KEYS).slice(64, 64, 1).store(ds1)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(0), count=1)
                dv = warpgroup_mma(gl.convert_layout(gl.cast(p1, DTYPE), p_layout), dout1, dv, is_async=True)
                ds_part = ds_tile.slice(c * 64, 64, 1)
                k_part = k_all
            mbarrier.wait(ds_full.index(0), g % 2)
            dq = warpgroup_mma(ds_part.permute((1, 0)), k_part, zero_dq, use_acc=False, is_async=True)
            if BLOCK_M == 64:
                dk = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
            else:
                dk = warpgroup_mma(gl.convert_layout(ds1, p_layout), q1, dk, is_async=True)
            dv, dq = warpgroup_mma_wait(1, [dv, dq])  # dk goes on while dq leaves
            mbarrier.wait(dq_empty.index(0), (g & 1) ^ 1)
            part = dq_buf.index(0).slice(c * 2 * COLS, 2 * COLS)
            part.store(gl.reshape(to_fragments(dq, COLS), [2 * COLS, LINE]))
            fence_async_shared()
            mbarrier.arrive(dq_full.index(0), count=1)
            dk = warpgroup_mma_wait(0, [dk])
            mbarrier.arrive(empty.index(s), count=1)
            g += 1
    mbarrier.arrive(done.index(0), count=1)
    mbarrier.wait(done.index(0), 0)  # nobody reads q and dout any more: dk and dv leave from there
    b, h_kv, _, first, _, start_k, _, S, _, _, _, _ = place_of(here)
    first += c * KEYS
    if VARLEN and first + KEYS > S:
        dk_ptr, dv_ptr, dk_strides, dv_strides = grads
        store_rows(dv_ptr, dv_strides, b, h_kv, start_k, first, S, dv, dk_layout)
        store_rows(dk_ptr, dk_strides, b, h_kv, start_k, first, S, dk * scale, dk_layout)
    else:
        if VARLEN:
            b = 0
        dv_tile = dout_buf.index(c).reshape([BLOCK_M, HEAD_DIM])
        dk_tile = q_buf.index(c).reshape([BLOCK_M, HEAD_DIM])
        if BLOCK_M > KEYS:
            dv_tile = dv_tile.slice(0, KEYS)
            dk_tile = dk_tile.slice(0, KEYS)
        dv_tile.store(gl.cast(dv, DTYPE))
        dk_tile.store(gl.cast(dk * scale, DTYPE))
        fence_async_shared()
        tma_store(dv_desc, [b, h_kv, start_k + first, 0], dv_tile)
        tma_store(dk_desc, [b, h_kv, start_k + first, 0], dk_tile)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_row_tile", "T", "S", "n_tile", "group"])
def _flash_attention_bwd_hopper_kernel(
    q_desc,  # no tuples of descriptors: a launch takes them apart only here
    dout_desc,
    k_desc,
    v_desc,
    rows_desc,  # lse2 and delta by row tile, flat
    dq_desc,
    dk_desc,
    dv_desc,
    grads,
    added_ptr,  # for each row tile of dq, the programs that have added to it; None without turns
    n_row_tile,  # row tiles of a head
    problem,
    T,
    S,
    n_tile,
    group,
    scale,
    exp_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    ORDERED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = with_lengths(problem, T, S, n_tile, group)
    DTYPE: gl.constexpr = q_desc.dtype
    VARLEN: gl.constexpr = problem.cu_seqlens_q is not None
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout)
    dout_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], dout_desc.layout)
    k_buf = gl.allocate_shared_memory(DTYPE, [1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_buf = gl.allocate_shared_memory(DTYPE, [1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    rows_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], rows_desc.layout)
    ds_buf = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, BLOCK_M], ds_layout)
    dq_buf = gl.allocate_shared_memory(gl.float32, [1, BLOCK_M * HEAD_DIM // LINE, LINE], dq_desc.layout)
    here = find_place(problem, BLOCK_M, BLOCK_N)
    full = new_barriers(STAGES + 2, 1)  # of the slots; of what is to be cleaned first; of keys and values
    empty = new_barriers(STAGES, 2)
    ds_full = new_barriers(1, 2)
    dq_full = new_barriers(1, 2)
    dq_empty = new_barriers(1, 1)
    done = new_barriers(1, 2)
    descs = (q_desc, dout_desc, k_desc, v_desc, rows_desc, dq_desc)
    buffers = (q_buf, dout_buf, k_buf, v_buf, rows_buf, ds_buf, dq_buf, here)
    barriers = (full, empty, ds_full, dq_full, dq_empty, done)
    work = (dk_desc, dv_desc, grads, buffers, barriers, problem, scale, exp_scale)
    # the producer comes first: ptxas would hoist the first partition's addresses out of its loop, and spill them
    gl.warp_specialize(
        [
            (produce, (descs, buffers, barriers, problem, added_ptr, n_row_tile,
                       BLOCK_M, BLOCK_N, STAGES, ORDERED)),
            (_consume, (work, 0, BLOCK_M, BLOCK_N, HEAD_DIM, STAGES, VARLEN)),
            (_consume, (work, 1, BLOCK_M, BLOCK_N, HEAD_DIM, STAGES, VARLEN)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )  # fmt: skip


def count_row_tiles(q: Tensor, cu_seqlens_q: Tensor | None, T: int) -> int:
    """Row tiles of a head: each sequence has its own."""
    block_m = BLOCK_M[q.shape[-1]]
    if cu_seqlens_q is not None:
        return q.shape[0] // block_m + cu_seqlens_q.shape[0] - 1
    return q.shape[0] * triton.cdiv(T, block_m)


def supports(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu_seqlens_q: Tensor | None, softcap: float = 0.0
) -> str | None:
    """None where launch_backward computes these gradients on sm_90, else why it does not."""
    varlen = cu_seqlens_q is not None
    if q.dtype not in ELEMENT:
        return f"no {q.dtype} kernel"
    if q.shape[-1] not in (64, 128):
        return f"head size {q.shape[-1]}, not 64 or 128"
    if softcap != 0:
        return "softcap"
    if q.numel() == 0 or k.numel() == 0:
        return "no queries or no keys"
    if q.shape[1] * count_row_tiles(q, cu_seqlens_q, q.shape[-2]) * 2 * BLOCK_M[q.shape[-1]] >= 1 << 31:
        return "too many rows"
    tensors = (("q", q), ("k", k), ("v", v), ("dout", dout))
    return next((reason for name, x in tensors if (reason := tma_obstacle(name, x, varlen))), None)


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    T: int,
    S: int,
    left: int | None,
    right: int | None,
    scale: float,
    *,
    ordered: bool = True,
    group: int = GROUP,
) -> None:
    """Write dq, dk and dv, of any strides, for inputs that `supports` accepts, and delta where it is given.

    q, out, dout, dq: (B, H, T, D) or, with cu_seqlens_q and cu_seqlens_k, (total_q, H, D).  k, v, dk, dv: the same with
    K heads and S rows; T and S are then the longest lengths.  lse: log-sum-exp, -inf for rows that see no key;
    dlse: its gradient, or None; delta: rowsum(dout * out) - dlse; all fp32, (B, H, T) or (H, total_q), delta as lse.
    left, right: how far a query sees from its own position, None without end.
    ordered: add to dq in one order, bitwise the same in every run; else as the programs come.
    group: heads in flight together.
    """
    varlen = cu_seqlens_q is not None
    H, K, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    n_sequence = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
    block_m = BLOCK_M[head_dim]
    n_row_tile = count_row_tiles(q, cu_seqlens_q, T)

    def allocate(n: int, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided((n,), (1,), dtype=dtype, device=q.device)

    accumulator = allocate(H * n_row_tile * block_m * head_dim, torch.float32)
    rows = allocate(H * n_row_tile * 2 * block_m, torch.float32)
    added = allocate(H * n_row_tile, torch.int32) if ordered else None
    if not ordered:
        accumulator.zero_()

    # TMA writes these; where it cannot, as in gradients of another layout than k's, they are copied
    tiles_dk, tiles_dv = (
        x if tma_obstacle("x", x, varlen) is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (dk, dv)
    )
    strides = tuple([extents(x, varlen)[1] for x in (out, dout, dq, tiles_dk, tiles_dv)])
    row_strides = tuple([None if x is None else (0, *x.stride()) if varlen else x.stride() for x in (dlse, lse)])
    delta_plan, plan, dq_plan = planned(_plans, q)(
        varlen, n_sequence, n_row_tile, H, K, head_dim, strides, row_strides, T, S, left, right, scale, ordered, group
    )
    delta_plan(out, dout, lse, dlse, delta, rows, added, cu_seqlens_q)
    grads = tiles_dk, tiles_dv  # as they are described, and as they are
    plan(q, dout, k, v, rows, accumulator, *grads, *grads, added, cu_seqlens_q, cu_seqlens_k)
    dq_plan(accumulator, added, dq, cu_seqlens_q)
    for written, x in ((tiles_dk, dk), (tiles_dv, dv)):
        if written is not x:
            x.copy_(written)


@lru_cache(maxsize=512)
def _plans(
    varlen: bool, n_sequence: int, n_row_tile: int, H: int, K: int, head_dim: int, strides: tuple[tuple[int, ...], ...],
    row_strides: tuple[tuple[int, ...] | None, ...], T: int, S: int, left: int | None, right: int | None,
    scale: float, ordered: bool, group: int,
) -> tuple[Plan, Plan, Plan]:  # fmt: skip
    """The statistics, the gradients, the rounding of dq. strides: (b, h, row, d) of out, dout, dq and the tiles of dk
    and dv; row_strides: (b, h, row) of dlse, or None, and of lse.
    """
    block_m, n_tile = BLOCK_M[head_dim], triton.cdiv(S, BLOCK_N)
    of_out, of_dout, of_dq, of_dk, of_dv = strides
    of_dlse, of_lse = row_strides
    delta_plan = Plan(
        _flash_attention_delta_kernel,
        (n_sequence * H * triton.cdiv(T, block_m),),
        *(TENSOR,) * 4, None, *(TENSOR,) * 4, of_out, of_dout, of_dlse, of_lse,
        H, T, n_row_tile, head_dim, head_dim, block_m,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    # past both lengths a window is none; as they stand, the kernel counts in 32 bits
    left, right = (None if n is None else min(n, T + S) for n in (left, right))
    plan = Plan(
        _flash_attention_bwd_hopper_kernel,
        (n_sequence * K * n_tile,),
        *(boxes(rows, varlen) for rows in (block_m, block_m, BLOCK_N, BLOCK_N)),
        row_boxes(2 * block_m), line_boxes(block_m * head_dim // LINE.value),
        *(boxes(BLOCK_N // 2, varlen),) * 2,
        (TENSOR, TENSOR, of_dk, of_dv),
        TENSOR,
        n_row_tile,
        Problem(TENSOR, TENSOR, left, right, H, K, None, None, n_sequence * K, None, None),
        T, S, n_tile, group,
        scale,
        scale * math.log2(math.e),
        block_m, BLOCK_N, head_dim, STAGES, ordered, CONSUMER_REGISTERS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return delta_plan, plan, rounding_plan(of_dq, H, n_row_tile, n_sequence, T, scale, block_m, head_dim)
