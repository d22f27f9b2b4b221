"""GELU by its tanh approximation (Hendrycks & Gimpel 2016, §2): y = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).

(1 + tanh u) / 2 is the sigmoid s(2 u) = 1 / (1 + exp(-2 u)), which loses no digits as it falls to 0.
dx = dy (s + x s (1 - s) 2 u'),  u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2). Nothing but x is saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, reference
from .dispatch import apply, call, check_dtype, define_op, runs_triton
from .launching import launch
from .rows import row_layout, statistics, tile_offsets

__all__ = ["GELUFunction", "gelu"]

# Elements of a tile: 16 a thread over 4 warps, two 16-byte loads of a 2-byte type.
TILE = 2048
# 2 u = x (LINEAR + CUBIC x^2), and what makes an exponent of base 2 of -2 u; the interpreter wants a constant second.
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
NEGATIVE_LOG2E = tl.constexpr(-math.log2(math.e))


@triton.jit
def _tile(x_ptr, layout, M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of x (ROWS, BLOCK_N), its offsets in a contiguous tensor, and its mask."""
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(M.dtype) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = ((row >= 0) & (row < M))[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + tile_offsets(row, layout, cols), mask=mask, other=0.0)
    return x, row.to(tl.int64)[:, None] * N + cols[None, :], mask


@triton.jit
def _sigmoids(x, square):
    """s(2 u) and s(-2 u) = 1 - s(2 u), each to its own digits."""
    e = tl.math.exp2(tl.abs(x) * (square * CUBIC + LINEAR) * NEGATIVE_LOG2E)
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large)


@triton.jit(do_not_specialize=["M"])
def _gelu_fwd_kernel(
    x_ptr, layout, y_ptr, M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    x, at, mask = _tile(x_ptr, layout, M, N, ROWS, BLOCK_N)
    x = x.to(DTYPE)
    s, _rest = _sigmoids(x, x * x)
    tl.store(y_ptr + at, (x * s).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gelu_bwd_kernel(
    dy_ptr, dy_layout, x_ptr, layout, dx_ptr, M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    x, at, mask = _tile(x_ptr, layout, M, N, ROWS, BLOCK_N)
    dy, _at, _mask = _tile(dy_ptr, dy_layout, M, N, ROWS, BLOCK_N)
    x = x.to(DTYPE)
    square = x * x
    s, rest = _sigmoids(x, square)
    dx = dy.to(DTYPE) * (s + x * s * rest * (square * CUBIC * 3.0 + LINEAR))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, *inputs: Tensor) -> Tensor:
    """The kernel's output, of the last input's shape and dtype."""
    out = inputs[-1].new_empty(inputs[-1].shape)
    if out.numel() == 0:
        return out
    M, N = out.shape[:-1].numel(), out.shape[-1]
    columns = min(triton.next_power_of_2(N), TILE)
    rows = TILE // columns
    pairs = [part for x in inputs for part in row_layout(x)]
    grid = (triton.cdiv(M, rows) * triton.cdiv(N, columns),)
    launch(kernel, grid, *pairs, out, M, N, ROWS=rows, BLOCK_N=columns, DTYPE=statistics(out.dtype)[1])
    return out


def gelu_fwd(x: Tensor) -> Tensor:
    return _launch(_gelu_fwd_kernel, x)


def gelu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    return _launch(_gelu_bwd_kernel, dy, x)


def _gelu_fwd_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_bwd_fake(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return call(_bwd, dy, *ctx.saved_tensors)


def _fwd_flops(x: Any, *args: Any, **kwargs: Any) -> int:
    return cost.gelu_cost(1, torch.Size(x).numel()).flops


def _bwd_flops(dy: Any, *args: Any, **kwargs: Any) -> int:
    return cost.gelu_cost(1, torch.Size(dy).numel(), backward=True).flops


_bwd = define_op(gelu_bwd, _gelu_bwd_fake, _bwd_flops)
_fwd = define_op(gelu_fwd, _gelu_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)


class GELUFunction(torch.autograd.Function):
    """apply(x): gelu without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return call(_fwd, x)

    backward = staticmethod(_backward)


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2  (Hendrycks & Gimpel 2016, §2).

    x: (..., N), fp32, fp16 or bf16, any strides.  Returns x's shape and dtype, contiguous; the arithmetic is fp32.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors torch's.
    Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a scalar or another dtype.
    """
    check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., N), got ()")
    if not runs_triton(x):
        return reference.gelu(x).contiguous()
    if torch.compiler.is_compiling():
        return _fwd(x)
    return apply("gelu", GELUFunction, x)
