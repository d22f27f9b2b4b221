"""Softmax cross-entropy with z-loss: per row, loss = lse - x[target] + z lse^2, lse = log sum exp x.

dx = dloss ((1 + 2 z lse) softmax(x) - onehot(target)). z-loss: Chowdhery et al. 2022, "PaLM", section 5.
Forward: one program a row, with a running maximum and sum (Milakov & Gimelshein 2018, algorithm 3), so that the logits
are read once. Backward: elementwise, from the saved lse. With a softcap c > 0 every x is c tanh(x / c) of what is
stored; linear_cross_entropy uses that on logits that it computes a chunk at a time.
"""

from __future__ import annotations

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
    check_integer,
    check_number,
    check_tensor,
    define_op,
    runs_triton,
)
from .elementwise import tanh
from .launching import launch
from .rows import row_layout, statistics, tile_offsets

__all__ = [
    "CrossEntropyFunction",
    "check_target",
    "count_targets",
    "cross_entropy",
    "reduce_losses",
    "row_gradients",
    "row_losses",
]

# Logits of a tile: 16 a thread over 8 warps, two 16-byte loads of a 2-byte type.
TILE = 4096
WARPS = 8

# ---------------------------------------------------------------- kernels


@triton.jit
def _load_logits(x_ptr, offsets, mask, softcap, CAPPED: tl.constexpr, DTYPE: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
    if CAPPED:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr, x_layout, target_ptr, loss_ptr, lse_ptr, V, ignore_index, z_loss, softcap,
    BLOCK_V: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK_V)
    top = tl.full((1,), float("-inf"), DTYPE)
    total = tl.zeros((1,), DTYPE)
    for start in range(0, V, BLOCK_V):
        at = start + cols
        mask = (at < V)[None, :]
        x = _load_logits(x_ptr, tile_offsets(row, x_layout, at), mask, softcap, CAPPED, DTYPE)
        x = tl.where(mask, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # every logit so far may be -inf
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
        top = new_top
    lse = tl.where(top == float("-inf"), top, top + tl.log(total))
    target = tl.load(target_ptr + row)
    kept = target != ignore_index
    inside = kept & (target >= 0) & (target < V)
    picked = _load_logits(x_ptr, tile_offsets(row, x_layout, target), inside[:, None], softcap, CAPPED, DTYPE)
    loss = lse - tl.sum(picked, axis=1) + z_loss * lse * lse
    loss = tl.where(inside, loss, tl.where(kept, float("nan"), 0.0))
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _cross_entropy_bwd_kernel(
    x_ptr, x_layout, target_ptr, lse_ptr, dloss_ptr, dx_ptr, stride_dx, width, V, ignore_index, z_loss, softcap,
    BLOCK_V: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_V)
    row = tl.program_id(0) // tiles + tl.arange(0, 1)
    cols = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (cols < V)[None, :]
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    dloss = tl.load(dloss_ptr + row).to(DTYPE)
    x = _load_logits(x_ptr, tile_offsets(row, x_layout, cols), mask, softcap, CAPPED, DTYPE)
    dx = tl.exp(x - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None]
    dx = (dx - tl.where(cols[None, :] == target[:, None], 1.0, 0.0)) * dloss[:, None]
    if CAPPED:
        ratio = x / softcap
        dx *= 1.0 - ratio * ratio
    dx = tl.where((target != ignore_index)[:, None] & mask, dx, 0.0)  # zeros past V too
    dx_ptr += row.to(tl.int64)[:, None] * stride_dx + cols[None, :]
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask=(cols < width)[None, :])


# ---------------------------------------------------------------- launchers


