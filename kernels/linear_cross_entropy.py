"""Cross-entropy of a linear layer's output, x weight^T, whose logits are never in memory as a whole.

The rows are taken a chunk at a time; one buffer holds a chunk's logits, and their gradient takes its place. Two ways:

    kept        the forward turns a chunk's logits into their gradient at once and adds its share to dx and dweight; the
                backward multiplies both by the one number that arrives. Three products, for a "mean" or a "sum".
    recomputed  the forward keeps a log-sum-exp per row, the backward computes the logits again. Four products; any
                upstream gradient, and nothing of the weight's size held between the passes.

Rows of logits lie a multiple of ALIGNMENT apart, whatever V is. The copy of the weight in x's dtype has rows of zeros
up to it, and in 2-byte types an unaligned weight is copied for their sake alone. The row kernels never read a logit
past V and make its gradient zero. An odd N is left alone: a model's width is heads times head size, and only a copy of
x would mend it.
The products are torch.matmul's, so fp32 follows torch.backends' TF32 setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import cost
from .cross_entropy import (
    RowOptions,
    count_targets,
    reduce_losses,
    row_gradients,
    row_losses,
    row_losses_and_gradients,
)
from .dispatch import (
    autocast_dtype,
    call,
    check_device,
    check_dtype,
    check_flag,
    check_integer,
    check_number,
    define_op,
    refuse_transforms,
)
from .labels import check_labels, check_target
from .rows import statistics

__all__ = [
    "KeptLinearCrossEntropyFunction",
    "LinearCrossEntropyFunction",
    "chunk_rows",
    "keeps_gradients",
    "linear_cross_entropy",
    "pad_rows",
    "padded",
]

# Logits of a chunk. On a GPU 2^28, half a GB in bf16: 2048 rows at V = 128k, enough for its matrix products to run at
# full rate. On a CPU 2^22, so that a chunk stays in the cache's reach.
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**22}
# Rows of logits begin at multiples of it: 128 bytes of a 2-byte type. H200, 2026-11-27, 4096 x 1600, V = 50257, bf16,
# TFLOP/s of the products for logits, dx and dweight: 92, 135, 138, for cuBLAS takes kernels that load single elements;
# rows of logits alone aligned 97, 122, 473; the weight's rows too 764, 685, 790.
ALIGNMENT = 64
TILE_ROWS = 128  # of the products' tiles: a chunk holds whole ones


def padded(V: int) -> int:
    """V up to a multiple of ALIGNMENT."""
    return -(-V // ALIGNMENT) * ALIGNMENT


def pad_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of weight (V, N) in `dtype`, (padded(V), N), with zeros past V."""
    V, N = weight.shape
    copy = weight.new_empty(padded(V), N, dtype=dtype)
    copy[:V] = weight
    copy[V:] = 0
    return copy


