"""The producer of the Hopper forward: which rows of queries come next, which blocks of keys they visit, their loads."""

from __future__ import annotations

from typing import Any, NamedTuple

from .blocks import block_order, gl, gluon, load_rows, masked_block, mbarrier, sequence, slot, tile_of


class Problem(NamedTuple):
    """What the rows of queries attend to."""

    cu_seqlens_q: Any  # None: a dense batch
    cu_seqlens_k: Any
    left: Any  # None: no bound
    right: Any
    H: Any
    K: Any
    T: Any  # of the longest sequence
    S: Any
    n_head: Any  # of all batches
    n_tile: Any  # tiles of rows in a head
    group: Any  # heads whose tiles start together


class Shared(NamedTuple):
    """Buffers and barriers in shared memory."""

    q: Any  # (consumers, 64, D)
    k: Any  # (STAGES, BLOCK_N, D)
    v: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    v_clean: Any
    turn: Any
    zero: Any  # a number, 0, that no compiler knows


class Tile(NamedTuple):
    """Rows first ... of head (b, h): batch or packed sequence b, and the blocks of keys they visit."""

    b: Any
    h: Any
    first: Any
    start_q: Any
    start_k: Any
    T: Any
    S: Any
    hi: Any
    full_hi: Any
    n_whole: Any
    n_masked: Any
    n_block: Any


@gluon.jit
def tile_at(t, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The t-th tile to start."""
    bh, m = tile_of(t, problem.n_tile, problem.n_head, problem.group)
    b = bh // problem.H
    first = m * BLOCK_M
    start_q, T = sequence(problem.cu_seqlens_q, b, problem.T)
    start_k, S = sequence(problem.cu_seqlens_k, b, problem.S)
    lower = None if problem.left is None else S - T - problem.left
    upper = None if problem.right is None else S - T + problem.right
    last = gl.minimum(first + BLOCK_M, T) - 1
    hi, full_hi, n_whole, n_masked, n_block = block_order(first, last, lower, upper, S, BLOCK_N)
    if problem.cu_seqlens_q is not None:
        b = 0  # one batch to the descriptors
    return Tile(b, bh % problem.H, first, start_q, start_k, T, S, hi, full_hi, n_whole, n_masked, n_block)


@gluon.jit
def _key_row(i, tile, BLOCK_N: gl.constexpr):
    """First row of the i-th block of keys that the tile visits."""
    masked = masked_block(i, tile.hi, tile.full_hi, tile.n_whole)
    n = gl.where(i < tile.n_masked, masked, tile.full_hi - 1 - (i - tile.n_masked))
    return tile.start_k + n * BLOCK_N


@gluon.jit
def _produce_tile(t, g, n_done, q_desc, k_desc, v_desc, shared, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Load the t-th tile's queries, then its blocks of keys and values, keys one block ahead, as they are used.

    Before it came g blocks of keys and n_done tiles; returns both as they are after it.
    """
    STAGES: gl.constexpr = shared.k.shape[0]
    tile = tile_at(t, problem, BLOCK_M, BLOCK_N)
    if tile.first < tile.T:
        h_k = tile.h // (problem.H // problem.K)
        for c in gl.static_range(BLOCK_M // 64):
            mbarrier.wait(shared.q_empty.index(c), (n_done & 1) ^ 1)
            row = tile.start_q + tile.first + c * 64
            load_rows(q_desc, tile.b, tile.h, row, shared.q_full.index(c), shared.q.index(c))
        for i in range(tile.n_block + 1):
            if i < tile.n_block:
                s, parity = slot(g + i, STAGES)
                mbarrier.wait(shared.k_empty.index(s), parity ^ 1)
                row = _key_row(i, tile, BLOCK_N)
                load_rows(k_desc, tile.b, h_k, row, shared.k_full.index(s), shared.k.index(s))
            if i > 0:
                s_v, parity_v = slot(g + i - 1, STAGES)
                mbarrier.wait(shared.v_empty.index(s_v), parity_v ^ 1)
                row_v = _key_row(i - 1, tile, BLOCK_N)
                load_rows(v_desc, tile.b, h_k, row_v, shared.v_full.index(s_v), shared.v.index(s_v))
        g += tile.n_block
        n_done += 1
    return g, n_done


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, shared, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PERSISTENT: gl.constexpr
):
    """The producer warp."""
    g = 0
    n_done = 0
    if PERSISTENT:
        for t in range(gl.program_id(0), problem.n_head * problem.n_tile, gl.num_programs(0)):
            g, n_done = _produce_tile(t, g, n_done, q_desc, k_desc, v_desc, shared, problem, BLOCK_M, BLOCK_N)
    else:
        _produce_tile(gl.program_id(0), g, n_done, q_desc, k_desc, v_desc, shared, problem, BLOCK_M, BLOCK_N)
