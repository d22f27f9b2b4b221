"""The hardware of an emulated Gluon program: shared memory, mbarriers, TMA, wgmma."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language.nvidia import hopper as real_hopper

from support.gluon_scheduler import ProtocolError, RaceError, current_program, name_of_allocation

# ---------------------------------------------------------------- shared memory


class _Memory:
    """One allocation. For every element: loads in flight into it, reads in flight from it, who wrote it unfenced."""

    def __init__(self, name: str, shape: list[int], dtype: torch.dtype) -> None:
        self.name = name
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        self.data = torch.full(shape, poison, dtype=dtype)
        self.loading = torch.zeros(shape, dtype=torch.int16)
        self.reading = torch.zeros(shape, dtype=torch.int16)
        self.written_by = torch.zeros(shape, dtype=torch.int16)  # 1 + partition, until it fences


class Shared:
    """A shared_memory_descriptor: a view of an allocation."""

    def __init__(self, memory: _Memory, data: Tensor, label: str, layout: Any) -> None:
        self.memory, self.data, self.label, self.layout = memory, data, label, layout
        self.shape, self.dtype = list(data.shape), data.dtype

    def _view(self, data: Tensor, label: str = "") -> Shared:
        return Shared(self.memory, data, self.label + label, self.layout)

    def index(self, i: int) -> Shared:
        return self._view(self.data[i], f"[{int(i)}]")

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(self.data.narrow(dim, start, length), f".slice({int(start)}, {length}, {dim})")

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(self.data.permute(order))

    def reshape(self, shape: list[int]) -> Shared:
        return self._view(self.data.view(shape))

    def state(self, kind: str) -> Tensor:
        """loading, reading or written_by of these elements."""
        whole = getattr(self.memory, kind)
        return whole.as_strided(self.data.shape, self.data.stride(), self.data.storage_offset())

    def check_read(self, reader: str, by_async_proxy: bool) -> None:
        if self.state("loading").any():
            raise RaceError(f"{reader} reads {self.label} while a TMA load into it is in flight")
        if by_async_proxy and self.state("written_by").any():
            raise RaceError(f"{reader} reads {self.label}, written with no fence_async_shared since")

    def check_write(self, writer: str, by_async_proxy: bool) -> None:
        if self.state("loading").any():
            raise RaceError(f"{writer} writes {self.label} while a TMA load into it is in flight")
        if self.state("reading").any():
            raise RaceError(f"{writer} writes {self.label} while a wgmma or a TMA store may still read it")
        if by_async_proxy and self.state("written_by").any():
            raise RaceError(f"{writer} writes {self.label}, written with no fence_async_shared since")

    def load(self, layout: Any = None) -> Tensor:
        program = current_program()
        program.pause()
        self.check_read(program.running.name, False)
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        program = current_program()
        program.pause()
        if value.dtype != self.dtype or list(value.shape) != self.shape:
            raise TypeError(f"{self.label}: {self.dtype} {self.shape}, got {value.dtype} {list(value.shape)}")
        self.check_write(program.running.name, False)
        self.data.copy_(value)
        self.state("written_by").fill_(1 + program.partitions.index(program.running))


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any = None, value: Any = None) -> Any:
    program, name = current_program(), name_of_allocation()
    if isinstance(layout, real_hopper.mbarrier.MBarrierLayout):
        count = shape[0] if len(shape) == 2 else 1
        barriers = [Barrier(f"{name}[{i}]") for i in range(count)]
        program.barriers += barriers
        return _Barriers(barriers) if len(shape) == 2 else barriers[0]
    memory = _Memory(name, list(shape), dtype)
    shared = Shared(memory, memory.data, name, layout)
    program.memory.append(shared)
    if value is not None:
        shared.store(value)
    return shared


def fence_async_shared(cluster: bool = False) -> None:
    program = current_program()
    program.pause()
    me = 1 + program.partitions.index(program.running)
    for shared in program.memory:
        written_by = shared.memory.written_by
        written_by[written_by == me] = 0


# ---------------------------------------------------------------- mbarriers


class Barrier:
    def __init__(self, name: str) -> None:
        self.name = name
        self.count = self.missing = self.bytes = self.phase = self.announced = 0

    def index(self, i: int) -> Barrier:
        return self

    def _arrive(self, count: int) -> None:
        if self.count == 0:
            raise ProtocolError(f"{self.name} is used before mbarrier.init")
        if count > self.missing:
            raise ProtocolError(f"{self.name}: {count} arrivals where {self.missing} are missing")
        self.missing -= count
        self.complete()

    def complete(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count


class _Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: int) -> Barrier:
        return self.barriers[i]


class MBarrier:
    MBarrierLayout = real_hopper.mbarrier.MBarrierLayout

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        if barrier.count:
            raise ProtocolError(f"{barrier.name} is initialised twice")
        barrier.count = barrier.missing = count

    @staticmethod
    def invalidate(barrier: Barrier) -> None:
        barrier.count = 0

    @staticmethod
    def expect(barrier: Barrier, nbytes: int, pred: bool = True) -> None:
        current_program().pause()
        if pred:
            barrier.bytes += nbytes
            barrier.announced += nbytes
            barrier._arrive(1)

    @staticmethod
    def arrive(barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
        current_program().pause()
        if pred:
            barrier._arrive(count)

    @staticmethod
    def wait(barrier: Barrier, phase: int, pred: bool = True, deps: Any = ()) -> None:
        if pred:
            if barrier.count == 0:
                raise ProtocolError(f"{barrier.name} is used before mbarrier.init")
            parity = int(phase) & 1
            missing = f"{barrier.name} with parity {parity}"
            current_program().pause(lambda: barrier.phase != parity, missing)


# ---------------------------------------------------------------- TMA


ALIGNMENT = 16  # bytes, of the address that a TMA access starts at: PTX ISA, cp.async.bulk.tensor; triton issue 7385


class Descriptor:
    """A TMA descriptor: tiles of a tensor in global memory, zeros where they hang over."""

    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.block_shape, self.layout, self.dtype = list(host.block_shape), host.layout, host.base.dtype
        nbytes = self.tensor.element_size() * torch.Size(self.block_shape).numel()
        self.block_type = types.SimpleNamespace(nbytes=nbytes, shape=self.block_shape)
        self.nbytes_per_cta = nbytes

    def check_aligned(self, coordinates: list[int]) -> None:
        """The address of a tile, in bytes, must be a multiple of 16: what hardware answers with a lost context."""
        strides = self.tensor.stride()
        offset = sum(int(i) * stride for i, stride in zip(coordinates, strides, strict=True))
        address = self.tensor.data_ptr() + offset * self.tensor.element_size()
        if address % ALIGNMENT:
            at = f"coordinates {[int(i) for i in coordinates]} of {list(self.tensor.shape)}, strides {list(strides)}"
            raise ProtocolError(f"TMA at an address that is no multiple of {ALIGNMENT} bytes: {at}")

    def window(self, coordinates: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tile that lies inside the tensor, and where in the tile it stands."""
        inside, place = [], []
        for start, size, length in zip(coordinates, self.block_shape, self.tensor.shape, strict=True):
            low = min(max(int(start), 0), length)
            high = max(min(int(start) + size, length), low)
            inside.append(slice(low, high))
            place.append(slice(low - int(start), high - int(start)) if high > low else slice(0, 0))
        return self.tensor[tuple(inside)], tuple(place)


