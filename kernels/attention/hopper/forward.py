"""The forward kernel for Hopper, in the structure of FlashAttention-3 (Shah et al. 2024), written in Gluon.

The recurrence is that of portable/forward.py. What differs is who does what, and when. A program takes tiles of BLOCK_M
rows of queries (schedule.py: which, and when) and runs partitions of warps side by side:

    producer    one warp, 24 registers a thread (loads.py): says where the next tile stands, starts the TMA loads of its
                queries, then of keys and values block by block into a ring of STAGES slots each, whenever a slot comes
                free; then goes on to the next tile
    consumers   two warpgroups, 64 rows each, up to 240 registers: all of the arithmetic

Barriers, by who waits for whom (blocks.py explains parities):

    q_full[c]   consumer c waits for a tile's place and its rows of queries; one for each of Q_STAGES slots
    q_empty[c]  the producer waits for c's output, which leaves from where the queries were
    k_full[s]   consumers wait for the keys in slot s            k_empty[s]  the producer, for every consumer's q k^T
    v_full[s]   consumers wait for the values in slot s          v_empty[s]  the producer, for every consumer's p v
    v_clean     consumers wait for each other's part of the values past a packed sequence's end to be zeroed

Each consumer overlaps its softmax with its products. In step n, with z, p, o in registers:

    issue z = q k[n]^T            as soon as p v[n-2] is done: the tensor cores get work first
    o *= rescale, p -> bf16       under q k[n]^T
    wait v_full[n-1]; issue o += p v[n-1]
    wait until one product is left: z is there; arrive k_empty[n]
    mask z, p = exp2(z - m), m, l, rescale: under p v[n-1]
    wait k_full[n+1]
    wait until none is left: o is there; arrive v_empty[n-1]

p stays in fp32 from one step to the next: as bf16 it would be unpacked and packed again, 64 instructions a step. The
wait for the next keys stands where it does for a second reason: it ends a basic block, and without one ptxas moves the
wait for o above the exponentials, so that they run with idle tensor cores. Tests hold the machine code to both.

Between two tiles nothing waits for memory: with two slots for queries, the next tile's queries and first keys load
while the last products of this one run, and its output leaves under the next one's first product; q_empty follows
there. The other consumer's products fill what this one's last step leaves idle.

Blocks that the mask or the end of the keys cuts come first, the rightmost (under a causal mask the diagonal) before the
loop; whole ones follow unmasked.

TMA descriptors span the whole tensor as (b, h, row, d). A dense tile's rows past the end read as zeros and are not
written. In packed sequences they are the neighbour's: its keys are masked; its values meet p = 0, but 0 x inf is NaN,
so the consumers zero them in shared memory; and a tile of rows that crosses the end is stored by masked pointers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...launching import TENSOR, Made, Plan
from .blocks import (
    ELEMENT,
    boxes,
    extents,
    fence_async_shared,
    gl,
    gluon,
    masked_block,
    mbarrier,
    new_barriers,
    new_numbers,
    planned,
    row_layout,
    shared_number,
    slot,
    tma,
    tma_obstacle,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .loads import CONSUMERS, NUMBERS, Problem, Shared, produce, read_tile, with_lengths
from .schedule import Schedule, choose, section_heads, tile_counter

LN2: gl.constexpr = gl.constexpr(math.log(2))

# BLOCK_N, STAGES and Q_STAGES by head size: what compiles for sm_90 without a spill in the loop (triton 3.7) and,
# of that, has the least issue slots to a product. Four stages cover the latency of a load at D = 64, where a step is
# half as long. At D = 256 shared memory has room for one slot of queries.
TILES = {64: (128, 4, 2), 128: (128, 2, 2), 256: (64, 2, 1)}
BLOCK_M = 128  # rows of queries: 192 would waste 41 % of the causal tiles at T = 512, 128 waste 20 %

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # a thread: of 65,536, in multiples of 8


class Output(NamedTuple):
    """Where out and lse go, strides (b, h, row)."""

    out_ptr: Any
    out_strides: Any
    lse_ptr: Any
    lse_strides: Any


@gluon.jit
def _mask(z, i, j, lower, upper, S):
    """Scores z of queries i against keys j, -inf where hidden."""
    last = S - 1
    if upper is not None:
        last = gl.minimum(i + upper, last)[:, None]
    visible = j[None, :] <= last
    if lower is not None:
        visible = visible & (j[None, :] >= (i + lower)[:, None])
    return gl.where(visible, z, float("-inf"))


@gluon.jit
def _softmax(z, m_i, l_i, exp_scale, MASK: gl.constexpr):
    """Online softmax of the scores z in base 2: (p, factor of what was summed before, m, l).

    l is (64, 4), for each row what each of its four threads has summed: they meet once, after the loop. None before.
    """
    m_new = gl.maximum(m_i, gl.max(z, 1) * exp_scale)
    # a row that has seen no key yet has m = -inf: subtract 0 instead, since -inf - -inf is NaN
    shift = gl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = gl.exp2(z * exp_scale - shift[:, None])
    rescale = gl.exp2(m_i - shift)
    l_new = gl.sum(gl.sum(gl.reshape(p, [64, p.shape[1] // 8, 4, 2]), 3), 1)
    if l_i is not None:
        l_new += l_i * gl.convert_layout(rescale, row_layout(l_new))[:, None]
    return p, rescale, m_new, l_new


@gluon.jit
def _issue_scores(q, k):
    """Start q k^T: (64, D) x (BLOCK_N, D)."""
    BLOCK_N: gl.constexpr = k.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _issue_values(p, v, o, rescale):
    """Start o rescale + p v: (64, BLOCK_N) x (BLOCK_N, D)."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, v.shape[1], 16])
    o = o * gl.convert_layout(rescale, gl.SliceLayout(1, layout))[:, None]
    p = gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, layout, 2))
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def _clean_values(v, length, v_clean, parity, c: gl.constexpr):
    """Zero the rows of a block of values from `length` on, half by consumer 0 and half by 1, and wait for all."""
    HALF: gl.constexpr = v.shape[0] // 2
    HEAD_DIM: gl.constexpr = v.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    if c < 2:
        part = v.slice(c * HALF, HALF)
        j = c * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
        part.store(gl.where((j < length)[:, None], part.load(layout), 0.0))
        fence_async_shared()  # wgmma reads through the asynchronous proxy
    mbarrier.arrive(v_clean, count=1)
    mbarrier.wait(v_clean, parity)


