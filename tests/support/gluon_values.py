"""Scalars, pointers and tensor functions for the Gluon emulator: Triton's meaning, computed by torch."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from support.gluon_scheduler import current_program

__all__ = ["FUNCTIONS", "TORCH_DTYPE", "Int", "Long", "Pointer", "integer"]

TORCH_DTYPE = {
    gl.bfloat16: torch.bfloat16, gl.float16: torch.float16, gl.float32: torch.float32, gl.float64: torch.float64,
    gl.int1: torch.bool, gl.int8: torch.int8, gl.int16: torch.int16, gl.int32: torch.int32, gl.int64: torch.int64,
}  # fmt: skip


class Long(int):
    """A 64-bit scalar."""


class Int(int):
    """A 32-bit scalar: what does not fit is an error, as is the division of a negative number (C truncates)."""


def _operation(name: str) -> Callable[[Any, Any], Any]:
    plain = getattr(int, name)

    def operate(self: Any, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        result = plain(self, other)
        if result is NotImplemented:
            return result
        if "div" in name or "mod" in name:
            dividend, divisor = (other, self) if name.startswith("__r") else (self, other)
            if dividend < 0 or divisor <= 0:
                raise ArithmeticError(f"{int(dividend)} divided by {int(divisor)}: C and Python round differently")
        if isinstance(self, Long) or isinstance(other, Long):
            return Long(result)
        if not -(1 << 31) <= result < 1 << 31:
            raise OverflowError(f"{int(self)} and {int(other)} give {result}, past 32 bits")
        return Int(result)

    return operate


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _full in (f"__{_name}__", f"__r{_name}__"):
        setattr(Int, _full, _operation(_full))
        setattr(Long, _full, _operation(_full))


def integer(value: int) -> int:
    """A kernel's integer argument, typed as Triton types it."""
    return Int(value) if -(1 << 31) <= value < 1 << 31 else Long(value)


class Pointer:
    """A pointer, or a tensor of them, into the storage of a tensor."""

    def __init__(self, tensor: Tensor, offset: Any = None) -> None:
        self.tensor = tensor
        self.offset = tensor.storage_offset() if offset is None else offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.tensor, self.offset[index])

    def memory(self) -> Tensor:
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return self.tensor.as_strided((size,), (1,), 0)

    def where(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask, broadcast; an offset outside the storage is an error."""
        offsets, live = torch.broadcast_tensors(
            torch.as_tensor(self.offset), torch.as_tensor(True if mask is None else mask)
        )
        used = offsets[live]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= self.memory().numel()):
            raise IndexError(f"offsets {int(used.min())} to {int(used.max())} in {self.memory().numel()} elements")
        return offsets, live


def _scalar(x: Tensor) -> Any:
    value = x.item()
    return integer(value) if isinstance(value, int) else value


def _element(pointer: Pointer, mask: Any) -> Tensor | None:
    """The one element of a pointer that is a scalar, as where others are waited for: many times, and so at once."""
    memory, at = pointer.memory(), pointer.offset
    return memory[at] if mask is None and isinstance(at, int) and 0 <= at < memory.numel() else None


def _load(pointer: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Any:
    element = _element(pointer, mask)
    if element is not None:
        return _scalar(element)
    offsets, live = pointer.where(mask)
    values = torch.where(
        live, pointer.memory()[offsets.where(live, 0)], torch.as_tensor(other, dtype=pointer.tensor.dtype)
    )
    return values if values.dim() else _scalar(values)


def _store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    offsets, live = pointer.where(mask)
    values = torch.as_tensor(value).to(pointer.tensor.dtype).expand(offsets.shape)
    pointer.memory()[offsets[live]] = values[live]


def _atomic_add(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> Any:
    current_program().pause(polls=isinstance(value, int) and value == 0)
    before = _load(pointer, mask)
    element = _element(pointer, mask)
    if element is not None:
        element += value
        return before
    offsets, live = pointer.where(mask)
    values = torch.as_tensor(value).to(pointer.tensor.dtype).expand(offsets.shape)
    pointer.memory().index_add_(0, offsets[live].long().reshape(-1), values[live].reshape(-1))
    return before


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, Tensor):
        return x if condition else y
    return torch.where(condition, x, y)


def _extremum(scalar: Callable[..., Any], tensor: Callable[..., Any]) -> Callable[..., Any]:
    def extremum(x: Any, y: Any, **_: Any) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return scalar(x, y)
        other = next(t for t in (x, y) if isinstance(t, Tensor))
        return tensor(*(torch.as_tensor(t, dtype=other.dtype) for t in (x, y)))

    return extremum


def _cast(x: Any, dtype: torch.dtype, **_: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype)
    return {torch.int32: Int, torch.int64: Long}.get(dtype, lambda value: value)(x)


def _sum(x: Tensor, axis: int | None = None) -> Any:
    total = x.sum(axis, dtype=x.dtype) if axis is not None else x.sum(dtype=x.dtype)
    return total if total.dim() or total.is_floating_point() else integer(total.item())


def _range(start: int, stop: int, layout: Any = None) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arange": _range,
    "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    "convert_layout": lambda x, layout, **_: x,
    "reshape": lambda x, shape: x.reshape(shape),
    "permute": lambda x, order: x.permute(order),
    "set_auto_layout": lambda x, layout: x,
    "static_range": range,
    "static_assert": lambda *_: None,
    "load": _load,
    "store": _store,
    "atomic_add": _atomic_add,
    "where": _where,
    "maximum": _extremum(max, torch.maximum),
    "minimum": _extremum(min, torch.minimum),
    "cast": _cast,
    "cdiv": lambda x, y: (x + (y - 1)) // y,
    "max": lambda x, axis=None: x.amax(axis) if axis is not None else x.amax(),
    "min": lambda x, axis=None: x.amin(axis) if axis is not None else x.amin(),
    "sum": _sum,
    "expand_dims": torch.unsqueeze,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "abs": abs,
    "fma": lambda x, y, z: x * y + z,
    "multiple_of": lambda x, values: x,
    "assume": lambda condition: None,
}
