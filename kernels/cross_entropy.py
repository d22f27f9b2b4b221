"""Softmax cross-entropy with z-loss: per row, loss = lse - x[target] + z lse^2, lse = log sum exp x.

dx = dloss ((1 + 2 z lse) softmax(x) - onehot(target)). z-loss: Chowdhery et al. 2022, "PaLM", section 5.
Smoothed labels (Szegedy et al. 2016, section 7), e of the target's spread evenly over the V classes, and weights w of
the classes, u the target's own, as torch.nn.functional.cross_entropy has both:
    loss = u ((1 - e) (lse - x[target]) + z lse^2) + e / V sum_c w_c (lse - x_c)
    dx   = dloss ((u (1 - e + 2 z lse) + e / V sum_c w_c) softmax(x) - u (1 - e) onehot(target) - e / V w)
Forward: one program a row, with a running maximum and sum (Milakov & Gimelshein 2018, algorithm 3), so that the logits
are read once. Backward: elementwise, from the saved lse. With a softcap c > 0 every x is c tanh(x / c) of what is
stored; linear_cross_entropy uses that on logits that it computes a chunk at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, plain, reference
from .dispatch import (
    apply,
    call,
    check_device,
    check_dtype,
    check_integer,
    check_number,
    define_op,
    runs_triton,
)
from .elementwise import tanh
from .labels import check_labels, check_target
from .launching import launch
from .rows import row_layout, statistics, tile_offsets

__all__ = [
    "CrossEntropyFunction",
    "RowOptions",
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


# class_weight_ptr and smoothing are None where nobody asks for them, mass_ptr (the weights' sum) if either is.


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr, x_layout, target_ptr, class_weight_ptr, mass_ptr, loss_ptr, lse_ptr, V, ignore_index, z_loss, softcap,
    smoothing, BLOCK_V: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK_V)
    top = tl.full((1,), float("-inf"), DTYPE)
    total = tl.zeros((1,), DTYPE)
    if smoothing is not None:
        weighted = tl.zeros((1,), DTYPE)  # the sum of w x
    for start in range(0, V, BLOCK_V):
        at = start + cols
        mask = (at < V)[None, :]
        x = _load_logits(x_ptr, tile_offsets(row, x_layout, at), mask, softcap, CAPPED, DTYPE)
        if smoothing is not None:
            if class_weight_ptr is not None:
                w = tl.load(class_weight_ptr + at, mask=at < V, other=0.0).to(DTYPE)
                weighted += tl.sum(x * w[None, :], axis=1)
            else:
                weighted += tl.sum(x, axis=1)
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
    loss = lse - tl.sum(picked, axis=1)
    if smoothing is not None:
        loss *= 1.0 - smoothing
    loss += z_loss * lse * lse
    if class_weight_ptr is not None:
        loss *= tl.load(class_weight_ptr + target, mask=inside, other=0.0).to(DTYPE)
    if smoothing is not None:
        mass = V if mass_ptr is None else tl.load(mass_ptr).to(DTYPE)
        loss += smoothing / V * (mass * lse - weighted)
    loss = tl.where(inside, loss, tl.where(kept, float("nan"), 0.0))
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _cross_entropy_bwd_kernel(
    x_ptr, x_layout, target_ptr, class_weight_ptr, mass_ptr, lse_ptr, dloss_ptr, dx_ptr, stride_dx, width, V,
    ignore_index, z_loss, softcap, smoothing, BLOCK_V: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_V)
    row = tl.program_id(0) // tiles + tl.arange(0, 1)
    cols = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (cols < V)[None, :]
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    dloss = tl.load(dloss_ptr + row).to(DTYPE)
    x = _load_logits(x_ptr, tile_offsets(row, x_layout, cols), mask, softcap, CAPPED, DTYPE)
    dx = tl.exp(x - lse[:, None])
    slope, hit = 1.0 + 2.0 * z_loss * lse, 1.0  # the loss's derivatives by lse and by -x[target]
    if smoothing is not None:
        hit -= smoothing
    if class_weight_ptr is not None:
        own = tl.load(class_weight_ptr + target, mask=(target >= 0) & (target < V), other=0.0).to(DTYPE)
        if smoothing is not None:
            slope = own * (slope - smoothing) + smoothing / V * tl.load(mass_ptr).to(DTYPE)
            hit = (own * hit)[:, None]
        else:
            dloss *= own
    dx *= slope[:, None]
    dx -= tl.where(cols[None, :] == target[:, None], hit, 0.0)
    if smoothing is not None:
        if class_weight_ptr is not None:
            w = tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0).to(DTYPE)
            dx -= smoothing / V * w[None, :]
        else:
            dx -= smoothing / V
    dx *= dloss[:, None]
    if CAPPED:
        ratio = x / softcap
        dx *= 1.0 - ratio * ratio
    dx = tl.where((target != ignore_index)[:, None] & mask, dx, 0.0)  # zeros past V too
    dx_ptr += row.to(tl.int64)[:, None] * stride_dx + cols[None, :]
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask=(cols < width)[None, :])


# ---------------------------------------------------------------- launchers


class RowOptions(NamedTuple):
    """What a row's loss depends on beside its logits and target. softcap, label_smoothing: 0 for none."""

    ignore_index: int
    softcap: float
    z_loss: float
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None  # (V,)

    def for_kernels(self) -> tuple[Tensor | None, Tensor | None, float | None]:
        """The kernels' class_weight, mass and smoothing, None where nobody asks for them."""
        smoothing, weight = self.label_smoothing or None, self.class_weight
        if weight is None:
            return None, None, smoothing
        mass = weight.sum(dtype=statistics(weight.dtype)[0]) if smoothing else None
        return weight.contiguous(), mass, smoothing