@gluon.jit
def _store_output(o, lse, buffer, out_desc, output, tile, c: gl.constexpr, ROWS: gl.constexpr, VARLEN: gl.constexpr):
    """Rows c * 64 ... of the tile: o by TMA from where the queries were, or by masked pointers across a packed end."""
    first = tile.first + c * 64
    b, h = gl.cast(tile.b, gl.int64), gl.cast(tile.h, gl.int64)
    buffer.store(o.to(buffer.dtype))
    fence_async_shared()  # TMA reads it, or loads the next queries over it, through the asynchronous proxy
    if VARLEN and first + 64 > tile.T:
        HEAD_DIM: gl.constexpr = buffer.shape[1]
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        i = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
        cols = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
        out_ptr = output.out_ptr + b * output.out_strides[0] + h * output.out_strides[1]
        offsets = (tile.start_q + i).to(gl.int64) * output.out_strides[2]
        mask = (i < tile.T)[:, None] & (cols < HEAD_DIM)[None, :]
        gl.store(out_ptr + (offsets[:, None] + cols[None, :]), buffer.load(layout), mask=mask)
    else:
        tma_store(out_desc, [tile.b, tile.h, tile.start_q + first, 0], buffer)
    rows = gl.arange(0, 64, ROWS)
    lse_ptr = output.lse_ptr + b * output.lse_strides[0] + h * output.lse_strides[1]
    lse_offsets = (tile.start_q + first + rows).to(gl.int64) * output.lse_strides[2]
    gl.store(lse_ptr + lse_offsets, lse, mask=first + rows < tile.T)


@gluon.jit
def _release_output(s_q, shared, c: gl.constexpr, pred):
    """Wait until the output has been read from slot s_q, and hand the slot to the producer."""
    tma.store_wait(0)
    mbarrier.arrive(shared.q_empty.index(s_q * CONSUMERS + c), count=1, pred=pred)


