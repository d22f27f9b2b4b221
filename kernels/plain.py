"""Norms, rotations and losses of plain CPU tensors: eager PyTorch with its backward passes written out.

The arithmetic is the oracle's. What autograd makes of the oracle reads and writes memory more often, keeps what can be
had again, and on a CPU that is most of what a step does beside its products. CPU time of both passes, oracle and here
(AMD EPYC, one thread, fp32, 2 x 64 features of 8 x 256 tokens unless said, 2026-11-27):

    norm of 2048 x 128 with a residual    2.1 ms, 1.2
    norm of q's heads                     1.8 ms, 1.5
    rotation of q and k                   4.9 ms, 2.1
    loss's rows, 2048 x 1024             10.9 ms, 6.0

on a busy machine. A SwiGLU written out was no faster than the oracle's (5.2 ms beside 5.0).

The oracle itself runs under torch.compile, which fuses it, under torch.func's transforms and forward-mode AD, and for
subclasses of Tensor. A second derivative is the oracle's, and so are several gradients at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .dispatch import are_wrapped, in_layout_of
from .rows import statistics

__all__ = ["rms_norm", "rope", "row_gradients", "row_losses", "row_losses_and_gradients"]

_is_batched = torch._C._functorch.is_legacy_batchedtensor

Options = tuple[int, float, float, float, Tensor | None]  # cross_entropy.RowOptions


def _serves(*tensors: Tensor | None) -> bool:
    """Whether the functions below may run on these tensors, and not the oracle."""
    if torch.compiler.is_compiling() or dispatch._transforms_are_active() or are_wrapped(*tensors):
        return False
    return all(x is None or type(x) in dispatch._TENSORS for x in tensors)


def _are_batches(*gradients: Tensor | None) -> bool:
    """Whether a backward pass is given several gradients at once, by is_grads_batched or torch.func.vmap."""
    return dispatch._transforms_are_active() or any(x is not None and _is_batched(x) for x in gradients)


def _oracle_gradients(oracle: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], dy: Tensor) -> list[Any]:
    """The gradients of oracle(*inputs), which can be differentiated again; None for what is None or needs none."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: each is a node of its own, whatever leads from one input to another
        own = [None if x is None else x.view_as(x) for x in inputs]
        wanted = {i: x for i, x in enumerate(own) if x is not None and x.requires_grad}
        found = torch.autograd.grad(oracle(*own), list(wanted.values()), dy, create_graph=again)
    gradients: list[Any] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


# ---------------------------------------------------------------- norms


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, offset: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        stream = x if residual is None else (x + residual).contiguous()
        h = stream.to(statistics(x.dtype)[0])
        rstd = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = h * rstd
        if weight is not None:
            y *= weight.to(y.dtype) + offset
        ctx.save_for_backward(stream, weight, rstd)
        ctx.options, ctx.has_residual = (eps, offset), residual is not None
        ctx.set_materialize_grads(False)
        y = y.to(x.dtype).contiguous()
        return y if residual is None else (y, stream)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None = None) -> tuple[Tensor | None, ...]:
        stream, weight, rstd = ctx.saved_tensors
        if dy is None:
            dh, dw = dstream, None
        elif torch.is_grad_enabled() or _are_batches(dy, dstream):
            dh, dw = _oracle_gradients(lambda h, w: _oracle_norm(h, w, *ctx.options), (stream, weight), dy)
            dh = dh if dh is None or dstream is None else dh + dstream
        else:
            dh, dw = _norm_gradients(dy, dstream, stream, weight, rstd, ctx.options[1], ctx.needs_input_grad[1])
        needs = ctx.needs_input_grad
        return dh if needs[0] else None, dw if needs[1] else None, None, dh if needs[3] else None, None


