"""Triton's interpreter (TRITON_INTERPRET=1) made right where it is wrong, for triton 3.6 to 3.9.

1. bfloat16. The interpreter holds it as uint16, truncates casts to it and computes on the raw bits: 0.1 becomes 7.9e8.
   Here a cast rounds to nearest even, and arithmetic, products and reductions happen in fp32 and round once.
2. fp8. The interpreter rounds halves up and makes nonsense of small numbers. Here a cast from fp32 is torch's.
3. Loop bounds. triton 3.6 turns the bound of `range(n)` from an array of one element into an int, which numpy refuses
   from 2.4 on.

The corrections hold for every kernel of the process, a user's own too; what has nothing of bfloat16 takes the
interpreter's own way. `correct` applies them, once, where `dispatch` finds itself in the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["correct", "narrow", "widen"]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to the fp32 of the same value."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 values to bfloat16 bits (uint16), to nearest, ties to even."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@functools.cache
def correct() -> bool:
    """Correct the interpreter of this process; whether bfloat16 is exact then, as shown by a kernel that uses it."""
    try:
        from triton.runtime import interpreter

        _correct_loop_bounds(interpreter)
        _correct_bfloat16(interpreter)
        _correct_fp8(interpreter)
        return _is_exact()
    except Exception:  # another version's internals can fail in any way: bfloat16 is then refused, the rest goes on
        return False


def _correct_loop_bounds(interp: Any) -> None:
    patch = interp._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *args: Any) -> None:
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interp._patch_lang_tensor = patch_lang_tensor


def _correct_bfloat16(interp: Any) -> None:
    builder, handle = interp.InterpreterBuilder, interp.TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def fp32(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def bf16(x: Any) -> Any:
        return handle(narrow(x.data), tl.bfloat16)

    def in_fp32(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any) -> Any:
            if not any(is_bf16(x) for x in args):
                return method(self, *args)
            result = method(self, *map(fp32, args))
            is_value = np.asarray(result.data).dtype == np.float32  # a comparison's result is bool
            return bf16(result) if is_value else result

        return wrapped

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt"):
        setattr(builder, name, in_fp32(getattr(builder, name)))

    def cast(method: Callable, position: int) -> Callable:
        @functools.wraps(method)
        def wrapped(self: Any, src: Any, dst_type: Any, *args: Any) -> Any:
            source, target = src.dtype.scalar, dst_type.scalar
            if source == target or tl.bfloat16 not in (source, target):
                return method(self, src, dst_type, *args)
            if position and args[0] == interp._ir.ROUNDING_MODE.RTZ:
                return method(self, src, dst_type, *args)
            if target == tl.bfloat16:
                return bf16(src)
            wide = fp32(src)
            return wide if target == tl.float32 else method(self, wide, dst_type, *args)

        return wrapped

    builder.cast_impl = cast(builder.cast_impl, 0)
    builder.create_fp_to_fp = cast(builder.create_fp_to_fp, 1)
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value])), tl.bfloat16)

    dot = builder.create_dot

    @functools.wraps(dot)
    def dot_of_fp32(self: Any, a: Any, b: Any, acc: Any, *args: Any) -> Any:
        product = dot(self, fp32(a), fp32(b), fp32(acc), *args)
        return bf16(product) if is_bf16(acc) else product

    builder.create_dot = dot_of_fp32

    reduce = interp.ReduceScanOpInterface.apply

    def apply(self: Any, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):
            return apply(self, (inputs,))[0]
        wide = tuple(self.to_tensor(widen(x.handle.data), tl.float32) if x.dtype == tl.bfloat16 else x for x in inputs)
        outputs = reduce(self, wide)
        return tuple(
            self.to_tensor(narrow(out.handle.data), tl.bfloat16)
            if x.dtype == tl.bfloat16 and out.dtype == tl.float32
            else out
            for out, x in zip(outputs, inputs, strict=False)
        )

    interp.ReduceScanOpInterface.apply = apply


def _correct_fp8(interp: Any) -> None:
    builder, handle = interp.InterpreterBuilder, interp.TensorHandle
    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    others = builder.create_fp_to_fp

    @functools.wraps(others)
    def cast(self: Any, src: Any, dst_type: Any, *args: Any) -> Any:
        target = formats.get(dst_type.scalar)
        if src.dtype.scalar != tl.float32 or target is None:
            return others(self, src, dst_type, *args)
        narrowed = torch.from_numpy(np.ascontiguousarray(src.data)).to(target)
        return handle(narrowed.view(torch.uint8).numpy().reshape(src.data.shape), dst_type.scalar)

    builder.create_fp_to_fp = cast


@triton.jit
def _probe_kernel(x_ptr, y_ptr, sum_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.bfloat16)
    tl.store(y_ptr + i, x)
    tl.store(y_ptr + BLOCK + i, x * x)
    tl.store(y_ptr + 2 * BLOCK + i, tl.where(x > 0.5, x, x.to(tl.float32) - 0.1))
    square = tl.broadcast_to(x[:, None], (BLOCK, BLOCK))
    products = tl.dot(square, tl.trans(square))
    tl.store(sum_ptr + i[:, None] * BLOCK + i[None, :], products)
    tl.store(y_ptr + 3 * BLOCK + i, tl.max(x) + tl.zeros((BLOCK,), tl.bfloat16))


def _is_exact() -> bool:
    """Whether casts, arithmetic, a product and a reduction give what torch gives; two of the numbers are ties."""
    x = torch.linspace(-1.0, 1.7, 16, dtype=torch.float32, device="cpu")
    x[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    y = torch.zeros(4, 16, dtype=torch.bfloat16, device="cpu")
    products = torch.zeros(16, 16, dtype=torch.float32, device="cpu")
    _probe_kernel[(1,)](x, y, products, BLOCK=16)
    b = x.bfloat16()
    expected = torch.stack([b, b * b, torch.where(b > 0.5, b, b.float() - 0.1).bfloat16(), b.max().expand(16)])
    return torch.equal(y, expected) and torch.equal(products, 16 * b.float()[:, None] * b.float())