def row_losses(x: Tensor, target: Tensor, options: RowOptions) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps (rows,) of logits (..., V); on plain CPU tensors by eager PyTorch."""
    if not runs_triton(x):
        return plain.row_losses(x, target, options)
    ignore_index, softcap, z_loss, *_ = options
    V = x.shape[-1]
    loss, lse = (x.new_empty(target.numel(), dtype=statistics(x.dtype)[0]) for _ in range(2))
    M = loss.numel()
    if M > 0:
        x, x_layout = row_layout(x)
        weight, mass, smoothed = options.for_kernels()
        launch(
            _cross_entropy_fwd_kernel, (M,),
            x, x_layout, target.contiguous(), weight, mass, loss, lse, V, ignore_index, z_loss, softcap, smoothed,
            BLOCK_V=_tile(V), CAPPED=softcap > 0, DTYPE=statistics(x.dtype)[1], num_warps=WARPS,
        )  # fmt: skip
    return loss, lse


def row_gradients(dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, options: RowOptions, out: Tensor) -> Tensor:
    """out (rows, width >= V), its rows contiguous, filled with the gradient of logits x (..., V), and zeros past V.

    out may begin where x does: then the gradient takes the place of the logits.
    """
    if not runs_triton(x):
        return plain.row_gradients(dloss, x, target, lse, options, out)
    ignore_index, softcap, z_loss, *_ = options
    V, width = x.shape[-1], out.shape[1]
    M = out.shape[0]
    if M > 0:
        x, x_layout = row_layout(x)
        tile = _tile(width)
        weight, mass, smoothed = options.for_kernels()
        launch(
            _cross_entropy_bwd_kernel, (M * triton.cdiv(width, tile),),
            x, x_layout, target.contiguous(), weight, mass, lse, dloss.contiguous(), out, out.stride(0), width, V,
            ignore_index, z_loss, softcap, smoothed,
            BLOCK_V=tile, CAPPED=softcap > 0, DTYPE=statistics(x.dtype)[1], num_warps=WARPS,
        )  # fmt: skip
    return out


def row_losses_and_gradients(
    dloss: Tensor, x: Tensor, target: Tensor, options: RowOptions, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses (rows,), and row_gradients' out, of logits that nobody needs any more."""
    if not runs_triton(x):
        return plain.row_losses_and_gradients(dloss, x, target, options, out)
    loss, lse = row_losses(x, target, options)
    return loss, row_gradients(dloss, x, target, lse, options, out)


def _tile(V: int) -> int:
    return min(max(triton.next_power_of_2(V), 16), TILE)


