"""What the Hopper attention kernels share: names that Triton renamed, descriptors, rings of buffers, visible blocks.

The kernels are written in Gluon (triton.experimental.gluon): partitions of warps that run different code side by side
and meet only at mbarriers in shared memory. An mbarrier counts arrivals, and the bytes of the TMA loads it expects,
through phases: `wait(barrier, parity)` passes once the phase of that parity is complete, so a fresh barrier passes
parity 1 at once. Buffer g of a ring of STAGES stands in slot g % STAGES and is the slot's (g // STAGES)-th use: whoever
fills it waits for `empty` with parity (g // STAGES + 1) & 1, whoever reads it for `full` with (g // STAGES) & 1.

Importing this module imports Gluon: the launchers do it only when a Hopper kernel is to run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...launching import Described, Via
from .. import blocks

__all__ = [
    "ELEMENT",
    "LINE",
    "as_heads",
    "block_order",
    "boxes",
    "extents",
    "fence_async_global",
    "fence_async_shared",
    "first_row_tile",
    "gl",
    "gluon",
    "line_boxes",
    "load_rows",
    "masked_block",
    "mbarrier",
    "new_barriers",
    "new_numbers",
    "planned",
    "row_boxes",
    "row_layout",
    "sequence",
    "share_numbers",
    "shared_number",
    "slot",
    "tile_of",
    "tma",
    "tma_add",
    "tma_load",
    "tma_obstacle",
    "tma_store",
    "tma_written",
    "visible_blocks",
    "warpgroup_mma",
    "warpgroup_mma_wait",
    "write_number",
]

# Triton 3.6 and 3.7 say async_copy_*, 3.9 async_*.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

LINE: gl.constexpr = gl.constexpr(32)  # fp32 values: 128 bytes, a row of shared memory's widest swizzle
ONE: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one number, in each thread of a warpgroup

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # 3.6 has the latter

try:  # triton 3.8
    tma_add = tma.async_atomic_add
except AttributeError:  # 3.6 and 3.7 have the instruction, but no function of this name

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Start the addition of a tile in shared memory to global memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


visible_blocks = gluon.jit(blocks.visible_blocks.fn)
sequence = gluon.jit(blocks.sequence.fn)
first_row_tile = gluon.jit(blocks.first_row_tile.fn)


def extents(x: Tensor, varlen: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of x as (b, h, row, d): packed sequences (total, H, D) are one batch of `total` rows."""
    sizes, strides = x.shape, x.stride()
    if varlen:
        return (1, sizes[1], sizes[0], sizes[2]), (0, strides[1], strides[0], strides[2])
    return tuple(sizes), strides


def as_heads(x: Tensor, varlen: bool) -> Tensor:
    """x as (b, h, row, d): packed sequences (total, H, D) are one batch of `total` rows."""
    return x.transpose(0, 1)[None] if varlen else x


def tma_obstacle(name: str, x: Tensor, varlen: bool) -> str | None:
    """Why TMA cannot address x, or None: 16-byte alignment, unit stride along d, extents and strides in range."""
    why = _obstacle(x.data_ptr() % 16 == 0, x.element_size(), *extents(x, varlen))
    return why and f"{name} is {why}"


@lru_cache(maxsize=1024)
def _obstacle(aligned: bool, itemsize: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> str | None:
    if strides[3] != 1:
        return "not contiguous along the head size"
    used = [stride * itemsize for size, stride in zip(sizes[:3], strides[:3], strict=True) if size > 1]
    if not aligned or any(stride % 16 for stride in used):
        return "not aligned to 16 bytes"
    if any(not 0 < stride < 1 << 40 for stride in used):
        return "expanded"
    return "longer than 2^30 rows" if max(sizes) >= 1 << 30 else None


@cache
def _prototype(dtype: torch.dtype, rows: int, head_dim: int) -> dict[str, Any]:
    """The fields of a descriptor of (b, h, row, d) for tiles of `rows` rows."""
    block = [1, 1, rows, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENT[dtype])
    x = torch.empty((1, 1, 1, head_dim), dtype=dtype, device="cpu")
    return vars(TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)) | {"base": None}


def _on_gpu(x: Tensor) -> bool:
    """Whether x's descriptors are kept, by its address; on the CPU a kernel is emulated on the tensor itself."""
    return x.is_cuda


def planned(plan: Any, x: Tensor) -> Any:
    """plan, a function under lru_cache, with its memory on a GPU alone: an emulated kernel is another one each time."""
    return plan if _on_gpu(x) else plan.__wrapped__