def _oracle_norm(h: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    y = reference.rms_norm(h, weight, eps, weight_offset=offset)
    assert isinstance(y, Tensor)
    return y


def _norm_gradients(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor | None, rstd: Tensor, offset: float,
    needs_dw: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dh = rstd (w dy - rstd^2 h mean(h w dy)) + dstream, and dw = sum over rows of rstd h dy."""
    h, g = stream.to(rstd.dtype), dy.to(rstd.dtype)
    w = None if weight is None else weight.to(rstd.dtype) + offset
    products = g * h
    dot = (products if w is None else products * w).sum(-1, keepdim=True)
    dw = None
    if weight is not None and needs_dw:
        dw = torch.atleast_2d(products.mul_(rstd)).flatten(0, -2).sum(0).to(weight.dtype)
    share = dot.mul_(rstd).mul_(rstd).mul_(-1 / h.shape[-1])
    dh = products.copy_(g) if w is None else torch.mul(g, w, out=products)
    dh.addcmul_(h, share)
    dh = dh.mul_(rstd) if dstream is None else torch.addcmul(dstream.to(dh.dtype), dh, rstd, out=dh)
    return dh.to(stream.dtype), dw


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None, weight_offset: float
) -> Tensor | tuple[Tensor, Tensor]:
    """reference.rms_norm, its results contiguous."""
    if _serves(x, weight, residual) and (residual is None or residual.dtype == x.dtype):
        return _RMSNorm.apply(x, weight, eps, residual, weight_offset)
    result = reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    return result.contiguous() if isinstance(result, Tensor) else (result[0].contiguous(), result[1].contiguous())


# ---------------------------------------------------------------- rotations


class _Rotation(torch.autograd.Function):
    """apply(x, cos, sin, interleaved): x (B, H, T, D) turned by tables (T, R / 2) or (B, 1, T, R / 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        half, wide = cos.shape[-1], statistics(x.dtype)[0]
        c, s = _beside(x, cos, wide), _beside(x, sin, wide)

        def pairs(y: Tensor) -> tuple[Tensor, Tensor]:
            if interleaved:
                return y[..., : 2 * half : 2], y[..., 1 : 2 * half : 2]
            return y[..., :half], y[..., half : 2 * half]

        out = torch.empty_like(x)
        out[..., 2 * half :] = x[..., 2 * half :]
        first, second = (y.to(wide) for y in pairs(x))
        turned = pairs(out) if x.dtype == wide else (torch.empty_like(first), torch.empty_like(second))
        torch.mul(first, c, out=turned[0]).addcmul_(second, s, value=-1)
        torch.mul(second, c, out=turned[1]).addcmul_(first, s)
        if x.dtype != wide:
            for to, y in zip(pairs(out), turned, strict=True):
                to.copy_(y)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        if _are_batches(dy):
            any_x = torch.zeros(dy.shape, dtype=dy.dtype, requires_grad=True)
            oracle = partial(_oracle_rotation, cos=cos, sin=sin, interleaved=ctx.interleaved)
            return _oracle_gradients(oracle, (any_x,), dy)[0], None, None, None
        return _Rotation.apply(dy, cos, -sin, ctx.interleaved), None, None, None


def _oracle_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    tables = cos.flatten(0, -2), sin.flatten(0, -2)
    rows = None if cos.dim() == 2 else torch.arange(tables[0].shape[0]).view(-1, cos.shape[-2])
    return reference.rope(x, x[:, :0], *tables, interleaved=interleaved, positions=rows)[0]


def _beside(x: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table as x's tokens read it; where a token's heads lie side by side, one for each head.

    torch then walks through memory in long rows, where a table that all heads share is met anew for every token.
    """
    table = table.to(dtype)
    if x.shape[0] == 1 or x.stride(1) > x.stride(2):
        return table
    like = x[: 1 if table.dim() == 2 else None, ..., : table.shape[-1]]
    return torch.empty_like(like, dtype=dtype).copy_(table)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """reference.rope, its results in the layouts of q and k."""
    if not _serves(q, k, cos, sin, positions):
        turned = reference.rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
        return in_layout_of(q, turned[0]), in_layout_of(k, turned[1])
    rows = slice(q.shape[2]) if positions is None else positions
    tables = [
        table[rows] if positions is None or positions.dim() == 1 else table[rows][:, None] for table in (cos, sin)
    ]
    return _Rotation.apply(q, *tables, interleaved), _Rotation.apply(k, *tables, interleaved)


# ---------------------------------------------------------------- losses of rows


def row_losses(x: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps (rows,) of logits (..., V)."""
    ignore_index, softcap, z_loss, smoothing, weight = options
    V = x.shape[-1]
    wide = x.reshape(-1, V).to(statistics(x.dtype)[0])
    wide = softcap * torch.tanh(wide / softcap) if softcap > 0 else wide
    kept = (target := target.reshape(-1)) != ignore_index
    index = target.masked_fill(~kept, 0)
    lse = torch.logsumexp(wide, -1)
    loss = lse - wide.gather(-1, index[:, None]).squeeze(-1)
    if smoothing:
        loss *= 1 - smoothing
    loss += z_loss * lse.square()
    if weight is not None:
        weight = weight.to(lse.dtype)
        loss *= weight[index]
    if smoothing:
        spread = V * lse - wide.sum(-1) if weight is None else weight.sum() * lse - wide @ weight
        loss += smoothing / V * spread
    return loss.masked_fill_(~kept, 0), lse


def row_gradients(dloss: Tensor, x: Tensor, target: Tensor, lse: Tensor, options: Options, out: Tensor) -> Tensor:
    """out (rows, width >= V), filled with the gradient of logits x (..., V), and zeros past V; it may begin where x
    does.
    """
    ignore_index, softcap, z_loss, smoothing, weight = options
    V = x.shape[-1]
    wide = x.reshape(-1, V).to(lse.dtype)
    wide = softcap * torch.tanh(wide / softcap) if softcap > 0 else wide
    kept = target.reshape(-1, 1) != ignore_index
    index = target.reshape(-1, 1).masked_fill(~kept, 0)
    slope, hit = 1 + 2 * z_loss * lse[:, None], torch.full_like(lse, 1 - smoothing)[:, None]
    if weight is not None:
        weight = weight.to(lse.dtype)
        slope = weight[index] * (slope - smoothing) + smoothing / V * weight.sum()
        hit *= weight[index]
    dx = (wide - lse[:, None]).exp_()
    if z_loss or weight is not None:
        dx *= slope
    dx.scatter_add_(1, index, -hit)
    if smoothing:
        dx -= smoothing / V * (1 if weight is None else weight)
    if softcap > 0:
        dx *= 1 - (wide / softcap).square()
    dx *= dloss.reshape(-1, 1)
    out[:, :V] = dx if kept.all() else dx.masked_fill_(~kept, 0)
    out[:, V:] = 0
    return out


def row_losses_and_gradients(
    dloss: Tensor, x: Tensor, target: Tensor, options: Options, out: Tensor
) -> tuple[Tensor, Tensor]:
    """row_losses and row_gradients of the logits at once, with one exponential each; x may be overwritten."""
    ignore_index, softcap, z_loss, smoothing, weight = options
    if softcap > 0 or smoothing or weight is not None:
        loss, lse = row_losses(x, target, options)
        return loss, row_gradients(dloss, x, target, lse, options, out)
    V = x.shape[-1]
    wide = x.reshape(-1, V).to(statistics(x.dtype)[0])  # in fp32 the logits themselves
    kept = target.reshape(-1, 1) != ignore_index
    index = target.reshape(-1, 1).masked_fill(~kept, 0)
    top = wide.amax(-1, keepdim=True)
    top.masked_fill_(top.isinf(), 0)  # as logsumexp does: infinite logits give an infinite one
    hit = wide.gather(1, index)
    weights = wide.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = top + total.log()
    loss = (lse - hit).add_(z_loss * lse.square()).masked_fill_(~kept, 0)
    dloss = dloss.reshape(-1, 1)
    weights *= dloss * (1 + 2 * z_loss * lse) / total
    weights.scatter_add_(1, index, -dloss)
    if not kept.all():
        weights.masked_fill_(~kept, 0)
    if out.data_ptr() != weights.data_ptr():
        out[:, :V] = weights
    out[:, V:] = 0
    return loss.squeeze(1), out
