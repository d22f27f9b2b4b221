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
    n_tile: Any  # tiles of rows in a head, or in the longest packed sequence
    group: Any  # heads whose tiles start together
    n_sequence: Any = None  # the forward's alone: how many are packed, n_head being those of one


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
def _packed_tiles(problem, n_sequence, above, most, BLOCK_M: gl.constexpr):
    """Of the first n_sequence sequences, the row tiles from the `above`-th on, at most `most` of each: how many."""
    ends = problem.cu_seqlens_q
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])  # the producer warp
    total = 0
    for first in range(0, n_sequence, 32):
        b = first + gl.arange(0, 32, layout)
        start = gl.load(ends + b, mask=b < n_sequence, other=0)
        stop = gl.load(ends + b + 1, mask=b < n_sequence, other=0)
        n = gl.minimum((stop - start + BLOCK_M - 1) // BLOCK_M, problem.n_tile) - above
        total += gl.sum(gl.minimum(gl.maximum(n, 0), most), 0)
    return total


@gluon.jit
def _packed_place(i, problem, BLOCK_M: gl.constexpr):
    """(sequence, row tile) of the i-th row tile of a head, in the order of row tiles, then of sequences.

    Lengths 300, 100 and 200 have the tiles (0, 0) (1, 0) (2, 0) (0, 1) (2, 1) (0, 2). By bisection, since an order of
    the sequences' padded tiles would be mostly tiles that are not there.
    """
    n = problem.n_sequence
    n_tile = _packed_tiles(problem, n, 0, problem.n_tile, BLOCK_M)
    m = 0
    too_high = problem.n_tile
    before = 0  # tiles in rows below m
    while too_high - m > 1:
        middle = (m + too_high) // 2
        below = n_tile - _packed_tiles(problem, n, middle, problem.n_tile, BLOCK_M)
        m = gl.where(below <= i, middle, m)
        before = gl.where(below <= i, below, before)
        too_high = gl.where(below <= i, too_high, middle)
    b = 0
    too_high = n
    while too_high - b > 1:
        middle = (b + too_high) // 2
        reached = before + _packed_tiles(problem, middle, m, 1, BLOCK_M) <= i
        b = gl.where(reached, middle, b)
        too_high = gl.where(reached, too_high, middle)
    return b, m


@gluon.jit
def _count_tiles(problem, BLOCK_M: gl.constexpr):
    """Row tiles of a head, of all packed sequences."""
    if problem.n_sequence is None:
        n = problem.n_tile
    else:
        n = _packed_tiles(problem, problem.n_sequence, 0, problem.n_tile, BLOCK_M)
    return n


@gluon.jit
def _tile_at(t, n_row_tile, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The t-th tile to start, of n_row_tile in each head."""
    bh, m = tile_of(t, n_row_tile, problem.n_head, problem.group)
    if problem.n_sequence is None:
        b, h = bh // problem.H, bh % problem.H
    else:
        h = bh
        b, m = _packed_place(m, problem, BLOCK_M)
    first = m * BLOCK_M
    start_q, T = sequence(problem.cu_seqlens_q, b, problem.T)
    start_k, S = sequence(problem.cu_seqlens_k, b, problem.S)
    lower = None if problem.left is None else S - T - problem.left
    upper = None if problem.right is None else S - T + problem.right
    last = gl.minimum(first + BLOCK_M, T) - 1
    hi, full_hi, n_whole, n_masked, n_block = block_order(first, last, lower, upper, S, BLOCK_N)
    if problem.n_sequence is not None:
        b = 0  # one batch to the descriptors
    return Tile(n_block, b, h, first, hi, full_hi, n_whole, n_masked, start_q, start_k, T, S)


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
    n_row_tile = _count_tiles(problem, BLOCK_M)
    n_tile = problem.n_head * n_row_tile
    g = 0
    n_done = 0
    t = gl.program_id(0)
    while t < n_tile:
        tile = _tile_at(t, n_row_tile, problem, BLOCK_M, BLOCK_N)
        _produce_tile(tile, g, n_done, q_desc, k_desc, v_desc, shared, problem, BLOCK_N)
        g += tile.n_block
        n_done += 1
        t = next_tile(n_done, n_tile, counter, SCHEDULE)
    s = _take_slot(n_done, shared)
    write_number(shared.place, s * NUMBERS, 0, 1)
    for c in gl.static_range(CONSUMERS):
        mbarrier.arrive(shared.q_full.index(s * CONSUMERS + c), count=1)
