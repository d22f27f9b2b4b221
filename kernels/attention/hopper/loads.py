"""The producer of the Hopper forward: where the next tile of queries stands, which blocks of keys it visits, the loads.

It alone works out where a tile stands; consumers read it from shared memory once the tile's queries are there. So they
spend neither time nor registers on it: a read stays where it stands, what follows from a kernel's arguments alone is
worked out early and kept over the loop, or spilled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .blocks import (
    block_order,
    gl,
    gluon,
    load_rows,
    masked_block,
    mbarrier,
    sequence,
    shared_number,
    slot,
    tile_of,
    write_number,
)
from .schedule import next_tile


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


@gluon.jit
def with_lengths(problem, T, S, n_tile, group):
    """The problem with what follows from lengths: arguments that Triton does not specialise on, as it does on all that
    stands in a tuple, so that each new class of lengths (1, multiples of 16, others) would compile anew.
    """
    p = problem
    return Problem(p.cu_seqlens_q, p.cu_seqlens_k, p.left, p.right, p.H, p.K, T, S, p.n_head, n_tile, group)


class Shared(NamedTuple):
    """Buffers and barriers in shared memory."""

    q: Any  # (Q_STAGES * CONSUMERS, 64, D); the output leaves from here too
    k: Any  # (STAGES, BLOCK_N, D)
    v: Any
    place: Any  # (Q_STAGES * NUMBERS, 1), the numbers of a tile
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    v_clean: Any


class Tile(NamedTuple):
    """Rows first ... of head (b, h): batch or packed sequence b, and the blocks of keys they visit."""

    n_block: Any  # first among the numbers in shared memory: 0 ends the program
    b: Any
    h: Any
    first: Any
    hi: Any
    full_hi: Any
    n_whole: Any
    n_masked: Any
    start_q: Any
    start_k: Any
    T: Any
    S: Any


CONSUMERS: gl.constexpr = gl.constexpr(2)  # warpgroups, 64 rows each
NUMBERS: gl.constexpr = gl.constexpr(len(Tile._fields))
DENSE_NUMBERS: gl.constexpr = gl.constexpr(Tile._fields.index("start_q"))  # the rest is known where nothing is packed


@gluon.jit
def _tile_at(t, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
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
    return Tile(n_block, b, bh % problem.H, first, hi, full_hi, n_whole, n_masked, start_q, start_k, T, S)


@gluon.jit
def read_tile(place, s, problem):
    """The tile whose queries are in slot s."""
    at = s * NUMBERS
    n_block = shared_number(place, at)
    b = shared_number(place, at + 1)
    h = shared_number(place, at + 2)
    first = shared_number(place, at + 3)
    hi = shared_number(place, at + 4)
    full_hi = shared_number(place, at + 5)
    n_whole = shared_number(place, at + 6)
    n_masked = shared_number(place, at + 7)
    if problem.cu_seqlens_q is None:
        start_q, start_k, T, S = 0, 0, problem.T, problem.S
    else:
        start_q = shared_number(place, at + 8)
        start_k = shared_number(place, at + 9)
        T = shared_number(place, at + 10)
        S = shared_number(place, at + 11)
    return Tile(n_block, b, h, first, hi, full_hi, n_whole, n_masked, start_q, start_k, T, S)


@gluon.jit
def _key_row(i, tile, BLOCK_N: gl.constexpr):
    """First row of the i-th block of keys that the tile visits."""
    masked = masked_block(i, tile.hi, tile.full_hi, tile.n_whole)
    n = gl.where(i < tile.n_masked, masked, tile.full_hi - 1 - (i - tile.n_masked))
    return tile.start_k + n * BLOCK_N


@gluon.jit
def _take_slot(n_done, shared):
    """The slot of the n_done-th tile, once the output of the tile that was there has left."""
    s, parity = slot(n_done, shared.q.shape[0] // CONSUMERS)
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(shared.q_empty.index(s * CONSUMERS + c), parity ^ 1)
    return s


@gluon.jit
def _load_queries(q_desc, tile, s, shared, c: gl.constexpr):
    row = tile.start_q + tile.first + c * 64
    q = s * CONSUMERS + c
    load_rows(q_desc, tile.b, tile.h, row, shared.q_full.index(q), shared.q.index(q))


@gluon.jit
def _produce_tile(tile, g, n_done, q_desc, k_desc, v_desc, shared, problem, BLOCK_N: gl.constexpr):
    """Load a tile's queries, then its blocks of keys and values, keys one block ahead, as they are used.

    Before it came g blocks of keys and n_done tiles.
    """
    STAGES: gl.constexpr = shared.k.shape[0]
    h_k = tile.h // (problem.H // problem.K)
    s_q = _take_slot(n_done, shared)
    for n in gl.static_range(NUMBERS if problem.cu_seqlens_q is not None else DENSE_NUMBERS):
        write_number(shared.place, s_q * NUMBERS + n, tile[n], 1)
    _load_queries(q_desc, tile, s_q, shared, 0)  # with the first keys, all that consumer 0 needs to start
    for i in range(tile.n_block + 1):
        if i < tile.n_block:
            s, parity = slot(g + i, STAGES)
            mbarrier.wait(shared.k_empty.index(s), parity ^ 1)
            row = _key_row(i, tile, BLOCK_N)
            load_rows(k_desc, tile.b, h_k, row, shared.k_full.index(s), shared.k.index(s))
        if i == 0:
            for c in gl.static_range(1, CONSUMERS):
                _load_queries(q_desc, tile, s_q, shared, c)
        else:
            s_v, parity_v = slot(g + i - 1, STAGES)
            mbarrier.wait(shared.v_empty.index(s_v), parity_v ^ 1)
            row_v = _key_row(i - 1, tile, BLOCK_N)
            load_rows(v_desc, tile.b, h_k, row_v, shared.v_full.index(s_v), shared.v.index(s_v))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, shared, problem, counter,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SCHEDULE: gl.constexpr,
):  # fmt: skip
    """The producer warp."""
    n_tile = problem.n_head * problem.n_tile
    g = 0
    n_taken = 0
    n_done = 0
    t = gl.program_id(0)
    while t < n_tile:
        tile = _tile_at(t, problem, BLOCK_M, BLOCK_N)
        if tile.first < tile.T:
            _produce_tile(tile, g, n_done, q_desc, k_desc, v_desc, shared, problem, BLOCK_N)
            g += tile.n_block
            n_done += 1
        n_taken += 1
        t = next_tile(n_taken, n_tile, counter, SCHEDULE)
    s = _take_slot(n_done, shared)
    write_number(shared.place, s * NUMBERS, 0, 1)
    for c in gl.static_range(CONSUMERS):
        mbarrier.arrive(shared.q_full.index(s * CONSUMERS + c), count=1)
