"""Attention's eager calls of a kind that was seen before, which go past the operators to what their launchers did then.

The common call is one: a dense batch in 16 bits, one head size, no sinks or ALiBi, the output alone. All others go the
long way, through the operators of launch.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..dispatch import call, runs_triton
from ..known import Known, prepared
from . import paths
from .checks import Window, check_inputs, check_types, reach, score_numbers
from .launch import bwd_op, flash_attention_bwd, flash_attention_fwd
from .portable import launch as portable
from .portable import tiles

__all__ = ["KnownAttention", "find", "state"]

Options = tuple[int, int, int | None, int | None, float, float]  # T, S, left, right, scale, softcap


def state() -> tuple[Any, ...]:
    """What else a call's path and tiles hang on."""
    return paths.state(), tiles.version()


@prepared
def find(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, causal: bool, window: Window, scale: float | None,
    softcap: float, return_lse: bool,
) -> tuple[Known, Options] | None:  # fmt: skip
    """out and lse of such q, k and v, and the operators' options."""
    check_types(q, k, v, sinks, return_lse)
    check_inputs(q, k, v, sinks, varlen=False)
    options = (q.shape[2], k.shape[2], *reach(causal, window), *score_numbers(scale, softcap, q.shape[-1]))
    if return_lse or sinks is not None or v.shape[-1] != q.shape[-1] or not _serves(q, k):
        return None
    return Known(lambda q, k, v: flash_attention_fwd(q, k, v, None, None, None, *options)[:2]), options


def _serves(q: Tensor, k: Tensor) -> bool:
    compiled = isinstance(portable._flash_attention_fwd_kernel, JITFunction)
    return runs_triton(q) and compiled and q.dtype.itemsize == 2 and q.numel() > 0 and k.numel() > 0


@prepared
def _find_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    T: int, S: int, left: int | None, right: int | None, scale: float, softcap: float,
) -> Known | None:  # fmt: skip
    """dq, dk, dv and None of such tensors: the backward of `find`'s forward."""
    options = (T, S, left, right, scale, softcap)

    def launch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
        return flash_attention_bwd(dout, None, q, k, v, out, lse, None, None, None, None, *options)

    return Known(launch) if _serves(q, k) else None


class KnownAttention(torch.autograd.Function):
    """apply(q, k, v, found): the output alone, of what `find` found."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: tuple[Known, Options]) -> Tensor:
        run, ctx.options = found
        out, lse = run(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 4
        saved, options = ctx.saved_tensors, ctx.options
        if not torch.is_grad_enabled():
            run = _find_backward(state(), dout, *saved, *options)
            if run is not None:
                return run(dout, *saved)
        return *call(bwd_op, dout, None, *saved, None, None, None, None, *options)[:3], None