def chunk_rows(M: int, V: int, device_type: str) -> int:
    """Rows of a chunk: as few chunks as CHUNK_LOGITS allows, about equally long, at least one row each."""
    most = max(1, CHUNK_LOGITS.get(device_type, 2**28) // padded(V))
    chunks = max(1, -(-M // most))
    even = max(1, -(-M // chunks))
    whole = -(-even // TILE_ROWS) * TILE_ROWS
    return min(whole, M) if chunks > 1 and whole <= most else even


def keeps_gradients(reduction: str, dtype: torch.dtype) -> bool:
    """What keep_gradients=None stands for, where a gradient is wanted; dtype is x's."""
    return reduction != "none" and dtype != torch.float16


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the products take it: itself, or a copy with rows of zeros."""
    aligned = weight.shape[0] % ALIGNMENT == 0 or dtype.itemsize > 2
    return weight if weight.dtype == dtype and aligned else pad_rows(weight, dtype)


def _chunk_logits(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of x's rows, and its logits: x (M, N), weight (V or padded(V), N).

    They are a view of a buffer that the next chunk's logits overwrite, its rows padded(V) apart.
    """
    (M, _), V = x.shape, weight.shape[0]
    step = chunk_rows(M, V, x.device.type)
    buffer = x.new_empty(step, padded(V))
    for start in range(0, M, step):
        rows = slice(start, min(start + step, M))
        yield rows, torch.mm(x[rows], weight.T, out=buffer[: rows.stop - start, :V])


class _Gradients:
    """dx and dweight (empty where not needed), summed over the chunks; dweight's sum is in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, needs_dx: bool, needs_dweight: bool) -> None:
        self.x, self.weight, self.needs_dweight = x.reshape(-1, x.shape[-1]), weight, needs_dweight
        self.cast = _in_dtype(weight, x.dtype)  # (V or padded(V), N)
        self.dx = x.new_empty(self.x.shape if needs_dx else 0)
        self.dweight: Tensor | None = None  # (V or padded(V), N)

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """dlogits: (rows, V or padded(V)), as _chunk_logits gave the logits."""
        x = self.x[rows]
        if self.dx.dim() > 1:
            torch.mm(dlogits, self.cast, out=self.dx[rows])
        if self.needs_dweight:
            # one chunk needs no sum, hence no copy of the weight's size in fp32
            alone = len(x) == len(self.x)
            self._add_dweight(dlogits.T, x, self.weight.dtype if alone else statistics(x.dtype)[0])

    def _add_dweight(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        if a.is_cuda and a.dtype.itemsize == 2 and dtype == torch.float32:
            # Added within the product, never rounded. H200, 2026-11-27, a chunk of XL's: 0.88 ms, apart 1.19.
            if self.dweight is None:
                self.dweight = torch.mm(a, b, out_dtype=dtype)
            else:
                torch.addmm(self.dweight, a, b, out_dtype=dtype, out=self.dweight)
        elif self.dweight is None:
            self.dweight = (a @ b).to(dtype)
        else:
            self.dweight += a @ b

    def result(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """(dx of x's shape, dweight of the weight's dtype)."""
        dx = self.dx.view(shape) if self.dx.dim() > 1 else self.dx
        if self.dweight is None:  # not needed, or no rows
            return dx, self.weight.new_zeros(self.weight.shape if self.needs_dweight else 0)
        return dx, self.dweight[: self.weight.shape[0]].to(self.weight.dtype)


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float,
    label_smoothing: float, class_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses and log-sum-exps (rows,)."""
    options = RowOptions(ignore_index, softcap, z_loss, label_smoothing, class_weight)
    loss, lse = _linear_cross_entropy_fwd_fake(x, weight, target, *options)
    x, target, V = x.reshape(-1, x.shape[-1]), target.reshape(-1), weight.shape[0]
    for rows, logits in _chunk_logits(x, _in_dtype(weight, x.dtype)):
        loss[rows], lse[rows] = row_losses(logits[:, :V], target[rows], options)
    return loss, lse


def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, softcap: float,
    z_loss: float, label_smoothing: float, class_weight: Tensor | None, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dweight (empty where not needed) from the gradients of the rows' losses (rows,)."""
    options = RowOptions(ignore_index, softcap, z_loss, label_smoothing, class_weight)
    target, V = target.reshape(-1), weight.shape[0]
    gradients = _Gradients(x, weight, needs_dx, needs_dweight)
    for rows, logits in _chunk_logits(gradients.x, gradients.cast):
        z, t = logits[:, :V], target[rows]
        gradients.add(rows, row_gradients(dloss[rows], z, t, lse[rows], options, out=logits))
    return gradients.result(x.shape)


def linear_cross_entropy_kept(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float,
    label_smoothing: float, class_weight: Tensor | None, reduction: str, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The mean or sum of the losses, its dx and dweight (empty where not needed)."""
    options = RowOptions(ignore_index, softcap, z_loss, label_smoothing, class_weight)
    target, V = target.reshape(-1), weight.shape[0]
    gradients = _Gradients(x, weight, needs_dx, needs_dweight)
    loss = x.new_empty(target.shape, dtype=statistics(x.dtype)[0])
    dloss = torch.ones_like(loss)
    if reduction == "mean":
        dloss /= count_targets(target, ignore_index, class_weight)
    for rows, logits in _chunk_logits(gradients.x, gradients.cast):
        z, t = logits[:, :V], target[rows]
        loss[rows], dlogits = row_losses_and_gradients(dloss[rows], z, t, options, out=logits)
        gradients.add(rows, dlogits)
    return reduce_losses(loss, target, ignore_index, reduction, class_weight), *gradients.result(x.shape)


def linear_cross_entropy_scale(dloss: Tensor, loss: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dweight times dloss, a scalar. loss, not read, leads back to x and weight: a second derivative refuses."""
    factor = dloss.reshape(1)  # torch would first round a factor without dimensions to the gradient's dtype
    dx, dweight = (torch.mul(g, factor, out=torch.empty_like(g)) for g in (dx, dweight))
    return dx, dweight


def _linear_cross_entropy_fwd_fake(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float,
    label_smoothing: float, class_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = statistics(x.dtype)[0]
    return x.new_empty(target.numel(), dtype=dtype), x.new_empty(target.numel(), dtype=dtype)


def _linear_cross_entropy_bwd_fake(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, softcap: float,
    z_loss: float, label_smoothing: float, class_weight: Tensor | None, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if needs_dx else 0), weight.new_empty(weight.shape if needs_dweight else 0)


def _linear_cross_entropy_kept_fake(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float,
    label_smoothing: float, class_weight: Tensor | None, reduction: str, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty((), dtype=statistics(x.dtype)[0])
    return loss, x.new_empty(x.shape if needs_dx else 0), weight.new_empty(weight.shape if needs_dweight else 0)


def _linear_cross_entropy_scale_fake(dloss: Tensor, loss: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dweight)


def _flops(x: Any, weight: Any, *, backward: bool = False, keep_gradients: bool = False) -> int:
    M, (V, N) = torch.Size(x[:-1]).numel(), weight
    return cost.linear_cross_entropy_cost(M, N, V, backward=backward, keep_gradients=keep_gradients).flops


def _fwd_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(x, weight)


def _bwd_flops(dloss: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(x, weight, backward=True)


def _kept_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(x, weight, keep_gradients=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, target, *ctx.options, class_weight = inputs
    ctx.save_for_backward(x, weight, target, output[1], class_weight)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dloss: Tensor, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    *saved, class_weight = ctx.saved_tensors
    dx, dweight = call(_bwd, dloss, *saved, *ctx.options, class_weight, needs_dx, needs_dweight)
    return dx if needs_dx else None, dweight if needs_dweight else None, *[None] * 6


def _save_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(*output[1:])


def _backward_kept(ctx: Any, dloss: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    dx, dweight = call(_scale, dloss, *ctx.saved_tensors)
    return dx if needs_dx else None, dweight if needs_dweight else None, *[None] * 9


_bwd = define_op(linear_cross_entropy_bwd, _linear_cross_entropy_bwd_fake, _bwd_flops)
_fwd = define_op(
    linear_cross_entropy_fwd, _linear_cross_entropy_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward
)
_scale = define_op(linear_cross_entropy_scale, _linear_cross_entropy_scale_fake)
_kept = define_op(
    linear_cross_entropy_kept, _linear_cross_entropy_kept_fake, _kept_flops,
    setup_context=_save_kept, backward=_backward_kept,
)  # fmt: skip


class LinearCrossEntropyFunction(torch.autograd.Function):
    """apply(x, weight, target, *RowOptions): the losses of the rows (rows,), without checks."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


class KeptLinearCrossEntropyFunction(torch.autograd.Function):
    """apply(x, weight, target, *RowOptions, reduction, needs_dx, needs_dweight): the reduced loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = call(_kept, *inputs)
        _save_kept(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward_kept)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    keep_gradients: bool | None = None,
) -> Tensor:
    """cross_entropy of x weight^T without the logits in memory: at most CHUNK_LOGITS of them exist at once.

    x: (..., N), fp32, fp16 or bf16, any strides.  weight: (V, N), cast to x's dtype.  target: (...), int64.  softcap
    c > 0 replaces a logit z by c tanh(z / c); the rest is as in cross_entropy.
    keep_gradients: with a "mean" or a "sum", the forward also makes dx and dweight where they are wanted, and the
    backward multiplies them by the gradient that arrives: three products instead of four. They are held in between, as
    large as x and weight. None does so: the loss is where a step's memory peaks, and there the backward holds them
    beside the logits either way, so that the peak stays. False suits a loss whose backward comes late or never (an
    evaluation without no_grad). For fp16 None is False: gradients not yet scaled up may round to zero there. The
    gradients are those of False, to the bit where a power of two arrives, else up to the rounding of one product.
    Returns fp32: a scalar for "mean" and "sum", (...) for "none". Under autocast x is cast to autocast's dtype, as a
    linear layer would; statistics and the sums of dweight's chunks are fp32.
    The same chunks on every device: the rows' losses and gradients are Triton's on CUDA tensors and, under
    TRITON_INTERPRET=1, on CPU tensors, eager PyTorch's on plain CPU tensors. A second derivative and torch.func
    transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch, as cross_entropy does, on softcap < 0 and on
    keep_gradients=True with reduction "none".
    """
    check_dtype("x", x)
    check_dtype("weight", weight)
    ignore_index = check_integer("ignore_index", ignore_index)
    softcap, z_loss = check_number("softcap", softcap), check_number("z_loss", z_loss)
    if keep_gradients is not None:
        check_flag("keep_gradients", keep_gradients)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., N) with N >= 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (V, {x.shape[-1]}) with V >= 1, got {tuple(weight.shape)}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number, at least 0 (0: none), got {softcap}")
    check_target(target, x.shape[:-1], reduction)
    check_device(("x", x), ("weight", weight), ("target", target))
    if keep_gradients and reduction == "none":
        raise ValueError("keep_gradients: expected None or False with reduction 'none', got True")
    if (dtype := autocast_dtype(x.device.type)) is not None:
        x = x.to(dtype)
    label_smoothing = check_labels(label_smoothing, class_weight, ("x", x), weight.shape[0])
    options = RowOptions(ignore_index, softcap, z_loss, label_smoothing, class_weight)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        refuse_transforms("linear_cross_entropy")
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if wanted and (keeps_gradients(reduction, x.dtype) if keep_gradients is None else keep_gradients):
        args = (x, weight, target, *options, reduction, x.requires_grad, weight.requires_grad)
        return _kept(*args)[0] if compiling else KeptLinearCrossEntropyFunction.apply(*args)
    rows = (x, weight, target, *options)
    losses = _fwd(*rows)[0] if compiling else LinearCrossEntropyFunction.apply(*rows)
    return reduce_losses(losses, target, ignore_index, reduction, class_weight)
