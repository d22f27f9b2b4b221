"""How a tile's output leaves the Hopper forward: divided by its sum, from where the tile's queries were."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .blocks import fence_async_shared, gl, gluon, mbarrier, tma, tma_store
from .loads import CONSUMERS, read_tile

LN2: gl.constexpr = gl.constexpr(math.log(2))


class Output(NamedTuple):
    """Where out and lse go, strides (b, h, row)."""

    out_ptr: Any
    out_strides: Any
    lse_ptr: Any
    lse_strides: Any


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
def finish(o, m_i, l_i, s_q, out_desc, output, shared, problem, c: gl.constexpr, ROWS: gl.constexpr):
    """Divide o by its sum, and let it and the log-sum-exp leave."""
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, o.shape[1], 16])
    l_i = gl.convert_layout(gl.sum(l_i, 1), ROWS)
    l_i = gl.where(l_i == 0, 1.0, l_i)  # no visible key: o is 0 and m_i is -inf
    o = o * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, o_layout))[:, None]
    lse = (m_i + gl.log2(l_i)) * LN2
    tile = read_tile(shared.place, s_q, problem)  # anew: kept over the loop, parts of it spill
    buffer = shared.q.index(s_q * CONSUMERS + c)
    _store_output(o, lse, buffer, out_desc, output, tile, c, ROWS, problem.cu_seqlens_q is not None)


@gluon.jit
def release_output(s_q, shared, c: gl.constexpr, pred):
    """Wait until the output has been read from slot s_q, and hand the slot to the producer."""
    tma.store_wait(0)
    mbarrier.arrive(shared.q_empty.index(s_q * CONSUMERS + c), count=1, pred=pred)
