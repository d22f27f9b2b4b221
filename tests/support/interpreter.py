"""Makes Triton's interpreter as strict as a GPU is unforgiving, for triton 3.6 to 3.9.

1. A dot that adds in fp32 rounds once, so that no result depends on the order in which this processor's BLAS adds: by
   that alone the same fp32 scores differ threefold in their error from one processor to another.
2. Every active lane of a load, store or atomic must lie inside the extent of the tensor its pointer was derived from;
   a pointer with no known origin must lie inside one of the launch's tensors, or of those that its table lists.
3. A masked-off lane loaded without `other` is NaN (a large number for integers): its value is undefined on a GPU.
4. Memory from torch.empty and its kin is filled with NaN (`poisoned_empty`), so an element never written shows.

`install` is called once per session, and only under the interpreter; `poisoned_empty` also serves on a GPU. That
bfloat16 is exact is no strictness: the package itself sees to it (kernels/interpreter.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._C._dynamo import guards
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from rooflight.kernels.interpreter import correct, widen
from rooflight.kernels.known import _Seen
from support.interpreter_speed import hasten

# ---------------------------------------------------------------- products


def _patch_dot(interp: Any, tl: Any) -> None:
    builder, handle = interp.InterpreterBuilder, interp.TensorHandle
    dot = builder.create_dot

    def exact_dot(self: Any, a: Any, b: Any, acc: Any, *args: Any) -> Any:
        if acc.data.dtype != np.float32 or min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) < 16:
            return dot(self, a, b, acc, *args)
        a, b = (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        product = np.matmul(a, b, dtype=np.float64) + acc.data
        return handle(product.astype(np.float32), acc.dtype.scalar)

    builder.create_dot = exact_dot


# ---------------------------------------------------------------- bounds


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of the tensor's elements and the address past the last, whatever its strides."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


_EXTENT = "rooflight.extent"
_launched: list[tuple[int, int]] = []  # extents of the running launch's tensors
_listed: list[tuple[int, int]] = []  # and of those whose addresses stand in a table that it is given


def _check_lanes(ptrs: Any, mask: Any) -> None:
    addresses = np.asarray(ptrs.data).astype(np.uint64)
    active = addresses[np.broadcast_to(np.asarray(getattr(mask, "data", mask)).astype(bool), addresses.shape)]
    known = ptrs.attr.get(_EXTENT)
    inside = np.zeros(active.shape, bool)
    for start, end in [known] if known else _launched + _listed:
        inside |= (active >= np.uint64(start)) & (active < np.uint64(end))
    if not inside.all():
        stray = int(active[~inside][0])
        where = f"its tensor's extent [{known[0]:#x}, {known[1]:#x})" if known else "every launched tensor"
        raise IndexError(f"{int((~inside).sum())} lanes out of bounds: the first, {stray:#x}, is outside {where}")


def _patch_bounds(interp: Any, tl: Any) -> None:
    builder, handle = interp.InterpreterBuilder, interp.TensorHandle

    convert = interp._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        converted = convert(arg)
        if hasattr(arg, "data_ptr"):
            bounds = extent(interp._unwrap_tensor(arg))
            converted.handle.set_attr(_EXTENT, bounds)
            _launched.append(bounds)
        return converted

    interp._implicit_cvt = implicit_cvt

    def keeps_extent(method: Callable) -> Callable:
        # The first argument that carries an extent is the pointer the result derives from.
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any) -> Any:
            result = method(self, *args)
            for arg in args:
                if isinstance(arg, handle) and _EXTENT in arg.attr:
                    result.set_attr(_EXTENT, arg.attr[_EXTENT])
                    break
            return result

        return wrapped

    for name in (
        "create_addptr", "create_splat", "create_unsplat", "create_broadcast", "create_expand_dims", "create_reshape",
        "create_trans", "create_bitcast", "cast_impl",
    ):  # fmt: skip
        setattr(builder, name, keeps_extent(getattr(builder, name)))

    for name in ("TensorDescHandle", "BlockPointerHandle"):  # block pointers are gone from 3.9
        if kind := getattr(interp, name, None):

            def materialize(self: Any, *args: Any, _original: Callable = kind.materialize_pointers) -> Any:
                ptrs, mask = _original(self, *args)
                if _EXTENT in self.base.attr:
                    ptrs.set_attr(_EXTENT, self.base.attr[_EXTENT])
                return ptrs, mask

            kind.materialize_pointers = materialize

    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        _check_lanes(ptrs, mask)
        if other is None:
            element = ptrs.get_element_ty()
            dtype = interp._get_np_dtype(element)
            if element == tl.bfloat16:
                undefined: Any = 0x7FC0
            else:
                undefined = np.nan if dtype.kind == "f" else np.iinfo(dtype).max if dtype.kind in "iu" else True
            other = handle(np.full(np.shape(ptrs.data), undefined, dtype), element)
        return load(self, ptrs, mask, other, *args, **kwargs)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        _check_lanes(ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store

    atomic_rmw, atomic_cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def checked_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *args: Any) -> Any:
        _check_lanes(ptr, mask)
        return atomic_rmw(self, op, ptr, value, mask, *args)

    def checked_cas(self: Any, ptr: Any, *args: Any) -> Any:
        _check_lanes(ptr, np.ones(np.shape(ptr.data), bool))
        return atomic_cas(self, ptr, *args)

    builder.create_atomic_rmw, builder.create_atomic_cas = checked_rmw, checked_cas


# ---------------------------------------------------------------- launches


def _patch_launch(interp: Any) -> None:
    call = interp.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        _launched.clear()
        patched.clear()
        with np.errstate(all="ignore"):  # a GPU raises no warning for inf - inf either
            return call(self, *args, **kwargs)

    interp.GridExecutor.__call__ = launch

    # Once a launch is enough for each module that defines device functions; once a call takes 40 % of the time.
    patch_lang, patched = interp._patch_lang, set[int]()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    interp._patch_lang = patch_once
    # CPU tensors were never copied, so there is nothing to copy back: each launch would copy whole storages.
    interp.GridExecutor._restore_args_dev = lambda self, *args: None


def _patch_tables() -> None:
    """AdamW's tensors are known by their addresses alone: tell the bounds' check of them."""
    from rooflight.kernels import adamw

    original = adamw.launch

    def launch(kernel: Any, grid: Any, table: torch.Tensor, *args: Any, **constants: Any) -> None:
        sizes = dict.fromkeys(("weight", "mean", "square"), 4)
        sizes |= {name: constants[kind].primitive_bitwidth // 8
                  for name, kind in (("gradient", "GRADIENT"), ("copy", "COPY")) if constants[kind]}  # fmt: skip
        for values in table.view(-1, len(adamw.FIELDS)).tolist():
            row = dict(zip(adamw.FIELDS, values, strict=True))
            _listed.extend((row[name], row[name] + size * row["size"]) for name, size in sizes.items())
            _listed.append((row["step"], row["step"] + 4))
        try:
            original(kernel, grid, table, *args, **constants)
        finally:
            _listed.clear()

    adamw.launch = launch


@functools.cache
def install() -> None:
    """Patch the interpreter of this process, once."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter as interp

    assert correct(), f"the interpreter of triton {triton.__version__} is not corrected"
    _patch_dot(interp, tl)
    _patch_bounds(interp, tl)
    _patch_launch(interp)
    _patch_tables()
    hasten(interp, tl)


