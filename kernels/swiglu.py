"""SwiGLU's elementwise half: y = silu(gate) up, silu(g) = g s, s = 1 / (1 + exp(-g)).

Shazeer 2020, "GLU Variants Improve Transformer", eq. 5. dup = dy silu(gate),  dgate = dy up s (1 + gate (1 - s)).
Nothing but the inputs is saved: the backward is one pass that recomputes s. Where one product made gate and up, it
writes the gradient of that product's rows whole.
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

__all__ = ["SwiGLUFunction", "SwiGLUJoinedFunction", "swiglu"]

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
    dy_ptr, dy_layout, gate_ptr, gate_layout, up_ptr, up_layout, dgate_ptr, dup_ptr, M, N, stride_dm,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row, cols, mask = _tile(M, N, ROWS, BLOCK_N)
    dy = tl.load(dy_ptr + tile_offsets(row, dy_layout, cols), mask=mask, other=0.0).to(DTYPE)
    gate = tl.load(gate_ptr + tile_offsets(row, gate_layout, cols), mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + tile_offsets(row, up_layout, cols), mask=mask, other=0.0).to(DTYPE)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    at = row.to(tl.int64)[:, None] * stride_dm + cols[None, :]
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], *strides: int) -> None:
    """strides: where the kernel takes one, the rows' of its outputs."""
    M, N = outputs[0].shape[:-1].numel(), outputs[0].shape[-1]
    if M * N == 0:
        return
    columns = min(triton.next_power_of_2(N), TILE)
    rows = TILE // columns
    grid = (triton.cdiv(M, rows) * triton.cdiv(N, columns),)
    pairs = [part for x in inputs for part in row_layout(x)]
    DTYPE = statistics(outputs[0].dtype)[1]
    launch(kernel, grid, *pairs, *outputs, M, N, *strides, ROWS=rows, BLOCK_N=columns, DTYPE=DTYPE)


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    y = _swiglu_fwd_fake(gate, up)
    _launch(_swiglu_fwd_kernel, (gate, up), (y,))
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _swiglu_bwd_fake(dy, gate, up)
    _launch(_swiglu_bwd_kernel, (dy, gate, up), (dgate, dup), gate.shape[-1])
    return dgate, dup


def swiglu_joined_fwd(gate_up: Tensor) -> Tensor:
    """Of gate and up side by side, (..., 2 N)."""
    y = _swiglu_joined_fwd_fake(gate_up)
    _launch(_swiglu_fwd_kernel, gate_up.chunk(2, -1), (y,))
    return y


def swiglu_joined_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of both side by side, (..., 2 N)."""
    out = _swiglu_joined_bwd_fake(dy, gate_up)
    _launch(_swiglu_bwd_kernel, (dy, *gate_up.chunk(2, -1)), out.chunk(2, -1), out.shape[-1])
    return out


def _swiglu_joined_fwd_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _swiglu_joined_bwd_fake(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _swiglu_fwd_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_bwd_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return call(_bwd, dy, *ctx.saved_tensors)


def _save_joined(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_joined(ctx: Any, dy: Tensor) -> Tensor:
    return call(_joined_bwd, dy, *ctx.saved_tensors)


def _joined_flops(gate_up: Any, *args: Any, **kwargs: Any) -> int:
    return cost.swiglu_cost(1, torch.Size(gate_up).numel() // 2).flops


def _fwd_flops(gate: Any, up: Any, *args: Any, **kwargs: Any) -> int:
    return cost.swiglu_cost(1, torch.Size(gate).numel()).flops


def _bwd_flops(dy: Any, *args: Any, **kwargs: Any) -> int:
    return cost.swiglu_cost(1, torch.Size(dy).numel(), backward=True).flops


_bwd = define_op(swiglu_bwd, _swiglu_bwd_fake, _bwd_flops)
_fwd = define_op(swiglu_fwd, _swiglu_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)


_joined_bwd = define_op(swiglu_joined_bwd, _swiglu_joined_bwd_fake, _bwd_flops)
_joined_fwd = define_op(
    swiglu_joined_fwd, _swiglu_joined_fwd_fake, _joined_flops, setup_context=_save_joined, backward=_backward_joined
)


class SwiGLUFunction(torch.autograd.Function):
    """apply(gate, up): swiglu without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return call(_fwd, gate, up)

    backward = staticmethod(_backward)


class SwiGLUJoinedFunction(torch.autograd.Function):
    """apply(gate_up): swiglu of one tensor that holds both, without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return call(_joined_fwd, gate_up)

    backward = staticmethod(_backward_joined)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up  (Shazeer 2020, eq. 5).

    gate, up: (..., N) alike, fp32, fp16 or bf16, any strides: the two halves of one projection need no copy.
    up: None where gate holds both, (..., 2 N), gate first; its gradient is then written whole, where that of two halves
    would be joined in a pass of its own.
    Returns (..., N), gate's dtype, contiguous; the arithmetic is fp32. Under autocast nothing is cast.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors the eager
    oracle. Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch.
    """
    check_dtype("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate: expected shape (..., N), got ()")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate: expected shape (..., 2 N) without up, got {tuple(gate.shape)}")
        if not runs_triton(gate):
            return reference.swiglu(gate).contiguous()
        if torch.compiler.is_compiling():
            return _joined_fwd(gate)
        return apply("swiglu", SwiGLUJoinedFunction, gate)
    check_dtype("up", up)
    if up.shape != gate.shape:
        raise ValueError(f"up: expected gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    check_device(("gate", gate), ("up", up))
    if not runs_triton(gate):
        return reference.swiglu(gate, up).contiguous()
    if torch.compiler.is_compiling():
        return _fwd(gate, up)
    return apply("swiglu", SwiGLUFunction, gate, up)
