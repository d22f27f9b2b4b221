"""The device functions beneath the attention kernels: which blocks are visited, 64-bit addresses, tanh."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from rooflight.kernels.attention import flash_attention
from rooflight.kernels.attention.blocks import head_pointer, partial_or_whole, tile_offsets, visible_blocks
from rooflight.kernels.attention.portable import tiles
from rooflight.kernels.elementwise import tanh
from rooflight.kernels.reference import visible_mask
from support.attention import draw, judge_attention, tile

BLOCK = 16


@triton.jit
def _visible_blocks_kernel(out_ptr, first, last, lower, upper, length, BLOCK: tl.constexpr):
    lo, full_lo, full_hi, hi = visible_blocks(first, last, lower, upper, length, BLOCK)
    visits = tl.zeros([], tl.int32)
    for n in tl.range(full_lo, full_hi, BLOCK):
        tl.store(out_ptr + n // BLOCK, 2)
        visits += 1
    start, stop, jump = partial_or_whole(lo, full_lo, full_hi, hi, True)
    for n in tl.range(start, stop, BLOCK):
        n += tl.where(n < full_lo, 0, jump)
        tl.store(out_ptr + n // BLOCK, 1)
        visits += 1
    tl.store(out_ptr + 8, visits)


# Bands that start before the first key, end past the last, miss every key, lie inside one block
@pytest.mark.parametrize("lower", [None, -40, -17, -3, 0, 20, 90])
@pytest.mark.parametrize("upper", [None, -60, -1, 0, 15, 16, 40])
def test_blocks_are_visited_once_and_only_where_something_is_visible(lower, upper, device):
    for (first, n_row), length in itertools.product([(0, 16), (16, 16), (32, 5), (48, 1)], [0, 1, 16, 50]):
        row = torch.arange(first, first + n_row)[:, None]
        column = torch.arange(4 * BLOCK)[None, :]
        mask = (column < length) & torch.ones_like(row, dtype=torch.bool)
        if lower is not None:
            mask &= column >= row + lower
        if upper is not None:
            mask &= column <= row + upper
        blocks = mask.unflatten(1, (4, BLOCK))
        found = torch.zeros(9, dtype=torch.int32, device=device)
        _visible_blocks_kernel[(1,)](found, first, first + n_row - 1, lower, upper, length, BLOCK=BLOCK)
        where = f"rows {first}..{first + n_row - 1}, {length} columns"
        seen = found[:4].cpu()
        assert torch.equal(seen == 2, blocks.all(2).all(0)), f"{where}: whole blocks"
        assert (seen[blocks.any(2).any(0)] > 0).all(), f"{where}: a visible block is skipped"
        assert int(found[8]) == int((seen > 0).sum()), f"{where}: a block is visited twice"
        if blocks.any():
            assert torch.equal(seen > 0, blocks.any(2).any(0)), f"{where}: work for nothing"
        else:
            assert int((seen > 0).sum()) <= 1, f"{where}: work for nothing"


@pytest.mark.parametrize("window", [None, 100, (70, 0)], ids=str)
def test_work_is_proportional_to_the_visible_pairs(window, device, monkeypatch):
    """The loads of key tiles, counted: under a causal mask or a window, about as many as the visible area has tiles."""
    if device.type != "cpu":
        pytest.skip("counts the interpreter's loads")
    from triton.runtime.interpreter import InterpreterBuilder

    T, block = 256, 32
    loads = []
    load = InterpreterBuilder.create_masked_load

    def counting(self, ptrs, *args, **kwargs):
        if ptrs.data.shape == (block, 16):
            loads.append(1)
        return load(self, ptrs, *args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    with tile(block, block):
        flash_attention(**draw(1, 1, 1, T, T, 16, torch.float32, device), causal=True, window=window)
    mask = visible_mask(T, T, True, window)
    needed = mask.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1).sum().item()
    rows = T // block
    assert len(loads) == 2 * needed + rows  # keys and values, and each query tile once


@triton.jit
def _tile_offsets_kernel(out_ptr, first, strides, b, h, start, R: tl.constexpr, C: tl.constexpr):
    rows, cols = tl.arange(0, R), tl.arange(0, C)
    base = head_pointer(tl.cast(0, tl.int64).to(tl.pointer_type(tl.int8)), strides, b, h, start)
    addresses = base.to(tl.int64) + tile_offsets(first, rows, cols, strides)
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], addresses)


@pytest.mark.parametrize(
    "strides",
    [
        (2**33, 2**32 + 8, 2**31 + 24, 1),  # each alone passes 2^31
        (0, 64, 2**20, 1),  # 3000 rows of 2^20 elements pass it together
        (2**31 - 8, 2**31 - 8, 2**31 - 8, 2**28),
    ],
    ids=str,
)
def test_offsets_are_64_bit(strides, device):
    b, h, start, first = 3, 5, 7, 3000
    out = torch.zeros(16, 16, dtype=torch.int64, device=device)
    _tile_offsets_kernel[(1,)](out, first, strides, b, h, start, R=16, C=16)
    rows, cols = torch.arange(16)[:, None], torch.arange(16)[None, :]
    sb, sh, sm, sd = strides
    assert torch.equal(out.cpu(), b * sb + h * sh + (start + first + rows) * sm + cols * sd)


def test_tensors_that_span_more_than_2_to_the_31_elements(device):
    """Reads and writes at real addresses: rows of a sparse mapping, of which only a few pages are ever touched."""
    if device.type != "cpu":
        span = torch.zeros(2**32, dtype=torch.float16, device=device)
    else:
        import mmap

        no_reserve = 0x4000  # MAP_NORESERVE on Linux, which Python's mmap does not name
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        span = torch.frombuffer(mmap.mmap(-1, 2**33, flags=flags), dtype=torch.float16)
    inputs = draw(1, 2, 1, 3, 3, 16, torch.float16, device)
    for i, (name, x) in enumerate(inputs.items()):
        far = span[1024 * i :].as_strided(x.shape, (0, 64, 2**30 + 4096, 1))  # row 2 stands past 2^31
        far.copy_(x)
        inputs[name] = far
    judge_attention(inputs)


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i)))


def test_tanh_is_as_exact_as_libms(device):
    magnitude = torch.cat([torch.logspace(-30, 2, 1024, dtype=torch.float64), torch.linspace(0.1, 3, 1024)])
    x = torch.cat((magnitude, -magnitude)).float().to(device)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, BLOCK=4096)
    exact = torch.tanh(x.double())
    error = ((y.double() - exact) / exact).abs()
    assert error.max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("head_dim", "padded"), [(1, 16), (16, 16), (17, 32), (80, 128), (512, 512)])
def test_heads_are_padded_to_a_power_of_two(head_dim, padded):
    assert tiles.block_d(head_dim) == padded