def cross_entropy_fwd(
    x: Tensor, target: Tensor, ignore_index: int, z_loss: float, label_smoothing: float, class_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return row_losses(x, target, RowOptions(ignore_index, 0.0, z_loss, label_smoothing, class_weight))


def cross_entropy_bwd(
    dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float, label_smoothing: float,
    class_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    dx = x.new_empty(x.shape)
    options = RowOptions(ignore_index, 0.0, z_loss, label_smoothing, class_weight)
    row_gradients(dloss, x, target, lse, options, dx.view(lse.numel(), x.shape[-1]))
    return dx


def _cross_entropy_fwd_fake(
    x: Tensor, target: Tensor, ignore_index: int, z_loss: float, label_smoothing: float, class_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = statistics(x.dtype)[0]
    return x.new_empty(target.numel(), dtype=dtype), x.new_empty(target.numel(), dtype=dtype)


def _cross_entropy_bwd_fake(
    dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float, label_smoothing: float,
    class_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _flops(x: Any, smoothing: float, weight: Any, *, backward: bool = False) -> int:
    labels = {"label_smoothing": smoothing > 0, "class_weight": weight is not None, "backward": backward}
    return cost.cross_entropy_cost(torch.Size(x[:-1]).numel(), x[-1], "float32", **labels).flops


def _fwd_flops(x: Any, target: Any, ignore_index: int, z_loss: float, *labels: Any, **kwargs: Any) -> int:
    return _flops(x, *labels)


def _bwd_flops(dloss: Any, x: Any, target: Any, lse: Any, *options: Any, **kwargs: Any) -> int:
    return _flops(x, *options[2:], backward=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, target, *ctx.options, class_weight = inputs
    ctx.save_for_backward(x, target, output[1], class_weight)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dloss: Tensor, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    *saved, class_weight = ctx.saved_tensors
    return call(_bwd, dloss, *saved, *ctx.options, class_weight), *[None] * 5


_bwd = define_op(cross_entropy_bwd, _cross_entropy_bwd_fake, _bwd_flops)
_fwd = define_op(cross_entropy_fwd, _cross_entropy_fwd_fake, _fwd_flops, setup_context=_save, backward=_backward)

# ---------------------------------------------------------------- public


class CrossEntropyFunction(torch.autograd.Function):
    """apply(logits, target, ignore_index, z_loss, label_smoothing, class_weight): rows' losses, unchecked."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = call(_fwd, *inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


def reduce_losses(
    losses: Tensor, target: Tensor, ignore_index: int, reduction: str, class_weight: Tensor | None = None
) -> Tensor:
    """The rows' losses (rows,) by `reduction`; the mean is over count_targets."""
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    if class_weight is not None:
        class_weight = class_weight.to(total.dtype)  # the mean's too, whatever the weights'
    return total / count_targets(target, ignore_index, class_weight)


def count_targets(target: Tensor, ignore_index: int = -100, class_weight: Tensor | None = None) -> Tensor:
    """What the mean divides by, a scalar on the targets' device: how many are not ignore_index, or the sum of their
    classes' weights; 1 where that is 0.

    A batch in parts, as gradient accumulation takes it, has its mean in their "sum"s over the count of all its targets:
    the parts' own means would weigh a target the more, the fewer there are beside it.
    """
    kept = target != ignore_index
    if class_weight is None:
        return kept.sum().clamp(min=1)
    own = class_weight.to(statistics(class_weight.dtype)[0])[target.clamp(0, class_weight.shape[0] - 1)]
    total = own.masked_fill(~kept, 0).sum()
    return total.masked_fill(total == 0, 1)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(logits)[target] + z_loss * logsumexp(logits)^2 per row  (z-loss: Chowdhery et al. 2022, section 5).

    logits: (..., V), fp32, fp16 or bf16, any strides; never written.  target: (...), int64.  Rows whose target is
    ignore_index count neither in the loss nor in the mean; a batch with no other row gives 0.  Any other target outside
    0 .. V-1 makes its row's loss NaN (on plain CPU tensors, PyTorch's own error).
    label_smoothing: e in [0, 1] puts e / V of the target on each class and leaves it 1 - e (Szegedy et al. 2016).
    class_weight: (V,), fp32, fp16 or bf16, without a gradient of its own: what each class counts.
    Both as in torch.nn.functional.cross_entropy, whose `weight` the latter is; the z-loss is weighted by w[target] as
    the row is. With n_c = -log softmax(logits)[c] a row's loss is
    w[target] ((1 - e) n_target + z_loss logsumexp(logits)^2) + e / V sum_c w[c] n_c,
    and the mean divides the rows' sum by the sum of their w[target] (by 1 where that is 0).
    Returns fp32: a scalar for "mean" and "sum", (...) for "none". Under autocast nothing is cast.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors eager
    PyTorch. Under the kernels a second derivative and torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch, on a label_smoothing outside [0, 1], on a class_weight that
    requires a gradient and on an unknown reduction.
    """
    check_dtype("logits", logits)
    ignore_index, z_loss = check_integer("ignore_index", ignore_index), check_number("z_loss", z_loss)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    check_target(target, logits.shape[:-1], reduction)
    check_device(("logits", logits), ("target", target))
    label_smoothing = check_labels(label_smoothing, class_weight, ("logits", logits), logits.shape[-1])
    if not runs_triton(logits):
        return reference.cross_entropy(
            logits, target, ignore_index=ignore_index, z_loss=z_loss, label_smoothing=label_smoothing,
            class_weight=class_weight, reduction=reduction,
        )  # fmt: skip
    args = (logits, target, ignore_index, z_loss, label_smoothing, class_weight)
    if torch.compiler.is_compiling():
        losses, _ = _fwd(*args)
    else:
        losses = apply("cross_entropy", CrossEntropyFunction, *args)
    return reduce_losses(losses, target, ignore_index, reduction, class_weight)