def row_losses(
    x: Tensor, target: Tensor, ignore_index: int, z_loss: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps (rows,) of logits (..., V); on plain CPU tensors by eager PyTorch."""
    if not runs_triton(x):
        wide = x.reshape(-1, x.shape[-1]).to(statistics(x.dtype)[0])
        wide = softcap * torch.tanh(wide / softcap) if softcap > 0 else wide
        kept = (target := target.reshape(-1)) != ignore_index
        lse = torch.logsumexp(wide, -1)
        picked = wide.gather(-1, target.masked_fill(~kept, 0)[:, None]).squeeze(-1)
        return (lse - picked + z_loss * lse.square()).masked_fill_(~kept, 0), lse
    loss, lse = _cross_entropy_fwd_fake(x, target, ignore_index, z_loss)
    M, V = loss.numel(), x.shape[-1]
    if M > 0:
        x, x_layout = row_layout(x)
        launch(
            _cross_entropy_fwd_kernel, (M,),
            x, x_layout, target.contiguous(), loss, lse, V, ignore_index, z_loss, softcap,
            BLOCK_V=_tile(V), CAPPED=softcap > 0, DTYPE=statistics(x.dtype)[1], num_warps=WARPS,
        )  # fmt: skip
    return loss, lse


def row_gradients(
    dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float, softcap: float, out: Tensor
) -> Tensor:
    """out (rows, width >= V), its rows contiguous, filled with the gradient of logits x (..., V), and zeros past V.

    out may begin where x does: then the gradient takes the place of the logits.
    """
    V, width = x.shape[-1], out.shape[1]
    if not runs_triton(x):
        wide = x.reshape(-1, V).to(lse.dtype)
        wide = softcap * torch.tanh(wide / softcap) if softcap > 0 else wide
        kept = target.reshape(-1, 1) != ignore_index
        dx = (wide - lse[:, None]).exp_()
        if z_loss:
            dx *= (1 + 2 * z_loss * lse)[:, None]
        dx.scatter_add_(1, target.reshape(-1, 1).masked_fill(~kept, 0), torch.full_like(lse, -1.0)[:, None])
        if softcap > 0:
            dx *= 1 - (wide / softcap).square()
        dx *= dloss.reshape(-1, 1)
        out[:, :V] = dx if kept.all() else dx.masked_fill_(~kept, 0)
        out[:, V:] = 0
        return out
    M = out.shape[0]
    if M > 0:
        x, x_layout = row_layout(x)
        tile = _tile(width)
        launch(
            _cross_entropy_bwd_kernel, (M * triton.cdiv(width, tile),),
            x, x_layout, target.contiguous(), lse, dloss.contiguous(), out, out.stride(0), width, V, ignore_index,
            z_loss, softcap,
            BLOCK_V=tile, CAPPED=softcap > 0, DTYPE=statistics(x.dtype)[1], num_warps=WARPS,
        )  # fmt: skip
    return out


def _tile(V: int) -> int:
    return min(max(triton.next_power_of_2(V), 16), TILE)


def cross_entropy_fwd(x: Tensor, target: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor]:
    return row_losses(x, target, ignore_index, z_loss)


def cross_entropy_bwd(
    dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    dx = _cross_entropy_bwd_fake(dloss, x, target, lse, ignore_index, z_loss)
    row_gradients(dloss, x, target, lse, ignore_index, z_loss, 0.0, dx.view(lse.numel(), x.shape[-1]))
    return dx


def _cross_entropy_fwd_fake(x: Tensor, target: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor]:
    dtype = statistics(x.dtype)[0]
    return x.new_empty(target.numel(), dtype=dtype), x.new_empty(target.numel(), dtype=dtype)


def _cross_entropy_bwd_fake(
    dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    return x.new_empty(x.shape)


def _fwd_flops(x: Any, target: Any, *args: Any, **kwargs: Any) -> int:
    return cost.cross_entropy_cost(torch.Size(target).numel(), x[-1]).flops


def _bwd_flops(dloss: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return cost.cross_entropy_cost(torch.Size(x[:-1]).numel(), x[-1], backward=True).flops


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, target, ctx.ignore_index, ctx.z_loss = inputs
    ctx.save_for_backward(x, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dloss: Tensor, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    return call(_bwd, dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss), None, None, None


_bwd = define_op(cross_entropy_bwd, _cross_entropy_bwd_fake, _bwd_flops)
_fwd = define_op(cross_entropy_fwd, _cross_entropy_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)

# ---------------------------------------------------------------- public


class CrossEntropyFunction(torch.autograd.Function):
    """apply(logits, target, ignore_index, z_loss): the losses of the rows (rows,), without checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


def check_target(target: Tensor, shape: torch.Size, reduction: str) -> None:
    """Raise ValueError unless target is an int64 tensor of the given shape and reduction a known one."""
    check_tensor("target", target)
    if target.shape != shape:
        raise ValueError(f"target: expected shape {tuple(shape)}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected dtype int64, got {str(target.dtype).removeprefix('torch.')}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def reduce_losses(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The rows' losses (rows,) by `reduction`; the mean is over the rows whose target is not ignore_index."""
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / count_targets(target, ignore_index)


def count_targets(target: Tensor, ignore_index: int = -100) -> Tensor:
    """What the mean divides by: the targets that are not ignore_index, one at least; a scalar on their device.

    A batch in parts, as gradient accumulation takes it, has its mean in their "sum"s over the count of all its targets:
    the parts' own means would weigh a target the more, the fewer there are beside it.
    """
    return (target != ignore_index).sum().clamp(min=1)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(logits)[target] + z_loss * logsumexp(logits)^2 per row  (z-loss: Chowdhery et al. 2022, section 5).

    logits: (..., V), fp32, fp16 or bf16, any strides; never written.  target: (...), int64.  Rows whose target is
    ignore_index count neither in the loss nor in the mean; a batch with no other row gives 0.  Any other target outside
    0 .. V-1 makes its row's loss NaN (on plain CPU tensors, PyTorch's own error).
    Returns fp32: a scalar for "mean" and "sum", (...) for "none". Under autocast nothing is cast.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors the eager
    oracle. Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch and on an unknown reduction.
    """
    check_dtype("logits", logits)
    ignore_index, z_loss = check_integer("ignore_index", ignore_index), check_number("z_loss", z_loss)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    check_target(target, logits.shape[:-1], reduction)
    check_device(("logits", logits), ("target", target))
    if not runs_triton(logits):
        return reference.cross_entropy(logits, target, ignore_index=ignore_index, z_loss=z_loss, reduction=reduction)
    if torch.compiler.is_compiling():
        losses, _ = _fwd(logits, target, ignore_index, z_loss)
    else:
        losses = apply("cross_entropy", CrossEntropyFunction, logits, target, ignore_index, z_loss)
    return reduce_losses(losses, target, ignore_index, reduction)
