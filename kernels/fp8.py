"""A linear layer whose three products are of fp8 operands (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

    y = (X W^T) s_x s_w        dx = (G W) s_g s_w        dw = (G^T X) s_g s_x

X and W are x / s_x and the weight / s_w rounded to e4m3 (to 448, 3 bits of mantissa), G is dy / s_g rounded to e5m2 (to
57344, 2 bits): gradients need the range more. Products accumulate in fp32. One scale a tensor, found anew in each call:
the least power of two that brings the largest magnitude within the format. A power of two divides and multiplies
without rounding, so that the operand is rounded once and is the same whatever multiplies it. It costs no precision, for
these are floats: at most one of e4m3's 18 powers of two, and nothing overflows, so nothing needs clamping.

Scales are never read by the host. One that is not finite (the largest magnitude is inf or NaN) is NaN, and with it all
of the product: a run that stops at a loss that is not finite stops.

Hopper multiplies fp8 only where both operands have the summed dimension innermost, so that every tensor is needed as it
is and transposed: a kernel finds the largest magnitude, a second one writes both forms from one read. What is saved for
the backward pass are the transposed forms of x and the weight, one byte an element.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, reference
from .dispatch import (
    apply,
    call,
    check_device,
    check_dtype,
    checked_once,
    define_op,
    runs_triton,
)
from .launching import launch
from .reference import FP8_EXPONENTS, FP8_MULTIPLE
from .rows import multiprocessors

__all__ = ["FP8LinearFunction", "fp8_linear", "quantize", "refusal"]

# A tile, and warps: rows of it are 128 bytes of bf16 to read, columns 128 bytes to write transposed, which are whole
# cache lines; 64 elements a thread. Chosen so, not measured yet.
BLOCK_M, BLOCK_N, WARPS = 128, 64, 4
# Programs of a multiprocessor. Each leaves one partial maximum, which every program of the cast reads: 2 KB of L2.
PROGRAMS = 4

INFINITY = tl.constexpr(0x7F800000)  # bits of fp32; NaN's are larger
NAN = tl.constexpr(0x7FC00000)
# Added to a number's bits, it carries into the exponent where the mantissa is above 1.75, where both formats end.
ABOVE = tl.constexpr(0x1FFFFF)


@triton.jit
def _tile(x_ptr, stride_xm, stride_xn, M, N, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of x (BLOCK_M, BLOCK_N), fp32, its rows and columns, and its mask."""
    across = tl.cdiv(N, BLOCK_N)
    rows = ((tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = ((tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xn, mask=mask, other=0.0)
    return x.to(tl.float32), rows, cols, mask


@triton.jit(do_not_specialize=["n_tile"])
def _fp8_amax_kernel(
    x_ptr, stride_xm, stride_xn, amax_ptr, M, N, n_tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Each program's largest magnitude, as bits: their order is that of the magnitudes, and NaN is above all."""
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tile in tl.range(tl.program_id(0), n_tile, tl.num_programs(0)):
        x, _rows, _cols, _mask = _tile(x_ptr, stride_xm, stride_xn, M, N, tile, BLOCK_M, BLOCK_N)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(largest, 1), 0))


@triton.jit(do_not_specialize=["n_tile", "n_amax"])
def _fp8_cast_kernel(
    x_ptr, stride_xm, stride_xn, amax_ptr, codes_ptr, transposed_ptr, scale_ptr, M, N, n_tile, n_amax,
    EXPONENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """codes (M, N) and transposed (N, M), contiguous.  EXPONENT: of the format's largest number, 1.75 x 2^EXPONENT."""
    i = tl.arange(0, BLOCK_A)
    largest = tl.max(tl.load(amax_ptr + i, mask=i < n_amax, other=0), 0)
    finite = largest < INFINITY
    # biased by 127, as fp32 has it; 1 is the least whose inverse and itself are normal numbers
    exponent = tl.maximum((tl.where(finite, largest, 0) + ABOVE >> 23) - EXPONENT, 1)
    inverse = (254 - exponent << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, tl.where(finite, exponent << 23, NAN).to(tl.float32, bitcast=True))
    for tile in tl.range(tl.program_id(0), n_tile, tl.num_programs(0)):
        x, rows, cols, mask = _tile(x_ptr, stride_xm, stride_xn, M, N, tile, BLOCK_M, BLOCK_N)
        codes = (x * inverse).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + rows[:, None] * N + cols[None, :], codes, mask=mask)
        if transposed_ptr is not None:
            tl.store(transposed_ptr + cols[:, None] * M + rows[None, :], tl.trans(codes), mask=tl.trans(mask))


def quantize(x: Tensor, dtype: torch.dtype, *, transposed: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """(codes, their transpose, scale): x is codes * scale to the format's precision; by the kernels.

    x: (M, N), of a float dtype, any strides.  dtype: torch.float8_e4m3fn or float8_e5m2.
    codes: (M, N), contiguous.  transpose: (N, M), contiguous, if it is wanted.  scale: (), fp32, a power of two, or NaN
    where x is not finite; the codes are then arbitrary.
    """
    M, N = x.shape
    codes, scale = x.new_empty(M, N, dtype=dtype), x.new_empty((), dtype=torch.float32)
    turned = x.new_empty(N, M, dtype=dtype) if transposed else None
    n_tile = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    most = PROGRAMS * multiprocessors(x.device)
    programs = min(n_tile, most)
    amax = x.new_empty(programs, dtype=torch.int32)
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    launch(_fp8_amax_kernel, (programs,), x, *x.stride(), amax, M, N, n_tile, **tile, num_warps=WARPS)
    launch(
        _fp8_cast_kernel, (programs,), x, *x.stride(), amax, codes, turned, scale, M, N, n_tile, programs,
        EXPONENT=FP8_EXPONENTS[dtype], **tile, BLOCK_A=triton.next_power_of_2(most), num_warps=WARPS,
    )  # fmt: skip
    return codes, turned, scale


def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """(a b^T) scale_a scale_b.  a: (M, K), b: (N, K), fp8.  fast: sums stay in the tensor cores' own registers.

    These keep some 14 bits (DeepSeek-AI 2024, section 3.3.2): enough for a y of two bytes, which keeps 8 or 11.
    Gradients, of which a run adds up thousands, are promoted to fp32 as they are summed.
    """
    if not a.is_cuda:  # the interpreter's
        return reference.fp8_product(a, b, scale_a, scale_b, dtype)
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def fp8_linear_fwd(
    x: Tensor, weight: Tensor, keep_x: bool, keep_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """y, x's codes transposed (K, M) and its scale, the weight's transposed (K, N) and its scale."""
    x8, x8t, x_scale = quantize(x.reshape(-1, x.shape[-1]), torch.float8_e4m3fn, transposed=keep_x)
    w8, w8t, w_scale = quantize(weight, torch.float8_e4m3fn, transposed=keep_weight)
    y = product(x8, w8, x_scale, w_scale, x.dtype, fast=x.dtype.itemsize == 2)
    return y.view(*x.shape[:-1], weight.shape[0]), x8t, x_scale, w8t, w_scale


def fp8_linear_bwd(
    dy: Tensor, x8t: Tensor | None, x_scale: Tensor, w8t: Tensor | None, w_scale: Tensor, wide: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx where the weight's codes are given, dw where x's are.  wide: dw in fp32, else in dy's dtype."""
    g = dy.reshape(-1, dy.shape[-1])
    g8, g8t, g_scale = quantize(g, torch.float8_e5m2, transposed=x8t is not None)
    dx = dw = None
    if w8t is not None:
        dx = product(g8, w8t, g_scale, w_scale, dy.dtype).view(*dy.shape[:-1], w8t.shape[0])
    if x8t is not None and g8t is not None:
        dw = product(g8t, x8t, g_scale, x_scale, torch.float32 if wide else dy.dtype)
    return dx, dw


def _fwd_fake(
    x: Tensor, weight: Tensor, keep_x: bool, keep_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    (N, K), rows = weight.shape, math.prod(x.shape[:-1])
    x8t = x.new_empty(K, rows, dtype=torch.float8_e4m3fn) if keep_x else None
    w8t = x.new_empty(K, N, dtype=torch.float8_e4m3fn) if keep_weight else None
    x_scale, w_scale = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return x.new_empty(*x.shape[:-1], N), x8t, x_scale, w8t, w_scale


def _bwd_fake(
    dy: Tensor, x8t: Tensor | None, x_scale: Tensor, w8t: Tensor | None, w_scale: Tensor, wide: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = None if w8t is None else dy.new_empty(*dy.shape[:-1], w8t.shape[0])
    dtype = torch.float32 if wide else dy.dtype
    return dx, None if x8t is None else dy.new_empty(dy.shape[-1], x8t.shape[0], dtype=dtype)


def _fwd_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return cost.matmul_cost(torch.Size(x[:-1]).numel(), *weight).flops


def _bwd_flops(dy: Any, x8t: Any, x_scale: Any, w8t: Any, *args: Any, **kwargs: Any) -> int:
    rows = torch.Size(dy[:-1]).numel()
    return sum(cost.matmul_cost(rows, dy[-1], t[0]).flops for t in (x8t, w8t) if t is not None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    x, weight, keep_x, keep_weight = inputs
    ctx.wide = weight.dtype != x.dtype
    _, x8t, x_scale, w8t, w_scale = output
    # the operator has empty tensors for None
    ctx.save_for_backward(x8t if keep_x else None, x_scale, w8t if keep_weight else None, w_scale)
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))


def _backward(ctx: Any, dy: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    x8t, x_scale, w8t, w_scale = ctx.saved_tensors
    dx, dw = call(_bwd, dy, x8t, x_scale, w8t, w_scale, ctx.wide)
    return None if w8t is None else dx, None if x8t is None else dw, None, None


_bwd = define_op(fp8_linear_bwd, _bwd_fake, _bwd_flops)
_fwd = define_op(fp8_linear_fwd, _fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)

# ---------------------------------------------------------------- public


class FP8LinearFunction(torch.autograd.Function):
    """apply(x, weight): fp8_linear without its checks, always by the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_dx, needs_dw = ctx.needs_input_grad
        inputs = x, weight, needs_dw, needs_dx
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy)[:2]


def refusal(device: torch.device) -> str | None:
    """Why that device has no products in fp8, a clause; None where it has, as a CPU does, by computing them in fp32."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"expected an NVIDIA GPU of compute capability 8.9 or later, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device)
    return f"expected a GPU of compute capability 8.9 or later, got {name}, which is of {major}.{minor}"


@checked_once
def _check(x: Tensor, weight: Tensor) -> None:
    check_dtype("x", x)
    check_dtype("weight", weight, (torch.float32,) if x.dtype == torch.float32 else (x.dtype, torch.float32))
    check_device(("x", x), ("weight", weight))
    if weight.dim() != 2 or any(n % FP8_MULTIPLE or n == 0 for n in weight.shape):
        raise ValueError(f"weight: expected (N, K), multiples of {FP8_MULTIPLE}, got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape (..., {weight.shape[1]}), got {tuple(x.shape)}")
    rows = math.prod(x.shape[:-1])
    if rows % FP8_MULTIPLE:
        raise ValueError(f"x: expected a multiple of {FP8_MULTIPLE} rows, got {rows} in {tuple(x.shape)}")
    if not torch.compiler.is_compiling() and (reason := refusal(x.device)) is not None:
        raise ValueError(f"x: {reason}")


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by products of fp8 operands, forward and backward (Micikevicius et al. 2022).

    x: (..., K), fp32, fp16 or bf16, any strides.  weight: (N, K), of x's dtype or fp32. K, N and the product of x's
    leading dimensions must be multiples of 16.  Returns (..., N) in x's dtype; dw has the weight's.
    x and the weight are rounded to e4m3 and dy to e5m2, each over the least power of two that keeps it in range.
    Runs Triton kernels and torch's fp8 products on a GPU from compute capability 8.9 on; on a CPU reference.fp8_linear,
    which multiplies the same operands in fp32. Under autocast nothing is cast.
    Values that are not finite make all of the product NaN. Second derivatives are refused.
    Raises ValueError on another shape, dtype or device.
    """
    _check(x, weight)
    if not runs_triton(x) or x.numel() == 0:
        return reference.fp8_linear(x, weight)
    if torch.compiler.is_compiling():
        grads = torch.is_grad_enabled()
        return _fwd(x, weight, grads and weight.requires_grad, grads and x.requires_grad)[0]
    return apply("fp8_linear", FP8LinearFunction, x, weight)