class Transfer:
    """A TMA load in flight, or a store: first it reads its buffer, then it writes."""

    def __init__(self, what: str, home: list[Transfer], action: Callable[[], None], is_late: bool = False) -> None:
        self.what, self.home, self.action = what, home, action
        self.is_late = is_late  # it comes when nothing else can happen
        home.append(self)

    def happen(self) -> None:
        self.home.remove(self)
        self.action()


def _check_tile(desc: Descriptor, shared: Shared) -> Tensor:
    """The buffer in the descriptor's block shape; leading dimensions of size 1 may be left out."""
    if shared.dtype != desc.dtype or [n for n in shared.shape if n > 1] != [n for n in desc.block_shape if n > 1]:
        raise TypeError(f"{shared.label}: {shared.dtype} {shared.shape}, descriptor of {desc.dtype} {desc.block_shape}")
    return shared.data.view(desc.block_shape)


class TMA:
    @staticmethod
    def async_load(desc: Descriptor, coord: list[int], barrier: Barrier, result: Shared, pred: bool = True) -> None:
        program = current_program()
        program.pause()
        if not pred:
            return
        nbytes = desc.block_type.nbytes
        what = f"the load of {result.label} that {barrier.name} counts"
        if barrier.announced < nbytes:
            raise ProtocolError(f"{what} has {nbytes} bytes, of which {barrier.announced} are expected")
        barrier.announced -= nbytes
        desc.check_aligned(coord)
        result.check_write(program.running.name, True)
        buffer = _check_tile(desc, result)
        buffer.fill_(torch.nan)
        result.state("loading").add_(1)

        def land() -> None:
            source, place = desc.window(coord)
            buffer.zero_()
            buffer[place].copy_(source)
            result.state("loading").sub_(1)
            barrier.bytes -= nbytes
            barrier.complete()

        Transfer(what, program.loads, land, is_late=program.random.random() < 0.1)

    @staticmethod
    def async_store(desc: Descriptor, coord: list[int], src: Shared) -> None:
        TMA._write(desc, coord, src, lambda target, tile: target.copy_(tile))

    @staticmethod
    def async_atomic_add(desc: Descriptor, coord: list[int], src: Shared) -> None:
        TMA._write(desc, coord, src, lambda target, tile: target.add_(tile))

    @staticmethod
    def _write(desc: Descriptor, coord: list[int], src: Shared, write: Callable[[Tensor, Tensor], Any]) -> None:
        program = current_program()
        program.pause()
        desc.check_aligned(coord)
        src.check_read(program.running.name, True)
        buffer = _check_tile(desc, src)
        src.state("reading").add_(1)

        what, running = f"the store of {src.label}", program.running

        def read() -> None:
            tile = buffer.clone()
            src.state("reading").sub_(1)
            Transfer(what, running.writes, lambda: land(tile), is_late=program.random.random() < 0.3)

        def land(tile: Tensor) -> None:
            target, place = desc.window(coord)
            write(target, tile[place])

        Transfer(what, running.stores, read)

    @staticmethod
    def store_wait(pendings: int, read_only: bool = True) -> None:
        """Until the buffers are read or, not read_only, the tensors are written."""
        program = current_program()
        program.pause()
        while len(program.running.stores) > pendings:
            program.running.stores[0].happen()
        while not read_only and len(program.running.writes) > pendings:
            program.running.writes[0].happen()

    @staticmethod
    def written() -> None:
        """hopper/blocks.py's tma_written."""
        TMA.store_wait(0, read_only=False)

    async_copy_global_to_shared = async_load
    async_copy_shared_to_global = async_store


