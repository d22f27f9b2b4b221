"""Eager calls of a kind that was seen before: what shapes and options decide is worked out once, and kept as a function
of the tensors alone that allocates and launches.

The common call has one: a dense batch in 16 bits, one head size, no sinks or ALiBi, the output alone. All others, and
tensors whose addresses are no multiples of 16, go the long way, through the operators of launch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..dispatch import call, on_its_device, prepared, runs_triton
from ..launching import Alike
from . import paths
from .checks import Window, check_inputs, check_types, reach, score_numbers
from .launch import bwd_op, flash_attention_bwd, flash_attention_fwd, outputs_like
from .portable import launch as portable
from .portable import tiles
from .portable.launch import Problem

__all__ = ["KnownAttention", "find", "state"]

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, v: out and lse
Options = tuple[int, int, int | None, int | None, float, float]  # T, S, left, right, scale, softcap


def state() -> tuple[Any, ...]:
    """What else a call's path and tiles hang on."""
    return paths.state(), tiles.version()


@prepared
def find(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, causal: bool, window: Window, scale: float | None,
    softcap: float, return_lse: bool,
) -> tuple[Forward, Options] | None:  # fmt: skip
    """The forward of flash_attention on such tensors, and the operators' options."""
    check_types(q, k, v, sinks, return_lse)
    check_inputs(q, k, v, sinks, varlen=False)
    options = (q.shape[2], k.shape[2], *reach(causal, window), *score_numbers(scale, softcap, q.shape[-1]))
    if return_lse or sinks is not None or v.shape[-1] != q.shape[-1] or not _serves(q, k):
        return None
    p = Problem(options[0], options[1], None, None, *options[2:], None)
    out, lse, _ = outputs_like(q, False)
    if paths.choose("forward", q, k, _used(p)) == "hopper":
        run = _hopper_forward(q, k, v, out, lse, p)
    else:
        run = _portable_forward(q, k, v, out, lse, p)
    return None if run is None else (on_its_device(run), options)


def _serves(q: Tensor, k: Tensor) -> bool:
    compiled = isinstance(portable._flash_attention_fwd_kernel, JITFunction)
    return runs_triton(q) and compiled and q.dtype.itemsize == 2 and q.numel() > 0 and k.numel() > 0


def _used(p: Problem) -> tuple[bool, ...]:
    return p.left is not None or bool(p.right), False, p.softcap > 0, False, False, p.T < paths.SHORT


def _new_like(x: Tensor) -> Callable[[], Tensor]:
    """Makes tensors of x's shape, strides, dtype and device."""
    shape, strides, dtype, device = x.shape, x.stride(), x.dtype, x.device
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _anywhere(x: Tensor) -> Tensor:
    """Like x, at address 0, which keeps nothing from TMA: others of its kind may stand elsewhere than x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _portable_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem) -> Forward | None:
    plan = portable.forward_plan(q, k, v, out, lse, p)
    if plan is None:
        return None
    launch, new_lse = Alike(plan), _new_like(lse)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), new_lse()
        launch(q, k, v, None, None, out, lse, None, None, None)
        return out, lse

    return run


def _hopper_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem) -> Forward | None:
    try:
        from .hopper import blocks, forward, schedule
    except Exception:  # the long way warns of it
        return None
    if forward.supports(_anywhere(q), _anywhere(k), _anywhere(v), None, p.softcap) is not None:
        return None
    plan, how = forward.plan_of(q, k, out, lse, None, p.T, p.S, p.left, p.right, p.scale)
    if plan is None:
        return None
    launch = Alike(plan)
    block_n, device, new_lse = forward.TILES[q.shape[-1]][0], q.device, _new_like(lse)
    of_q, of_k, of_v, of_out = (
        blocks.describer(x, rows) for x, rows in ((q, 64), (k, block_n), (v, block_n), (out, 64))
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if not (q_at | k_at | v_at) & 15:
            out, lse = torch.empty_like(q), new_lse()
            counter = schedule.tile_counter(device) if how.kind == "dynamic" else None
            try:
                launch(of_q(q_at), of_k(k_at), of_v(v_at), of_out(out.data_ptr()), out, lse, None, None, counter)
                return out, lse
            except Exception as error:
                paths.give_up("forward", error)
        return flash_attention_fwd(q, k, v, None, None, None, *_options(p))[:2]

    return run


def _options(p: Problem) -> Options:
    return p.T, p.S, p.left, p.right, p.scale, p.softcap


# ---------------------------------------------------------------- backward


@prepared
def _find_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, left: int | None, right: int | None,
    scale: float, softcap: float,
) -> Callable[..., tuple[Tensor, ...]] | None:  # fmt: skip
    """dq, dk and dv of such tensors: the backward of `find`'s forward."""
    if not _serves(q, k):
        return None
    p = Problem(q.shape[2], k.shape[2], None, None, left, right, scale, softcap, None)
    if paths.choose("backward", q, k, _used(p)) == "hopper":
        run = _hopper_backward(dout, q, k, v, out, lse, p)
    else:
        run = _portable_backward(dout, q, k, v, out, lse, p)
    return None if run is None else on_its_device(run)


