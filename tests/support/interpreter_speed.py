"""The interpreter's bookkeeping, done once: half of the time of every test that runs a kernel went there.

Triton's interpreter makes types, shapes and tables anew for each operation of a kernel, a few hundred thousand times in
a test, and the results of its check of integer overflow, a quarter of the time, are looked at by nobody unless it is
built with debug. What is kept here is a pure function of what it is kept by; no number that a kernel computes changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def hasten(interp: Any, tl: Any) -> None:
    """Patch the interpreter of this process. interp: triton.runtime.interpreter; tl: triton.language."""
    builder = interp.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    _keep_numpy_types(interp, tl)
    _keep_block_types(tl)
    _know_equal_shapes(interp)
    _compare_types_by_name(tl)
    _call_builtins_directly(interp)


def _keep_numpy_types(interp: Any, tl: Any) -> None:
    original = interp._get_np_dtype
    kept: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        element = dtype.scalar
        if isinstance(element, tl.pointer_type):
            return original(element)
        found = kept.get(element.name)
        if found is None:
            found = kept[element.name] = original(dtype)
        return found

    interp._get_np_dtype = get_np_dtype


def _keep_block_types(tl: Any) -> None:
    """One type for each element type and shape, and one shape for all that have its sizes."""
    block, tensor = tl.block_type.__init__, tl.tensor.__init__
    shapes: dict[tuple[int, ...], Any] = {}

    def new(cls: Any, element_ty: Any = None, shape: Any = None, *args: Any) -> Any:
        if cls is not tl.block_type or element_ty is None:
            return object.__new__(cls)
        kept = element_ty.__dict__.setdefault("rooflight_blocks", {})
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        found = kept.get(sizes)
        if found is None:
            found = object.__new__(cls)
            block(found, element_ty, shape)
            found.shape = shapes.setdefault(sizes, found.shape)
            kept[sizes] = found
        return found

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        if type(self) is not tl.block_type:
            block(self, element_ty, shape)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        kept = type.__dict__.get("rooflight_tensor")
        if kept is None:
            tensor(self, handle, type)
            type.rooflight_tensor = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = kept

    tl.block_type.__new__, tl.block_type.__init__, tl.tensor.__init__ = new, init_block, init_tensor


def _know_equal_shapes(interp: Any) -> None:
    kind = type(interp.interpreter_semantic)
    broadcast = kind.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        ours, theirs = lhs.type, rhs.type
        blocks = ours.is_block() + theirs.is_block()
        if blocks == 0 or (blocks == 2 and ours.shape is theirs.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    kind.broadcast_impl_value = broadcast_impl_value


def _compare_types_by_name(tl: Any) -> None:
    equal = tl.dtype.__eq__

    def __eq__(self: Any, other: Any) -> bool:  # noqa: N807
        if type(self) is type(other) is tl.dtype:
            return self.name == other.name
        return self is other or equal(self, other)

    tl.dtype.__eq__ = __eq__


def _call_builtins_directly(interp: Any) -> None:
    """Without the two wrappers that give a builtin its semantic and ask whether it has one."""
    patch, semantic = interp._patch_attr, interp.interpreter_semantic

    def patch_attr(obj: Any, name: str, member: Any, *args: Any) -> None:
        patch(obj, name, member, *args)
        builtin = getattr(member, "__wrapped__", None)
        if builtin is not None:

            def call(*args: Any, **kwargs: Any) -> Any:
                kwargs["_semantic"] = semantic
                return builtin(*args, **kwargs)

            setattr(obj, name, call)

    interp._patch_attr = patch_attr
