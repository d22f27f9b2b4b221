"""Rotary position embedding: each pair of features (a, b) turns by its position's angle, (a c - b s, b c + a s).

Su et al. 2021, "RoFormer", eq. 34. The backward is the rotation by the opposite angle: the same operator, inverted.
One launch serves q and k; a program keeps its tile of cos and sin while it turns a group of heads. Where one product
made q, k and v, `rope_qkv` turns q and k out of its rows and copies v beside them, so that the rows need not be kept;
its backward writes the rows' gradient whole.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost, plain
from .dispatch import (
    apply,
    call,
    check_device,
    check_dtype,
    check_flag,
    check_integer,
    check_tensor,
    define_op,
    runs_triton,
)
from .launching import launch
from .rows import statistics

__all__ = ["RoPEFunction", "RoPEQKVFunction", "rope", "rope_qkv"]

# Pairs of features in a tile, 8 a thread over 4 warps, and heads that one program turns.
TILE = 1024
HEADS = 4


@triton.jit
def _turn_heads(
    x_ptr, strides, out_ptr, out_strides, first, n_head, batch, t, n_token, c, s, HALF, D,
    HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    TURNS: tl.constexpr = True,
):  # fmt: skip
    """Turn heads first .. first + HEADS - 1 of x (B, n_head, T, D) at tokens t by c and s (BLOCK_T, BLOCK_HALF).

    TURNS: False copies them.
    """
    i = tl.arange(0, BLOCK_HALF)
    live = (t < n_token)[:, None]
    if INTERLEAVED:
        a_feature, b_feature = 2 * i, 2 * i + 1
    else:
        a_feature, b_feature = i, i + HALF
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    for head in range(first, tl.minimum(first + HEADS, n_head)):
        source = x_ptr + batch.to(tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
        source += t.to(tl.int64)[:, None] * strides[2]
        target = out_ptr + batch.to(tl.int64) * out_strides[0] + tl.cast(head, tl.int64) * out_strides[1]
        target += t.to(tl.int64)[:, None] * out_strides[2]
        a_out = target + a_feature.to(tl.int64)[None, :] * out_strides[3]
        b_out = target + b_feature.to(tl.int64)[None, :] * out_strides[3]
        mask = live & (i < HALF)[None, :]
        a = tl.load(source + a_feature.to(tl.int64)[None, :] * strides[3], mask=mask, other=0.0).to(c.dtype)
        b = tl.load(source + b_feature.to(tl.int64)[None, :] * strides[3], mask=mask, other=0.0).to(c.dtype)
        a_turned, b_turned = (a * c - b * s, b * c + a * s) if TURNS else (a, b)
        tl.store(a_out, a_turned.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(b_out, b_turned.to(out_ptr.dtype.element_ty), mask=mask)
        if BLOCK_REST > 1:
            mask = live & (rest < D)[None, :]
            x = tl.load(source + rest.to(tl.int64)[None, :] * strides[3], mask=mask, other=0.0)
            tl.store(target + rest.to(tl.int64)[None, :] * out_strides[3], x, mask=mask)


@triton.jit(do_not_specialize=["n_token"])
def _rope_kernel(
    q_ptr, q_strides, q_out_ptr, q_out_strides, H, k_ptr, k_strides, k_out_ptr, k_out_strides, K,
    v_ptr, v_strides, v_out_ptr, v_out_strides,
    cos_ptr, sin_ptr, stride_cp, stride_sp,
    positions_ptr, stride_pb, stride_pt, n_token, HALF, D,
    BLOCK_T: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    q_groups = tl.cdiv(H, HEADS)
    k_groups = tl.cdiv(K, HEADS)
    groups = q_groups + k_groups * (1 if v_ptr is None else 2)
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    tiles = tl.cdiv(n_token, BLOCK_T)
    batch = tile // tiles
    t = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    if positions_ptr is not None:
        at = batch.to(tl.int64) * stride_pb + t.to(tl.int64) * stride_pt
        position = tl.load(positions_ptr + at, mask=t < n_token, other=0).to(tl.int64)
    else:
        position = t.to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    mask = (t < n_token)[:, None] & (i < HALF)[None, :]
    c = tl.load(cos_ptr + position[:, None] * stride_cp + i[None, :], mask=mask, other=0.0).to(DTYPE)
    s = tl.load(sin_ptr + position[:, None] * stride_sp + i[None, :], mask=mask, other=0.0).to(DTYPE)
    if INVERSE:
        s = -s
    if group < q_groups:
        _turn_heads(
            q_ptr, q_strides, q_out_ptr, q_out_strides, group * HEADS, H, batch, t, n_token, c, s, HALF, D,
            HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    elif group < q_groups + k_groups:
        _turn_heads(
            k_ptr, k_strides, k_out_ptr, k_out_strides, (group - q_groups) * HEADS, K, batch, t, n_token, c, s, HALF, D,
            HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    elif v_ptr is not None:
        _turn_heads(
            v_ptr, v_strides, v_out_ptr, v_out_strides, (group - q_groups - k_groups) * HEADS, K, batch, t, n_token,
            c, s, HALF, D, HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED, False,
        )  # fmt: skip


def _launch(
    q: Tensor, q_out: Tensor, k: Tensor, k_out: Tensor, v: Tensor | None, v_out: Tensor | None,
    cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool,
) -> None:  # fmt: skip
    """Turn q and k, (B, heads, T, D) in any strides, and copy v, each into its output."""
    (B, H, T, D), K, half = q.shape, k.shape[1], cos.shape[-1]
    if B * T == 0 or D == 0 or H + K == 0:
        return
    cos = cos if cos.stride(1) == 1 else cos.contiguous()
    sin = sin if sin.stride(1) == 1 else sin.contiguous()
    stride_pb = positions.stride(0) if positions is not None and positions.dim() == 2 else 0
    stride_pt = positions.stride(-1) if positions is not None else 0
    block_half = max(triton.next_power_of_2(half), 8)
    block_rest = triton.next_power_of_2(D - 2 * half + 1)  # 1 where every feature turns
    block_t = max(1, TILE // block_half)
    groups = triton.cdiv(H, HEADS) + triton.cdiv(K, HEADS) * (1 if v is None else 2)
    v_strides, v_out_strides = (None, None) if v is None or v_out is None else (v.stride(), v_out.stride())
    launch(
        _rope_kernel, (B * triton.cdiv(T, block_t) * groups,),
        q, q.stride(), q_out, q_out.stride(), H, k, k.stride(), k_out, k_out.stride(), K,
        v, v_strides, v_out, v_out_strides,
        cos, sin, cos.stride(0), sin.stride(0), positions, stride_pb, stride_pt, T, half, D,
        BLOCK_T=block_t, HEADS=HEADS, BLOCK_HALF=block_half, BLOCK_REST=block_rest,
        INTERLEAVED=interleaved, INVERSE=inverse, DTYPE=statistics(q.dtype)[1],
    )  # fmt: skip


def rope_turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by their angles, or back by them."""
    q_out, k_out = _rope_turn_fake(q, k, cos, sin, positions, interleaved, inverse)
    _launch(q, q_out, k, k_out, None, None, cos, sin, positions, interleaved, inverse)
    return q_out, k_out