def _portable_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem
) -> Callable[..., tuple[Tensor, ...]]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    plans = portable.backward_plans(q, k, v, out, dout, lse, None, *gradients, p)
    launch_delta, launch_keys, launch_queries = (Alike(plan) for plan in plans if plan is not None)
    new_rows = _new_like(lse)

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lse2, delta = new_rows(), new_rows()
        launch_delta(out, dout, lse, None, lse2, delta, None)
        launch_keys(q, k, v, dout, lse2, delta, None, None, dk, dv, None, None)
        launch_queries(q, k, v, dout, lse2, delta, None, None, dq, None, None)
        return dq, dk, dv

    return run


def _hopper_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: Problem
) -> Callable[..., tuple[Tensor, ...]] | None:
    try:
        from .hopper import backward, blocks
    except Exception:  # the long way warns of it
        return None
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    supported = backward.supports(_anywhere(q), _anywhere(k), _anywhere(v), _anywhere(dout), None, p.softcap) is None
    if not supported or any(blocks.tma_obstacle("x", x, False) for x in (dk, dv)):
        return None
    (B, H, T, D), K, block_m = q.shape, k.shape[1], backward.BLOCK_M[q.shape[-1]]
    n_row_tile = backward.count_row_tiles(q, None, T)
    strides = tuple([x.stride() for x in (out, dout, dq, dk, dv)])
    plans = backward.plans(
        B, n_row_tile, H, K, D, strides, (None, lse.stride()), T, p.S, p.left, p.right, p.scale, True, backward.GROUP
    )
    launch_delta, launch, launch_rounding = map(Alike, plans)
    device, one = q.device, (1,)
    n, lines = H * n_row_tile, block_m * D // backward.LINE.value
    of_dq, of_rows, of_tiles = (n * block_m * D,), (n * 2 * block_m,), (n,)
    half = backward.BLOCK_N // 2
    of_q, of_dout, of_k, of_v, of_dk, of_dv = (
        blocks.describer(x, rows)
        for x, rows in (
            (q, block_m), (dout, block_m), (k, backward.BLOCK_N), (v, backward.BLOCK_N), (dk, half), (dv, half),
        )
    )  # fmt: skip

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        q_at, k_at, v_at, dout_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), dout.data_ptr()
        if not (q_at | k_at | v_at | dout_at) & 15:
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            accumulator = torch.empty_strided(of_dq, one, dtype=torch.float32, device=device)
            rows = torch.empty_strided(of_rows, one, dtype=torch.float32, device=device)
            added = torch.empty_strided(of_tiles, one, dtype=torch.int32, device=device)
            try:
                launch_delta(out, dout, lse, None, None, rows, added, None)
                launch(
                    of_q(q_at), of_dout(dout_at), of_k(k_at), of_v(v_at),
                    blocks.describe_rows(rows, 2 * block_m), blocks.describe_lines(accumulator, lines),
                    of_dk(dk.data_ptr()), of_dv(dv.data_ptr()), dk, dv, added, None, None,
                )  # fmt: skip
                launch_rounding(accumulator, added, dq, None)
                return dq, dk, dv
            except Exception as error:
                paths.give_up("backward", error)
        return flash_attention_bwd(dout, None, q, k, v, out, lse, None, None, None, None, *_options(p))[:3]

    return run


class KnownAttention(torch.autograd.Function):
    """apply(q, k, v, found): the output alone, of what `find` found."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: tuple[Forward, Options]) -> Tensor:
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
            run = _find_backward(state(), dout, *saved, *options[2:])
            if run is not None:
                return *run(dout, *saved), None
        *saved, lse = saved
        return *call(bwd_op, dout, None, *saved, lse, None, None, None, None, *options)[:3], None