@gluon.jit
def _consume_tile(
    s_q, g, n_done, n_clean, out_desc, output, shared, problem, exp_scale, c: gl.constexpr, BLOCK_N: gl.constexpr
):
    """Rows c * 64 ... of the tile whose queries are in slot s_q.

    Before it came g blocks of keys, n_done tiles and n_clean cleaned blocks of values; returns g and n_clean after it.
    """
    VARLEN: gl.constexpr = problem.cu_seqlens_q is not None
    STAGES: gl.constexpr = shared.k.shape[0]
    HEAD_DIM: gl.constexpr = shared.q.shape[2]
    Q_STAGES: gl.constexpr = shared.q.shape[0] // CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    q = shared.q.index(s_q * CONSUMERS + c)
    tile = read_tile(shared.place, s_q, problem)
    S = tile.S
    lower = None if problem.left is None else S - tile.T - problem.left
    upper = None if problem.right is None else S - tile.T + problem.right
    i = tile.first + c * 64 + gl.arange(0, 64, rows)
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    m_i = gl.full([64], float("-inf"), gl.float32, rows)
    o = gl.zeros([64, HEAD_DIM], gl.float32, o_layout)

    s, parity = slot(g, STAGES)
    mbarrier.wait(shared.k_full.index(s), parity)
    z = _issue_scores(q, shared.k.index(s))
    if VARLEN:
        n_valid = S - (tile.hi - 1) * BLOCK_N
        if n_valid < BLOCK_N:
            mbarrier.wait(shared.v_full.index(s), parity)
            _clean_values(shared.v.index(s), n_valid, shared.v_clean.index(0), n_clean & 1, c)
            n_clean += 1
    z = warpgroup_mma_wait(0, [z])
    mbarrier.arrive(shared.k_empty.index(s), count=1)
    if Q_STAGES > 1:
        _release_output(s_q ^ 1, shared, c, n_done > 0)
    z = _mask(z, i, (tile.hi - 1) * BLOCK_N + cols, lower, upper, S)
    p, rescale, m_i, l_i = _softmax(z, m_i, None, exp_scale, True)
    s_next, parity_next = slot(g + 1, STAGES)
    mbarrier.wait(shared.k_full.index(s_next), parity_next, pred=tile.n_block > 1)
    for MASK in gl.static_range(1, -1, -1):
        start = 1 if MASK else gl.maximum(tile.n_masked, 1)
        stop = tile.n_masked if MASK else tile.n_block
        for n in range(start, stop):
            s, parity = slot(g + n, STAGES)
            s_v, parity_v = slot(g + n - 1, STAGES)
            z = _issue_scores(q, shared.k.index(s))
            mbarrier.wait(shared.v_full.index(s_v), parity_v)
            o = _issue_values(p, shared.v.index(s_v), o, rescale)
            z = warpgroup_mma_wait(1, [z])
            mbarrier.arrive(shared.k_empty.index(s), count=1)
            if MASK:
                first_key = masked_block(n, tile.hi, tile.full_hi, tile.n_whole) * BLOCK_N
                z = _mask(z, i, first_key + cols, lower, upper, S)
            p, rescale, m_i, l_i = _softmax(z, m_i, l_i, exp_scale, MASK)
            s_next, parity_next = slot(g + n + 1, STAGES)
            mbarrier.wait(shared.k_full.index(s_next), parity_next, pred=n + 1 < tile.n_block)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(shared.v_empty.index(s_v), count=1)
    g += tile.n_block
    s, parity = slot(g - 1, STAGES)
    mbarrier.wait(shared.v_full.index(s), parity)
    o = warpgroup_mma_wait(0, [_issue_values(p, shared.v.index(s), o, rescale)])
    mbarrier.arrive(shared.v_empty.index(s), count=1)

    l_i = gl.convert_layout(gl.sum(l_i, 1), rows)
    l_i = gl.where(l_i == 0, 1.0, l_i)  # no visible key: o is 0 and m_i is -inf
    o = o * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
    lse = (m_i + gl.log2(l_i)) * LN2
    tile = read_tile(shared.place, s_q, problem)  # anew: kept over the loop, parts of it spill
    _store_output(o, lse, q, out_desc, output, tile, c, rows, VARLEN)
    if Q_STAGES == 1:
        _release_output(s_q, shared, c, True)
    return g, n_clean


@gluon.jit
def _next_place(n_done, shared, c: gl.constexpr):
    """(slot of the n_done-th tile, its number of blocks or 0 where there is none), once its queries are there."""
    s, parity = slot(n_done, shared.q.shape[0] // CONSUMERS)
    mbarrier.wait(shared.q_full.index(s * CONSUMERS + c), parity)
    return s, shared_number(shared.place, s * NUMBERS)


@gluon.jit
def _consume(out_desc, output, shared, problem, exp_scale, c: gl.constexpr, BLOCK_N: gl.constexpr):
    """Consumer warpgroup c."""
    g = 0
    n_done = 0
    n_clean = 0
    s_q, n_block = _next_place(n_done, shared, c)
    while n_block > 0:
        g, n_clean = _consume_tile(s_q, g, n_done, n_clean, out_desc, output, shared, problem, exp_scale, c, BLOCK_N)
        n_done += 1
        s_q, n_block = _next_place(n_done, shared, c)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "S", "n_tile", "group"])