# ---------------------------------------------------------------- wgmma


class Mma:
    """A wgmma in flight: an accumulator that has no value until a wait retires it."""

    def __init__(self, a: Tensor | Shared, b: Shared, acc: Tensor | Mma, use_acc: bool, owner: str) -> None:
        self.a, self.b, self.acc, self.use_acc, self.owner = a, b, acc, use_acc, owner
        self.shape = acc.shape
        self.result: Tensor | None = None
        self.is_retired = False
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        (m, k), (k_b, n) = a.shape, b.shape
        if k != k_b or list(self.shape) != [m, n] or m % 64 or a.dtype != b.dtype:
            raise TypeError(f"wgmma: {a.dtype} {list(a.shape)} x {b.dtype} {b.shape} into {list(self.shape)}")
        for operand in self.operands:
            operand.check_read(f"a wgmma of {owner}", True)
            operand.state("reading").add_(1)

    def happen(self) -> None:
        if self.result is not None:
            return
        for operand in self.operands:
            operand.check_read(f"a wgmma of {self.owner}", True)
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        product = a.float() @ b.float()
        if self.use_acc:
            acc = self.acc.result if isinstance(self.acc, Mma) else self.acc
            assert acc is not None  # in order
            product += acc
        self.result = product

    def retire(self) -> None:
        self.happen()
        self.is_retired = True
        for operand in self.operands:
            operand.state("reading").sub_(1)


def warpgroup_mma(
    a: Any, b: Any, acc: Any, *, use_acc: bool = True, precision: Any = None,
    max_num_imprecise_acc: Any = None, is_async: bool = False,
) -> Any:  # fmt: skip
    program = current_program()
    program.pause()
    mma = Mma(a, b, acc, bool(use_acc), program.running.name)
    program.running.mmas.append(mma)
    return mma if is_async else warpgroup_mma_wait(0, [mma])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    program = current_program()
    program.pause()
    while len(program.running.mmas) > num_outstanding:
        program.running.mmas.pop(0).retire()
    values = []
    for dep in deps:
        if isinstance(dep, Mma) and not dep.is_retired:
            raise RaceError(f"{program.running.name} uses an accumulator whose wgmma is still in flight")
        values.append(dep.result if isinstance(dep, Mma) else dep)
    return values[0] if len(values) == 1 else tuple(values)
