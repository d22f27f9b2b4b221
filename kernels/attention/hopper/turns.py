"""The producer of the Hopper backward: it loads the tiles, takes turns, and sends dq from shared memory to its sum.

TMA addresses are multiples of 16 bytes by construction, as hardware demands: rows of q, dout, k and v start at a
multiple of their stride, which `supports` looks at; what is kept for each row, and dq, stands by whole row tiles.

In packed sequences the last tile of rows holds the next sequence's too. They meet p = 0, but 0 x NaN is NaN: so they
are zeroed in shared memory before the consumers hear of the tile.
"""

from __future__ import annotations

from .blocks import (
    fence_async_global,
    fence_async_shared,
    first_row_tile,
    gl,
    gluon,
    mbarrier,
    slot,
    tma,
    tma_add,
    tma_load,
    tma_store,
    tma_written,
)
from .gradients import programs_before
from .place import place_of


@gluon.jit
def _zero_rows(tile, length):
    """Zero rows `length` .. of a tile in shared memory, a few at a time: the producer has few registers."""
    N: gl.constexpr = tile.shape[0]
    HEAD_DIM: gl.constexpr = tile.shape[1]
    ROWS: gl.constexpr = 1024 // HEAD_DIM
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    for i in gl.static_range(0, N, ROWS):
        if i + ROWS > length:
            part = tile.slice(i, ROWS)
            rows = i + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            part.store(gl.where((rows < length)[:, None], part.load(layout), 0.0))


@gluon.jit
def _landing(s, length, ROWS: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """Which of `full` counts the load of slot s: the next sequence's rows are to go before consumers see the others."""
    return gl.where(length < ROWS, STAGES, s) if VARLEN else s


@gluon.jit
def _clean(x, y, length, full, s, n_clean, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """Zero what slot s holds of the next sequence, rows `length` .. of x and y, and let the consumers have it."""
    ROWS: gl.constexpr = x.shape[2]
    HEAD_DIM: gl.constexpr = x.shape[3]
    if VARLEN and length < ROWS:
        mbarrier.wait(full.index(STAGES), n_clean & 1)
        _zero_rows(x.reshape([ROWS, HEAD_DIM]), length)
        _zero_rows(y.reshape([ROWS, HEAD_DIM]), length)
        fence_async_shared()  # wgmma reads through the asynchronous proxy
        mbarrier.arrive(full.index(s), count=1)
        n_clean += 1
    return n_clean


@gluon.jit
def _programs_in(counter):
    """How many programs have added to a row tile of dq, and what they added."""
    return gl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@gluon.jit
def _step(g, lo, n_block, tile, n_row_tile, BLOCK_M: gl.constexpr):
    """Query head of the group, first query and row tile of dq of the g-th step: head by head, the last rows first."""
    h = g // n_block
    m = lo + (n_block - 1 - (g - h * n_block)) * BLOCK_M
    return h, m, tile + h * n_row_tile + m // BLOCK_M


@gluon.jit
def produce(descs, buffers, barriers, problem, added_ptr, n_row_tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr, ORDERED: gl.constexpr):  # fmt: skip
    """Load the tiles, STAGES ahead, take turns and send dq away: step g adds tile g - 2 of dq and loads tile g.

    What takes long in a step runs at the same time: while the addition is on its way to memory, the loads start, and
    the counter says whether it is g - 1's turn. Measured on an H200 with one after the other, the producer took longer
    than the consumers (2026-11-27: 462 TFLOP/s at 8k, head size 128, of 543 without turns).
    """
    q_desc, dout_desc, k_desc, v_desc, rows_desc, dq_desc = descs
    q_buf, dout_buf, k_buf, v_buf, rows_buf, _, dq_buf, here = buffers
    full, empty, _, dq_full, dq_empty, _ = barriers
    VARLEN: gl.constexpr = problem.cu_seqlens_q is not None
    LINES: gl.constexpr = dq_desc.block_shape[0]
    gl.static_assert(STAGES == 2)
    b, h_kv, group, first, start_q, start_k, T, S, lo, _, _, n_block = place_of(here)
    left = problem.left
    tile = h_kv * group * n_row_tile + first_row_tile(problem.cu_seqlens_q, b, start_q, T, BLOCK_M)
    if VARLEN:
        b = 0
    n_clean = 0
    if n_block > 0:
        into = _landing(STAGES + 1, S - first, BLOCK_N, STAGES, VARLEN)
        mbarrier.expect(full.index(into), 2 * k_desc.block_type.nbytes)
        tma_load(k_desc, [b, h_kv, start_k + first, 0], full.index(into), k_buf.index(0))
        tma_load(v_desc, [b, h_kv, start_k + first, 0], full.index(into), v_buf.index(0))
        n_clean = _clean(k_buf.index(0), v_buf.index(0), S - first, full, STAGES + 1, n_clean, STAGES, VARLEN)
    n_step = group * n_block
    last_tile = 0  # of dq: g - 2's, and how many programs were to add to it before
    last_before = 0
    for g in range(n_step + 2):
        s, parity = slot(g, STAGES)
        if g >= 2:
            mbarrier.wait(dq_full.index(0), g & 1)
            if ORDERED:
                fence_async_global()
            if ORDERED and last_before == 0:
                tma_store(dq_desc, [last_tile * LINES, 0], dq_buf.index(0))  # what was there is not zeroed before
            else:
                tma_add(dq_desc, [last_tile * LINES, 0], dq_buf.index(0))
        if g < n_step:
            h, m, row_tile = _step(g, lo, n_block, tile, n_row_tile, BLOCK_M)
            into = _landing(s, T - m, BLOCK_M, STAGES, VARLEN)
            h += h_kv * group
            mbarrier.wait(empty.index(s), parity ^ 1)
            mbarrier.expect(full.index(into), 2 * q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma_load(q_desc, [b, h, start_q + m, 0], full.index(into), q_buf.index(s))
            tma_load(dout_desc, [b, h, start_q + m, 0], full.index(into), dout_buf.index(s))
            tma_load(rows_desc, [row_tile * (2 * BLOCK_M)], full.index(into), rows_buf.index(s))
            n_clean = _clean(q_buf.index(s), dout_buf.index(s), T - m, full, s, n_clean, STAGES, VARLEN)
        next_tile = 0
        before = 0
        n_in = 0
        if (g >= 1) & (g <= n_step):
            _, m, next_tile = _step(g - 1, lo, n_block, tile, n_row_tile, BLOCK_M)
            if ORDERED:
                before = programs_before(first, m, left, T, S, BLOCK_N)
                n_in = _programs_in(added_ptr + next_tile)
        if g >= 2:
            if ORDERED:
                tma_written()
                gl.atomic_add(added_ptr + last_tile, 1, sem="release", scope="gpu")
            else:
                tma.store_wait(0)
            mbarrier.arrive(dq_empty.index(0), count=1)
        if ORDERED:
            while n_in != before:
                n_in = _programs_in(added_ptr + next_tile)
        last_tile = next_tile
        last_before = before
