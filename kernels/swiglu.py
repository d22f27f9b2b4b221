"""SwiGLU's elementwise half: y = silu(gate) up, silu(g) = g s, s = 1 / (1 + exp(-g)).

Shazeer 2020, "GLU Variants Improve Transformer", eq. 5. dup = dy silu(gate),  dgate = dy up s (1 + gate (1 - s)).
Nothing but the inputs is saved: the backward is one pass that recomputes s.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, reference
from .dispatch import apply, call, check_device, check_dtype, define_op, runs_triton
from .launching import launch
from .rows import row_layout, statistics, tile_offsets

__all__ = ["SwiGLUFunction", "swiglu"]

# Elements of a tile: 16 a thread over 4 warps, two 16-byte loads of a 2-byte type.
TILE = 2048


@triton.jit
def _tile(M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (ROWS,), columns (BLOCK_N,) and mask (ROWS, BLOCK_N) of this program's tile."""
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(M.dtype) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, cols, ((row >= 0) & (row < M))[:, None] & (cols < N)[None, :]


@triton.jit(do_not_specialize=["M"])
def _swiglu_fwd_kernel(
    gate_ptr, gate_layout, up_ptr, up_layout, y_ptr, M, N,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row, cols, mask = _tile(M, N, ROWS, BLOCK_N)
    gate = tl.load(gate_ptr + tile_offsets(row, gate_layout, cols), mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + tile_offsets(row, up_layout, cols), mask=mask, other=0.0).to(DTYPE)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row.to(tl.int64)[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    dy_ptr, dy_layout, gate_ptr, gate_layout, up_ptr, up_layout, dgate_ptr, dup_ptr, M, N,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row, cols, mask = _tile(M, N, ROWS, BLOCK_N)
    dy = tl.load(dy_ptr + tile_offsets(row, dy_layout, cols), mask=mask, other=0.0).to(DTYPE)
    gate = tl.load(gate_ptr + tile_offsets(row, gate_layout, cols), mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + tile_offsets(row, up_layout, cols), mask=mask, other=0.0).to(DTYPE)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    at = row.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    N = outputs[0].shape[-1]
    if outputs[0].numel() == 0:
        return
    M = outputs[0].numel() // N
    columns = min(triton.next_power_of_2(N), TILE)
    rows = TILE // columns
    grid = (triton.cdiv(M, rows) * triton.cdiv(N, columns),)
    pairs = [part for x in inputs for part in row_layout(x)]
    launch(kernel, grid, *pairs, *outputs, M, N, ROWS=rows, BLOCK_N=columns, DTYPE=statistics(dtype)[1])


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    y = _swiglu_fwd_fake(gate, up)
    _launch(_swiglu_fwd_kernel, (gate, up), (y,), gate.dtype)
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _swiglu_bwd_fake(dy, gate, up)
    _launch(_swiglu_bwd_kernel, (dy, gate, up), (dgate, dup), gate.dtype)
    return dgate, dup


def _swiglu_fwd_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_bwd_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return call(_bwd, dy, *ctx.saved_tensors)


def _fwd_flops(gate: Any, up: Any, *args: Any, **kwargs: Any) -> int:
    return cost.swiglu_cost(1, torch.Size(gate).numel()).flops


def _bwd_flops(dy: Any, *args: Any, **kwargs: Any) -> int:
    return cost.swiglu_cost(1, torch.Size(dy).numel(), backward=True).flops


_bwd = define_op(swiglu_bwd, _swiglu_bwd_fake, _bwd_flops)
_fwd = define_op(swiglu_fwd, _swiglu_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)


class SwiGLUFunction(torch.autograd.Function):
    """apply(gate, up): swiglu without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return call(_fwd, gate, up)

    backward = staticmethod(_backward)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up  (Shazeer 2020, eq. 5).

    gate, up: (..., N) alike, fp32, fp16 or bf16, any strides: the two halves of one projection need no copy.
    Returns gate's shape and dtype, contiguous; the arithmetic is fp32. Under autocast nothing is cast.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors the eager
    oracle. Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch.
    """
    check_dtype("gate", gate)
    check_dtype("up", up)
    if gate.dim() == 0:
        raise ValueError("gate: expected shape (..., N), got ()")
    if up.shape != gate.shape:
        raise ValueError(f"up: expected gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    check_device(("gate", gate), ("up", up))
    if not runs_triton(gate):
        return reference.swiglu(gate, up).contiguous()
    if torch.compiler.is_compiling():
        return _fwd(gate, up)
    return apply("swiglu", SwiGLUFunction, gate, up)