def _flash_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, output, problem, T, S, n_tile, group, exp_scale, counter,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    SCHEDULE: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    problem = with_lengths(problem, T, S, n_tile, group)
    HEAD_DIM: gl.constexpr = q_desc.block_shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES * CONSUMERS, 64, HEAD_DIM], layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    place = new_numbers(Q_STAGES * NUMBERS)
    q_full = new_barriers(Q_STAGES * CONSUMERS, 1)
    q_empty = new_barriers(Q_STAGES * CONSUMERS, 1)
    k_full = new_barriers(STAGES, 1)
    k_empty = new_barriers(STAGES, CONSUMERS)
    v_full = new_barriers(STAGES, 1)
    v_empty = new_barriers(STAGES, CONSUMERS)
    v_clean = new_barriers(1, CONSUMERS)
    shared = Shared(q, k, v, place, q_full, q_empty, k_full, k_empty, v_full, v_empty, v_clean)
    gl.warp_specialize(
        [
            (_consume, (out_desc, output, shared, problem, exp_scale, 0, BLOCK_N)),
            (_consume, (out_desc, output, shared, problem, exp_scale, 1, BLOCK_N)),
            (produce, (q_desc, k_desc, v_desc, shared, problem, counter, BLOCK_M, BLOCK_N, SCHEDULE)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def supports(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, softcap: float = 0.0, has_sinks: bool = False
) -> str | None:
    """None where launch_forward computes this attention on sm_90, else why it does not."""
    if q.dtype not in ELEMENT:
        return f"no {q.dtype} kernel"
    if q.shape[-1] not in TILES:
        return f"head size {q.shape[-1]}, not {', '.join(map(str, TILES))}"
    if softcap != 0 or has_sinks:
        return "softcap" if softcap != 0 else "sinks"
    if q.numel() == 0 or k.numel() == 0:
        return "no queries or no keys"
    varlen = cu_seqlens_q is not None
    return next((why for name, x in (("q", q), ("k", k), ("v", v)) if (why := tma_obstacle(name, x, varlen))), None)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    T: int, S: int, left: int | None, right: int | None, scale: float, *, schedule: Schedule | None = None,
) -> None:  # fmt: skip
    """Write out and lse (natural log, fp32) for inputs that `supports` accepts; out = torch.empty_like(q).

    Shapes as in launch.py: (B, H, T, D), (B, K, S, D), lse (B, H, T), or packed (total, H, D), (total, K, D), lse
    (H, total) with cu_seqlens, int32 and contiguous. T, S: of the longest sequence.  left, right: how far a query sees
    from its own position, None without end.  A row with no visible key gives output 0 and lse -inf.
    schedule: how programs take tiles; None is what schedule.py chooses.
    """
    varlen = cu_seqlens_q is not None
    n_batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
    H, K, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    n_tile = n_batch * H * -(-T // BLOCK_M)
    if n_tile == 0:
        return
    schedule = schedule or choose(head_dim, n_tile, q.device)
    strides = extents(out, varlen)[1][:3], (0, *lse.stride()) if varlen else lse.stride()
    of = (q.dtype, q.device, varlen, n_batch, H, K, head_dim)
    plan = planned(_plan, q)(*of, *strides, T, S, left, right, scale, schedule)
    plan(q, k, v, out, out, lse, cu_seqlens_q, cu_seqlens_k)


@lru_cache(maxsize=512)
def _plan(
    dtype: torch.dtype, device: torch.device, varlen: bool, n_batch: int, H: int, K: int, head_dim: int,
    out_strides: tuple[int, ...], lse_strides: tuple[int, ...],
    T: int, S: int, left: int | None, right: int | None, scale: float, schedule: Schedule,
) -> Plan:  # fmt: skip
    """The launch but for q, k, v, out as it is described and as it is, lse and both cu_seqlens."""
    block_n, stages, q_stages = TILES[head_dim]
    n_head, n_tile = n_batch * H, -(-T // BLOCK_M)
    left, right = (None if bound is None else min(bound, T + S) for bound in (left, right))  # 32 bits
    return Plan(
        _flash_attention_fwd_hopper_kernel, (schedule.programs(n_head * n_tile, device),),
        boxes(64, varlen), boxes(block_n, varlen), boxes(block_n, varlen), boxes(64, varlen),
        Output(TENSOR, out_strides, TENSOR, lse_strides),
        Problem(TENSOR, TENSOR, left, right, H, K, None, None, n_head, None, None),
        T, S, n_tile, section_heads(S, head_dim, dtype.itemsize, H // K, n_head),
        scale * math.log2(math.e), Made(lambda: tile_counter(device)) if schedule.kind == "dynamic" else None,
        BLOCK_M=BLOCK_M, BLOCK_N=block_n, STAGES=stages, Q_STAGES=q_stages, SCHEDULE=schedule.kind,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