class _Address:
    """A tensor as a descriptor needs it. It holds no memory: descriptors are kept when their tensors are gone."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def boxes(rows: int, varlen: bool) -> Via:
    """TMA descriptors of tensors as (b, h, row, d), for tiles of `rows` rows; loads past an end read zeros."""
    return _via(_descriptor, lambda x: (*extents(x, varlen), rows))


def row_boxes(rows: int) -> Via:
    """TMA descriptors of one fp32 value a row, flat, for `rows` of them."""
    return _via(_rows_descriptor, lambda x: (x.numel(), rows))


def line_boxes(lines: int) -> Via:
    """TMA descriptors of fp32 tensors as lines of LINE values, for `lines` of them."""
    return _via(_lines_descriptor, lambda x: (x.numel(), lines))


def _via(make: Callable[..., TensorDescriptor], facts: Callable[[Tensor], tuple[Any, ...]]) -> Via:
    """make(base, dtype, *facts(x)): the same object for the same address and facts. A model's tensors return to their
    addresses at every step, and the driver's encoding is kept with the descriptor.
    """

    def describer(x: Tensor) -> Callable[[int], TensorDescriptor]:
        return partial(_described, make, x.dtype, *facts(x))

    def describe(x: Tensor) -> TensorDescriptor:
        return describer(x)(x.data_ptr()) if _on_gpu(x) else make(x, x.dtype, *facts(x))

    return Via(describe, describer)


# One memory for all: with one for each shape, shapes that keep changing would fill it without end.
@lru_cache(maxsize=4096)
def _described(make: Callable[..., TensorDescriptor], dtype: torch.dtype, *facts: Any) -> TensorDescriptor:
    *of, address = facts
    return make(_Address(address, dtype), dtype, *of)


def _rows_descriptor(base: Tensor | _Address, dtype: torch.dtype, size: int, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    descriptor = TensorDescriptor(base, [size], [1], [rows], layout)
    vars(descriptor)["described"] = Described((dtype, rows))
    return descriptor


def _lines_descriptor(base: Tensor | _Address, dtype: torch.dtype, size: int, lines: int) -> TensorDescriptor:
    n = LINE.value
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    descriptor = TensorDescriptor(base, [size // n, n], [n, 1], [lines, n], layout)
    vars(descriptor)["described"] = Described((dtype, lines, n))
    return descriptor


def _descriptor(
    base: Tensor | _Address, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], rows: int
) -> TensorDescriptor:
    """Without TensorDescriptor's own checks, which tma_obstacle has made already: they take 10 us."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    vars(descriptor).update(_prototype(dtype, rows, sizes[3]))
    # the stride of a single element is any: one that TMA takes
    strides = tuple(stride if size > 1 else sizes[3] for size, stride in zip(sizes[:3], strides, strict=False))
    described = Described((dtype, rows, sizes[3]))
    vars(descriptor).update(base=base, shape=list(sizes), strides=[*strides, 1], described=described)
    return descriptor


@gluon.constexpr_function
def row_layout(x):
    """The layout of one value for each row of x."""
    return gl.SliceLayout(1, x.type.layout) if hasattr(x.type, "layout") else None  # None: not compiled


@gluon.jit
def slot(g, STAGES: gl.constexpr):
    """Slot and parity of buffer g of a ring of 1, 2 or 4."""
    gl.static_assert(STAGES == 1 or STAGES == 2 or STAGES == 4)
    SHIFT: gl.constexpr = STAGES // 2
    return g & (STAGES - 1), (g >> SHIFT) & 1


@gluon.jit
def new_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N mbarriers whose phases complete after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def new_numbers(N: gl.constexpr):
    """N 32-bit integers in shared memory."""
    return gl.allocate_shared_memory(gl.int32, [N, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def write_number(shared, i, number, WARPS: gl.constexpr):
    """Set the i-th of them, from a partition of so many warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    shared.index(i).store(gl.full([1], number, gl.int32, layout))


@gluon.jit
def share_numbers(numbers):
    """32-bit integers in shared memory, for `shared_number`: before the partitions part, for any of them."""
    shared = new_numbers(len(numbers))
    for i in gl.static_range(len(numbers)):
        write_number(shared, i, numbers[i], 4)
    return shared


@gluon.jit
def shared_number(shared, i):
    """The i-th of them. No compiler knows it, so nothing that follows from it is moved to before this."""
    return gl.sum(shared.index(i).load(ONE), 0)


@gluon.jit
def tma_written():
    """Wait until all that was stored and added by TMA stands in global memory, for a release to pass on.

    tma.store_wait waits for the reads of shared memory alone. PTX ISA: without .read, cp.async.bulk.wait_group waits
    for the writes too, "being made visible to the executing thread"; they were made by the asynchronous proxy, and
    fence.proxy.async orders them with what follows in the generic one, the release. That is another thread's: barrier.
    """
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
    )
    barrier()


@gluon.jit
def fence_async_global():
    """After an acquire: let the TMA accesses that follow see what it has seen (PTX ISA, fence.proxy.async)."""
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def load_rows(desc, b, h, row, full, buffer):
    """Start the load of a tile of rows (b, h, row ...) into `buffer`; `full` completes when it has landed."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma_load(desc, [b, h, row, 0], full, buffer)


@gluon.jit
def tile_of(t, n_tile, n_head, GROUP):
    """(b * H + h, row tile) of the t-th tile to start.

    Heads go in groups of GROUP, whose keys and values stay in the L2 cache together; within a group the last rows,
    which see the most keys under a causal mask, start first, so that the short ones fill the gaps at the end.
    """
    section = t // (GROUP * n_tile)
    size = gl.minimum(GROUP, n_head - section * GROUP)
    r = t - section * GROUP * n_tile
    return section * GROUP + r % size, n_tile - 1 - r // size


@gluon.jit
def block_order(first, last, lower, upper, length, BLOCK: gl.constexpr):
    """The blocks of keys that rows first..last see, in the order they are visited: (hi, full_hi, n_whole, n_masked, n).

    The n_masked blocks that the mask or the end of the keys cuts come first, then the whole ones, each from the right.
    There is always one block, wholly masked where no key is visible.
    """
    lo, full_lo, full_hi, hi = visible_blocks(first, last, lower, upper, length, BLOCK)
    lo = lo // BLOCK
    hi = gl.maximum((hi + BLOCK - 1) // BLOCK, lo + 1)
    full_hi = full_hi // BLOCK
    n_whole = full_hi - full_lo // BLOCK
    return hi, full_hi, n_whole, hi - lo - n_whole, hi - lo


@gluon.jit
def masked_block(i, hi, full_hi, n_whole):
    """Position of the i-th masked block: from hi down, stepping over the whole ones."""
    n = hi - 1 - i
    return gl.where(n < full_hi, n - n_whole, n)