def _rope_turn_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    # Of q's and k's own layouts: attention keeps q's too, so that a model's (B, T, H, D) views are never copied.
    return torch.empty_like(q), torch.empty_like(k)


def _flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = q
    return cost.rope_cost(B, H, k[1], T, D).flops


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *call(_turn, dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None, None


_turn = define_op(rope_turn, _rope_turn_fake, _flops, setup_context=_save, backward=_backward)


class RoPEFunction(torch.autograd.Function):
    """apply(q, k, cos, sin, positions, interleaved, inverse): rope without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = call(_turn, *inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


# ---------------------------------------------------------------- q, k and v of one product


def _heads(rows: Tensor, H: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, K, T, D), views of rows (B, T, (H + 2 K) D)."""
    q, k, v = rows.unflatten(-1, (H + 2 * K, -1)).transpose(1, 2).split((H, K, K), 1)
    return q, k, v


def rope_join(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> Tensor:
    """q and k turned, or turned back, and v as it is, side by side: (B, T, (H + 2 K) D)."""
    rows = _rope_join_fake(q, k, v, cos, sin, positions, inverse)
    q_out, k_out, v_out = _heads(rows, q.shape[1], k.shape[1])
    _launch(q, q_out, k, k_out, v, v_out, cos, sin, positions, False, inverse)
    return rows


def _rope_join_fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> Tensor:
    B, H, T, D = q.shape
    return q.new_empty(B, T, (H + 2 * k.shape[1]) * D)


def _join_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    B, H, T, D = q
    return cost.rope_qkv_cost(B, H, k[1], T, D).flops


def _save_join(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, _, cos, sin, positions, ctx.inverse = inputs
    ctx.heads = q.shape[1], k.shape[1]
    ctx.save_for_backward(cos, sin, positions)


def _backward_join(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    turned = _join(*_heads(drows, *ctx.heads), *ctx.saved_tensors, not ctx.inverse)
    return *_heads(turned, *ctx.heads), None, None, None, None


_join = define_op(rope_join, _rope_join_fake, _join_flops, setup_context=_save_join, backward=_backward_join)


class RoPEQKVFunction(torch.autograd.Function):
    """apply(qkv, cos, sin, n_head, n_kv_head, positions): rope_qkv without its checks, always in Triton."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, positions: Tensor | None) -> Any:
        ctx.save_for_backward(cos, sin, positions)
        return _heads(call(_join, *_heads(qkv, H, K), cos, sin, positions, False), H, K)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return call(_join, dq, dk, dv, *ctx.saved_tensors, True), None, None, None, None, None


# ---------------------------------------------------------------- public


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of features of q and k by their position's angle (Su et al. 2021, eq. 34).

    q: (B, H, T, D).  k: (B, K, T, D).  fp32, fp16 or bf16, any strides.  cos, sin: (positions, R / 2), R <= D, which
    receive no gradient; features past R pass unchanged.  positions: (T,) or (B, T), int32 or int64, rows of cos and
    sin, not checked against their number; None is 0 .. T-1.  Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved.
    Returns both rotated, of their shapes, dtypes and memory layouts; the arithmetic is fp32. Autocast casts nothing.
    Runs Triton on CUDA tensors and, under TRITON_INTERPRET=1, on CPU tensors (fp64 too); on plain CPU tensors eager
    PyTorch. Under the kernels torch.func transforms raise NotImplementedError.
    Raises ValueError on a shape, dtype or device mismatch.
    """
    _check(q, k, cos, sin, positions)
    check_flag("interleaved", interleaved)
    if not runs_triton(q):
        return plain.rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
    if torch.compiler.is_compiling():
        return _turn(q, k, cos, sin, positions, interleaved, False)
    return apply("rope", RoPEFunction, q, k, cos, sin, positions, interleaved, False)


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, *, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one product's rows, q and k turned as `rope` turns them.

    qkv: (B, T, (H + 2 K) D): q's heads, k's, v's.  cos, sin, positions: as in rope.
    Returns q (B, H, T, D), k and v (B, K, T, D), tensors of their own: nothing keeps qkv. Its gradient is written in
    the pass that turns q's and k's back.
    Raises ValueError on a shape, dtype or device mismatch.
    """
    check_dtype("qkv", qkv)
    n_head, n_kv_head = check_integer("n_head", n_head), check_integer("n_kv_head", n_kv_head)
    if qkv.dim() != 3 or n_head < 1 or n_kv_head < 1 or qkv.shape[-1] % (n_head + 2 * n_kv_head):
        raise ValueError(f"qkv: expected shape (B, T, ({n_head} + 2 * {n_kv_head}) D), got {tuple(qkv.shape)}")
    q, k, v = _heads(qkv, n_head, n_kv_head)
    _check(q, k, cos, sin, positions)
    if not runs_triton(qkv):
        return *plain.rope(q, k, cos, sin, interleaved=False, positions=positions), v.clone()
    if torch.compiler.is_compiling():
        return _heads(_join(q, k, v, cos, sin, positions, False), n_head, n_kv_head)
    return apply("rope_qkv", RoPEQKVFunction, qkv, cos, sin, n_head, n_kv_head, positions)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_dtype(name, x)
    check_tensor("positions", positions, optional=True)
    if q.dim() != 4:
        raise ValueError(f"q: expected shape (B, H, T, D), got {tuple(q.shape)}")
    B, _, T, D = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (B, T, D):
        raise ValueError(f"k: expected shape ({B}, K, {T}, {D}), as q, got {tuple(k.shape)}")
    if cos.dim() != 2 or 2 * cos.shape[1] > D:
        raise ValueError(f"cos: expected shape (positions, R / 2) with R <= {D}, got {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    check_device(("q", q), ("k", k), ("cos", cos), ("sin", sin), ("positions", positions))
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos, sin: expected tables that need no gradient; detach them")
    if positions is None:
        if cos.shape[0] < T:
            raise ValueError(f"cos: expected at least T = {T} positions, got {cos.shape[0]}")
        return
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions: expected dtype int32 or int64, got {positions.dtype}")
    if tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(f"positions: expected shape ({T},) or ({B}, {T}), got {tuple(positions.shape)}")
