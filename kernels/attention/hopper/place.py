"""Where a program of the Hopper backward stands: worked out once, then read from shared memory whenever it is needed.

What follows from a kernel's arguments and the program's number alone, LLVM and ptxas work out before the partitions
part, or keep from a loop's beginning for its end; consumers whose accumulators fill their registers spill it. A read of
shared memory stays where it stands.
"""

from __future__ import annotations

from .blocks import gl, gluon, sequence, share_numbers, shared_number, tile_of, visible_blocks


@gluon.jit
def find_place(problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where this program stands, as numbers in shared memory: what `place_of` and `unknown_zero` read."""
    K, left, right, n_tile = problem.K, problem.left, problem.right, problem.n_tile
    head, n = tile_of(gl.program_id(0), n_tile, problem.n_head, problem.group)
    first = (n_tile - 1 - n) * BLOCK_N
    b = head // K
    start_q, T = sequence(problem.cu_seqlens_q, b, problem.T)
    start_k, S = sequence(problem.cu_seqlens_k, b, problem.S)
    # key j is seen by the queries j - upper .. j - lower
    first_query = None if right is None else T - S - right
    last_query = None if left is None else T - S + left
    lo, full_lo, full_hi, hi = visible_blocks(
        first, gl.minimum(first + BLOCK_N, S) - 1, first_query, last_query, T, BLOCK_M
    )
    if first + BLOCK_N > S:  # keys past the end would reach dq
        full_hi = full_lo
    n_block = gl.where(first < S, gl.maximum(hi - lo + BLOCK_M - 1, 0) // BLOCK_M, 0)
    group = problem.H // K
    return share_numbers((b, head % K, group, first, start_q, start_k, T, S, lo, full_lo, full_hi, n_block, 0))


@gluon.jit
def place_of(here):
    """b, key-value head, query heads of its group, first key, the sequence's first rows and lengths, query tiles."""
    b = shared_number(here, 0)
    h_kv = shared_number(here, 1)
    group = shared_number(here, 2)
    first = shared_number(here, 3)
    start_q = shared_number(here, 4)
    start_k = shared_number(here, 5)
    T = shared_number(here, 6)
    S = shared_number(here, 7)
    lo = shared_number(here, 8)
    full_lo = shared_number(here, 9)
    full_hi = shared_number(here, 10)
    n_block = shared_number(here, 11)
    return b, h_kv, group, first, start_q, start_k, T, S, lo, full_lo, full_hi, n_block


@gluon.jit
def unknown_zero(here):
    """0, which no compiler knows: what a loop indexes by it has its address made there, not kept from before."""
    return shared_number(here, 12)
