"""Cross-entropy of a linear layer's output, x weight^T, whose logits are never in memory as a whole.

The rows are taken a chunk at a time: the forward keeps a log-sum-exp per row and drops the chunk's logits; the backward
computes them again, turns them into their gradient in place and adds the chunk's share to dx and dweight. That is a
third more products than keeping the gradients from the forward would take, but any reduction and any upstream gradient
is exact, nothing of the weight's size is held between the passes, and an evaluation pays for no gradient.
The products are torch.matmul's, so fp32 follows torch.backends' TF32 setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import cost
from .cross_entropy import check_target, reduce_losses, row_gradients, row_losses
from .dispatch import call, check_device, check_dtype, define_op, refuse_transforms
from .rows import statistics

__all__ = ["LinearCrossEntropyFunction", "linear_cross_entropy"]

# Logits of a chunk. On a GPU 2^28, half a GB in bf16: 2048 rows at V = 128k, enough for its matrix products to run at
# full rate. On a CPU 2^22, so that a chunk stays in the cache's reach.
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**22}


def _chunks(M: int, V: int, device: torch.device) -> Iterator[slice]:
    rows = max(1, CHUNK_LOGITS.get(device.type, 2**28) // V)
    for start in range(0, M, rows):
        yield slice(start, min(start + rows, M))


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps (rows,)."""
    loss, lse = _linear_cross_entropy_fwd_fake(x, weight, target, ignore_index, softcap, z_loss)
    x, target, weight = x.reshape(-1, x.shape[-1]), target.reshape(-1), weight.to(x.dtype)
    for rows in _chunks(x.shape[0], weight.shape[0], x.device):
        loss[rows], lse[rows] = row_losses(x[rows] @ weight.T, target[rows], ignore_index, z_loss, softcap)
    return loss, lse


def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, softcap: float,
    z_loss: float, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dweight (empty where not needed); dweight's chunks add up in fp32."""
    shape, given = x.shape, weight.dtype
    x, target, weight = x.reshape(-1, shape[-1]), target.reshape(-1), weight.to(x.dtype)
    chunks = list(_chunks(x.shape[0], weight.shape[0], x.device))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    # One chunk needs no sum, hence no copy of the weight's size in fp32.
    dtype = given if len(chunks) == 1 else statistics(x.dtype)[0]
    dweight = torch.zeros_like(weight, dtype=dtype) if needs_dweight else weight.new_empty(0, dtype=given)
    for rows in chunks:
        logits = x[rows] @ weight.T
        dlogits = row_gradients(dloss[rows], logits, target[rows], lse[rows], ignore_index, z_loss, softcap, logits)
        if needs_dx:
            torch.mm(dlogits, weight, out=dx[rows])
        if needs_dweight:
            dweight += dlogits.T @ x[rows]
    return dx.view(shape) if needs_dx else dx, dweight.to(given)


def _linear_cross_entropy_fwd_fake(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    dtype = statistics(x.dtype)[0]
    return x.new_empty(target.numel(), dtype=dtype), x.new_empty(target.numel(), dtype=dtype)


def _linear_cross_entropy_bwd_fake(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, softcap: float,
    z_loss: float, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if needs_dx else 0), weight.new_empty(weight.shape if needs_dweight else 0)


def _fwd_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return cost.linear_cross_entropy_cost(torch.Size(x[:-1]).numel(), x[-1], weight[0]).flops


def _bwd_flops(dloss: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return cost.linear_cross_entropy_cost(torch.Size(x[:-1]).numel(), x[-1], weight[0], backward=True).flops


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, target, ctx.ignore_index, ctx.softcap, ctx.z_loss = inputs
    ctx.save_for_backward(x, weight, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dloss: Tensor, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    dx, dweight = call(
        _bwd, dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.softcap, ctx.z_loss, needs_dx, needs_dweight
    )
    return dx if needs_dx else None, dweight if needs_dweight else None, None, None, None, None


_bwd = define_op(linear_cross_entropy_bwd, _linear_cross_entropy_bwd_fake, _bwd_flops)
_fwd = define_op(
    linear_cross_entropy_fwd, _linear_cross_entropy_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward
)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """apply(x, weight, target, ignore_index, softcap, z_loss): the losses of the rows (rows,), without checks."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy of x weight^T without the logits in memory: at most CHUNK_LOGITS of them exist at once.

    x: (..., N), fp32, fp16 or bf16, any strides.  weight: (V, N), cast to x's dtype.  target: (...), int64.  softcap
    c > 0 replaces a logit z by c tanh(z / c); the rest is as in cross_entropy.
    Returns fp32: a scalar for "mean" and "sum", (...) for "none". Under autocast x is cast to autocast's dtype, as a
    linear layer would; statistics and the sums of dweight's chunks are fp32.
    The same chunks on every device: the rows' losses and gradients are Triton's on CUDA tensors and, under
    TRITON_INTERPRET=1, on CPU tensors, eager PyTorch's on plain CPU tensors. A second derivative and torch.func
    transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch, on softcap < 0 and on an unknown reduction.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., N) with N >= 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (V, {x.shape[-1]}) with V >= 1, got {tuple(weight.shape)}")
    if not softcap >= 0:
        raise ValueError(f"softcap: expected >= 0, got {softcap}")
    check_dtype("x", x)
    check_dtype("weight", weight)
    check_target(target, x.shape[:-1], reduction)
    check_device(("x", x), ("weight", weight), ("target", target))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        losses, _ = _fwd(x, weight, target, ignore_index, softcap, z_loss)
    else:
        refuse_transforms("linear_cross_entropy")
        losses = LinearCrossEntropyFunction.apply(x, weight, target, ignore_index, softcap, z_loss)
    return reduce_losses(losses, target, ignore_index, reduction)