# ---------------------------------------------------------------- poison

_ALLOCATORS = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
    (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    (guards, "_empty_strided_cpu"), (guards, "_empty_strided_cuda"),
)  # fmt: skip


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or with the largest integer."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within, uninitialised memory that Python code allocates holds NaN."""

    def poisoning(allocate: Callable) -> Callable:
        @functools.wraps(allocate)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if kwargs.get("out") is not None or tensor.device.type == "meta":
                return tensor
            # Who is to see the allocation alone; the compiler, who traces this, cannot ask.
            watched = not torch.compiler.is_compiling() and isinstance(_get_current_dispatch_mode(), _Seen)
            with torch.no_grad(), _disable_current_modes() if watched else nullcontext():
                return poison(tensor)

        return wrapped

    # `with torch.device(...)` knows the allocators by identity, from a table made once: not while they are patched.
    _device_constructors()
    patches = [mock.patch.object(owner, name, poisoning(getattr(owner, name))) for owner, name in _ALLOCATORS]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        _dynamo_knows_the_allocators()


@functools.cache
def _tables_made_anew(rules: Any) -> None:
    rules.get_torch_obj_rule_map.cache_clear()


def _dynamo_knows_the_allocators() -> None:
    """torch.compile too knows them by identity, from a table made at its first use: not of those that were patched."""
    if (rules := sys.modules.get("torch._dynamo.trace_rules")) is not None:
        _tables_made_anew(rules)
        rules.get_torch_obj_rule_map()
