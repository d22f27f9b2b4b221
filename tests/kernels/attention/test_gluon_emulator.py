"""The Gluon emulator itself: small kernels that are right run, and each way of being wrong is named."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rooflight.kernels.attention.hopper.blocks import tma_add, tma_written
from support.gluon_emulator import DeadlockError, ProtocolError, RaceError, emulated
from support.gluon_values import Int, Long, integer

pytestmark = pytest.mark.cpu

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def describe(x: Tensor, rows: int = 64) -> Any:
    return TensorDescriptor.from_tensor(x, [rows, x.shape[1]], LAYOUT)


def run(kernel: Any, *args: Any, seed: int = 0, grid: tuple[int, ...] = (1,), **constants: Any) -> None:
    module = sys.modules[__name__]
    name = kernel.fn.__name__
    with emulated(module, seed=seed):
        getattr(module, name)[grid](*args, **constants)


def run_all(kernel: Any, *args: Any, seeds: int = 12, **constants: Any) -> None:
    for seed in range(seeds):
        run(kernel, *args, seed=seed, **constants)


# ---------------------------------------------------------------- TMA


@gluon.jit
def _copy_kernel(x_desc, y_desc, row, to, EXPECTED: gl.constexpr, WAIT: gl.constexpr, STORE_WAIT: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    mbarrier.init(full, count=1)
    mbarrier.expect(full, EXPECTED)
    load(x_desc, [row, 0], full, tile)
    if WAIT:
        mbarrier.wait(full, 0)
    store(y_desc, [to, 0], tile)
    if STORE_WAIT:
        tma.store_wait(0)


BYTES = 64 * 64 * 2


def copy(row: int = 0, to: int = 0, EXPECTED: int = BYTES, WAIT: bool = True, STORE_WAIT: bool = True) -> Any:
    x = torch.randn(100, 64).bfloat16()
    y = torch.full_like(x, 7.0)
    run_all(_copy_kernel, describe(x), describe(y), row, to, EXPECTED=EXPECTED, WAIT=WAIT, STORE_WAIT=STORE_WAIT)
    return x, y


@pytest.mark.parametrize("row", [0, 60, 100, 1000, -20, -64])
def test_a_load_reads_zeros_outside(row: int) -> None:
    x, y = copy(row)
    rows = torch.arange(row, row + 64)
    inside = (rows >= 0) & (rows < 100)
    assert torch.equal(y[:64], torch.where(inside[:, None], x[rows.clamp(0, 99)], 0))
    assert (y[64:] == 7).all()


@pytest.mark.parametrize("to", [50, 99, 100, -10])
def test_a_store_writes_nothing_outside(to: int) -> None:
    x, y = copy(to=to)
    for row in range(100):
        expected = x[row - to] if 0 <= row - to < 64 else torch.full((64,), 7.0)
        assert torch.equal(y[row], expected.bfloat16()), row


def test_a_buffer_read_while_it_loads() -> None:
    with pytest.raises(RaceError, match="reads tile while a TMA load into it is in flight"):
        copy(WAIT=False)


def test_a_program_that_ends_before_its_store() -> None:
    with pytest.raises(ProtocolError, match="1 TMA stores in flight"):
        copy(STORE_WAIT=False)


def test_more_bytes_than_expected() -> None:
    with pytest.raises(ProtocolError, match=f"tile that full.* has {BYTES} bytes, of which {BYTES // 2} are expected"):
        copy(EXPECTED=BYTES // 2)


def test_fewer_bytes_than_expected() -> None:
    with pytest.raises(DeadlockError, match=r"waits for full\[0\] with parity 0"):
        copy(EXPECTED=2 * BYTES)


@gluon.jit
def _flat_copy_kernel(x_desc, y_desc, at, to):
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    mbarrier.init(full, count=1)
    mbarrier.expect(full, x_desc.block_type.nbytes)
    load(x_desc, [at], full, tile)
    mbarrier.wait(full, 0)
    store(y_desc, [to], tile)
    tma.store_wait(0)


def flat_copy(at: int, to: int, dtype: torch.dtype = torch.float32) -> None:
    x, y = torch.arange(100).to(dtype), torch.zeros(100, dtype=dtype)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=1)
    run_all(_flat_copy_kernel, *(TensorDescriptor(z, [100], [1], [32], layout) for z in (x, y)), at, to)
    assert torch.equal(y[to : to + 32], x[at : at + 32])


def test_an_address_is_a_multiple_of_16_bytes() -> None:
    flat_copy(8, 64)
    flat_copy(4, 64)
    flat_copy(8, 64, torch.bfloat16)
    for at, to in ((1, 64), (6, 64), (8, 63), (8, 2)):
        with pytest.raises(ProtocolError, match=r"no multiple of 16 bytes: coordinates \[\d+\] of \[100\]"):
            flat_copy(at, to)
    with pytest.raises(ProtocolError, match="no multiple of 16 bytes"):
        flat_copy(4, 64, torch.bfloat16)


@gluon.jit
def _fill_kernel(y_desc, FENCE: gl.constexpr, OVERWRITE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_shape, y_desc.layout)
    ones = gl.full([64, 64], 1.0, gl.bfloat16, layout)
    tile.store(ones)
    if FENCE:
        fence_async_shared()
    store(y_desc, [0, 0], tile)
    if OVERWRITE:
        tile.store(ones + ones)
    tma.store_wait(0)


def test_a_store_needs_a_fence_after_the_buffer_was_written() -> None:
    y = torch.zeros(64, 64).bfloat16()
    run_all(_fill_kernel, describe(y), FENCE=True, OVERWRITE=False)
    assert (y == 1).all()
    with pytest.raises(RaceError, match="written with no fence_async_shared since"):
        run(_fill_kernel, describe(y), FENCE=False, OVERWRITE=False)


def test_a_buffer_written_under_its_store() -> None:
    with pytest.raises(RaceError, match="may still read it"):
        run_all(_fill_kernel, describe(torch.zeros(64, 64).bfloat16()), FENCE=True, OVERWRITE=True)


@gluon.jit
def _add(y_desc, tile, added, WRITTEN: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    tile.store(gl.full([64, 32], 1.0, gl.float32, layout))
    fence_async_shared()
    tma_add(y_desc, [0, 0], tile)
    tma.store_wait(0)
    if WRITTEN:
        tma_written()
    mbarrier.arrive(added, count=1)


@gluon.jit
def _look(y_ptr, seen_ptr, added):
    mbarrier.wait(added, 0)
    gl.store(seen_ptr, gl.load(y_ptr))


@gluon.jit
def _add_kernel(y_desc, y_ptr, seen_ptr, WRITTEN: gl.constexpr):
    tile = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_shape, y_desc.layout)
    added = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(added, count=1)
    gl.warp_specialize([(_add, (y_desc, tile, added, WRITTEN)), (_look, (y_ptr, seen_ptr, added))], [4], [128])


def seen_after_addition(WRITTEN: bool) -> set[float]:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    found = set()
    for seed in range(20):
        y, seen = torch.full((64, 32), 5.0), torch.zeros(1)
        run(_add_kernel, TensorDescriptor.from_tensor(y, [64, 32], layout), y, seen, seed=seed, WRITTEN=WRITTEN)
        assert (y == 6).all()
        found.add(seen.item())
    return found


def test_a_buffer_is_read_before_its_addition_is_written() -> None:
    assert seen_after_addition(WRITTEN=True) == {6.0}
    assert seen_after_addition(WRITTEN=False) == {5.0, 6.0}


# ---------------------------------------------------------------- wgmma


@gluon.jit
def _product_kernel(a_desc, b_desc, c_ptr, OUTSTANDING: gl.constexpr, RELOAD: gl.constexpr, FINISH: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    a = gl.allocate_shared_memory(a_desc.dtype, a_desc.block_shape, a_desc.layout)
    b = gl.allocate_shared_memory(b_desc.dtype, b_desc.block_shape, b_desc.layout)
    mbarrier.init(full, count=1)
    mbarrier.expect(full, 2 * a_desc.block_type.nbytes)
    load(a_desc, [0, 0], full, a)
    load(b_desc, [0, 0], full, b)
    mbarrier.wait(full, 0)
    zero = gl.zeros([64, 64], gl.float32, layout)
    c = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    c = warpgroup_mma(a, b.permute((1, 0)), c, is_async=True)
    if RELOAD:
        mbarrier.expect(full, a_desc.block_type.nbytes)
        load(b_desc, [0, 0], full, b)
        mbarrier.wait(full, 1)
    if FINISH:
        c = warpgroup_mma_wait(OUTSTANDING, [c])
        rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
        cols = gl.arange(0, 64, gl.SliceLayout(0, layout))
        gl.store(c_ptr + rows[:, None] * 64 + cols[None, :], c)


def product(OUTSTANDING: int = 0, RELOAD: bool = False, FINISH: bool = True) -> None:
    a, b = (torch.randn(64, 64).bfloat16() for _ in "ab")
    c = torch.empty(64, 64)
    run_all(_product_kernel, describe(a), describe(b), c, OUTSTANDING=OUTSTANDING, RELOAD=RELOAD, FINISH=FINISH)
    torch.testing.assert_close(c, 2 * a.float() @ b.float().mT)


def test_products_accumulate_in_fp32() -> None:
    product()


def test_an_accumulator_used_in_flight() -> None:
    with pytest.raises(RaceError, match="accumulator whose wgmma is still in flight"):
        product(OUTSTANDING=1)


def test_an_operand_reloaded_in_flight() -> None:
    with pytest.raises(RaceError, match="writes b while a wgmma or a TMA store may still read it"):
        product(RELOAD=True)


def test_a_program_that_ends_before_its_product() -> None:
    with pytest.raises(ProtocolError, match="2 wgmmas"):
        product(FINISH=False)


# ---------------------------------------------------------------- mbarriers and schedules


@gluon.jit
def _give(count_ptr, there, back, N: gl.constexpr, PARITY: gl.constexpr, COUNT: gl.constexpr):
    for i in range(N):
        gl.store(count_ptr, gl.load(count_ptr) + 1)
        mbarrier.arrive(there, count=COUNT)
        mbarrier.wait(back, (i + PARITY) & 1)


@gluon.jit
def _take(count_ptr, there, back, N: gl.constexpr):
    for i in range(N):
        mbarrier.wait(there, i & 1)
        gl.store(count_ptr, gl.load(count_ptr) * 2)
        mbarrier.arrive(back, count=1)


@gluon.jit
def _table_tennis_kernel(
    count_ptr,
    N: gl.constexpr,
    PARITY: gl.constexpr,
    COUNT: gl.constexpr,
    INIT: gl.constexpr,
):
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    back = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if INIT:
        mbarrier.init(there, count=1)
    mbarrier.init(back, count=1)
    give = (count_ptr, there, back, N, PARITY, COUNT)
    gl.warp_specialize([(_give, give), (_take, (count_ptr, there, back, N))], [4], [128])


def table_tennis(seed: int, PARITY: int = 0, COUNT: int = 1, N: int = 5, INIT: bool = True) -> int:
    count = torch.zeros(1, dtype=torch.int64)
    run(_table_tennis_kernel, count, seed=seed, N=N, PARITY=PARITY, COUNT=COUNT, INIT=INIT)
    return int(count)


def test_barriers_order_partitions_in_every_schedule() -> None:
    assert {table_tennis(seed) for seed in range(20)} == {62}  # x -> 2 (x + 1), five times


@gluon.jit
def _put(out_ptr, barrier, VALUE: gl.constexpr):
    mbarrier.arrive(barrier, count=1)
    gl.store(out_ptr, gl.load(out_ptr) * 10 + VALUE)


@gluon.jit
def _race_kernel(out_ptr):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    gl.warp_specialize([(_put, (out_ptr, barrier, 1)), (_put, (out_ptr, barrier, 2))], [4], [128])


def race(seed: int) -> int:
    out = torch.zeros(1, dtype=torch.int64)
    run(_race_kernel, out, seed=seed)
    return int(out)


def test_a_schedule_comes_back_from_its_seed() -> None:
    found = [race(seed) for seed in range(20)]
    assert set(found) == {12, 21}
    assert found == [race(seed) for seed in range(20)]


def test_a_deadlock_names_who_waits_for_what() -> None:
    with pytest.raises(DeadlockError, match=r"partition 0 \(_give\) waits for back\[0\] with parity \d"):
        table_tennis(0, PARITY=1, N=3)


def test_too_many_arrivals() -> None:
    with pytest.raises(ProtocolError, match=r"there\[0\]: 2 arrivals where 1 are missing"):
        table_tennis(0, COUNT=2)


def test_a_barrier_used_before_it_is_initialised() -> None:
    with pytest.raises(ProtocolError, match=r"there\[0\] is used before mbarrier\.init"):
        table_tennis(0, INIT=False)


@gluon.jit
def _where_kernel(out_ptr):
    i = gl.program_id(0) + 2 * gl.program_id(1)
    gl.store(out_ptr + i, i * 10 + gl.num_programs(1))


def test_programs_know_where_they_are() -> None:
    out = torch.zeros(6, dtype=torch.int32)
    run(_where_kernel, out, grid=(2, 3))
    assert out.tolist() == [3, 13, 23, 33, 43, 53]


def test_pointers_stay_in_their_tensor() -> None:
    with pytest.raises(IndexError, match="offsets 5 to 5 in 5 elements"):
        run(_where_kernel, torch.zeros(5, dtype=torch.int32), grid=(2, 3))


# ---------------------------------------------------------------- scalars


def test_scalars_are_typed_as_triton_types_them() -> None:
    big = integer(1 << 30)
    assert isinstance(big, Int)
    assert isinstance(integer(1 << 31), Long)
    with pytest.raises(OverflowError, match="past 32 bits"):
        big * 2
    assert Long(1 << 30) * big == 1 << 60
    assert isinstance(3 + big, Int)


def test_division_rounds_as_in_c_or_not_at_all() -> None:
    assert integer(7) // 2 == 3
    assert integer(7) % integer(4) == 3
    with pytest.raises(ArithmeticError, match="-7 divided by 2"):
        integer(-7) // 2
    with pytest.raises(ArithmeticError, match="round differently"):
        7 % integer(-4)
