"""FLOPs and minimum bytes of every operation, in closed form.

FLOPs. A multiply-add is two. An operation that holds matrix products counts those products alone, as every published
rate does; an elementwise operation counts each arithmetic operation once, an exponential included. Exponentials are
also counted by themselves (`Cost.exps`), because they run on their own, slower unit.

Bytes. The least that one fused kernel can move: each input read once, each output written once, nothing in between
leaves the chip. Statistics (rstd, log-sum-exp) and losses are fp32, targets and token ids int64, cos and sin fp32.

Unfused bytes. What the same costs when every operator reads its operands from memory and writes its result there, as
eager PyTorch does with the oracles of reference.py: the operators are counted, casts to fp32 and back included, with
the values that autograd's formulas pass between them. Left out is what one row or the mask of one head needs.

Sizes are the public contract's: B batch, H query heads, K key-value heads, T queries, S keys, D head size, M rows,
N hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Window = int | tuple[int, int] | None
DType = str | torch.dtype

STATISTIC = 4  # bytes of an fp32 statistic
INDEX = 8  # bytes of an int64 token id
FP8 = 1  # bytes of an fp8 operand's element


@dataclass(frozen=True)
class Cost:
    """What an operation does: floating-point operations, bytes to and from memory, exponentials.

    unfused: the bytes operator by operator; None for an operation that is a single kernel in any case.
    """

    flops: int
    bytes: int
    exps: int = 0
    unfused: int | None = None

    @property
    def unfused_bytes(self) -> int:
        return self.bytes if self.unfused is None else self.unfused

    def __add__(self, other: Cost) -> Cost:
        single = self.unfused is None and other.unfused is None
        unfused = None if single else self.unfused_bytes + other.unfused_bytes
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.exps + other.exps, unfused)

    def __mul__(self, times: int) -> Cost:
        unfused = None if self.unfused is None else self.unfused * times
        return Cost(self.flops * times, self.bytes * times, self.exps * times, unfused)

    __rmul__ = __mul__

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte (0 where nothing moves)."""
        return self.flops / self.bytes if self.bytes else 0.0


def itemsize(dtype: DType) -> int:
    """Bytes of one element of a floating dtype, given as torch.bfloat16 or "bfloat16"; ValueError on another."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype such as 'bfloat16', got {dtype!r}")
    return resolved.itemsize


def _eager(elements: int, passes: int, size: int, casts: int = 0) -> int:
    """Bytes of `passes` reads or writes of fp32 elements, and of `casts` between fp32 and a dtype of `size` bytes."""
    return elements * (passes * max(size, STATISTIC) + casts * (size + STATISTIC) * (size < STATISTIC))


def _reach(T: int, S: int, causal: bool, window: Window) -> tuple[int, int]:
    """How far left and right of its own position a query sees; T + S stands for everything."""
    everything = T + S
    if window is None:
        left, right = everything, everything
    elif isinstance(window, int):
        left, right = window, window
    else:
        left, right = window
    if left < 0 or right < 0:
        raise ValueError(f"window: expected sizes >= 0, got {window!r}")
    return min(left, everything), 0 if causal else min(right, everything)


def _positive_sum(first: int, last: int) -> int:
    """Sum of max(0, p) for p = first..last."""
    first = max(first, 1)
    return (first + last) * (last - first + 1) // 2 if last >= first else 0


def visible_pairs(T: int, S: int, causal: bool = True, window: Window = None) -> int:
    """Number of (query, key) pairs that one head's mask leaves visible.

    Query i stands at p = i + S - T and sees the keys max(0, p - left) .. min(S - 1, p + right), where causal makes
    right 0; an int window w is (w, 0) when causal and (w, w) otherwise. Causal with T = S gives T (T + 1) / 2.
    Raises ValueError on a negative window.
    """
    left, right = _reach(T, S, causal, window)
    first, last = max(S - T, -right), S - 1  # the positions that see at least one key
    if S == 0 or last < first:
        return 0
    rows = last - first + 1
    # sum of min(S - 1, p + right), with min(a, b) = b - max(0, b - a)
    upper = (first + last) * rows // 2 + right * rows - _positive_sum(first + right - last, right)
    lower = _positive_sum(first - left, last - left)  # sum of max(0, p - left)
    return upper - lower + rows


def tiled_pairs(
    T: int, S: int, causal: bool = True, window: Window = None, *, block_q: int = 128, block_k: int = 128
) -> int:
    """Pairs that a tiled kernel computes for one head: whole block_q x block_k tiles wherever one pair is visible."""
    left, right = _reach(T, S, causal, window)
    tiles = 0
    for start in range(0, T, block_q):
        first, last = start + S - T, min(start + block_q, T) - 1 + S - T  # positions of the tile's queries
        low, high = max(0, first - left), min(S - 1, last + right)
        if low <= high:
            tiles += high // block_k - low // block_k + 1
    return tiles * block_q * block_k


def _visible_keys(T: int, S: int, causal: bool, window: Window) -> int:
    """Keys that at least one query sees, the part of K and V that has to be read."""
    if T == 0:
        return 0
    left, _ = _reach(T, S, causal, window)
    return S - max(0, S - T - left)


def matmul_cost(M: int, N: int, K: int, dtype: DType = "bfloat16", *, backward: bool = False) -> Cost:
    """(M, K) @ (K, N). Backward: dX = dY Wᵀ and dW = Xᵀ dY, each as large as the forward."""
    once = Cost(2 * M * N * K, (M * K + K * N + M * N) * itemsize(dtype))
    return 2 * once if backward else once


def fp8_cast_cost(M: int, N: int, dtype: DType = "bfloat16") -> Cost:
    """(M, N) of `dtype` to fp8, as it is and transposed (kernels/fp8.py): read for its largest magnitude and once more.

    Two kernels: one cannot know the scale before it has read everything. Per element a magnitude, a maximum, a product.
    Unfused, by the oracle: the magnitudes and their maximum; in fp32 the quotient, rounded to codes of one form.
    """
    elements, size = M * N, itemsize(dtype)
    unfused = 3 * elements * size + _eager(elements, 3, STATISTIC) + elements * FP8
    return Cost(3 * elements, elements * (2 * size + 2 * FP8), 0, unfused + _eager(elements, 0, size, casts=1))


def fp8_matmul_cost(M: int, N: int, K: int, dtype: DType = "bfloat16") -> Cost:
    """(M, K) @ (N, K)ᵀ of operands in fp8 that are cast already; the result is of `dtype`.

    Unfused, by the oracle: both operands to fp32, the product there, times the scales, to the dtype.
    """
    operands, result = M * K + N * K, M * N
    unfused = operands * (FP8 + 2 * STATISTIC) + result * STATISTIC + _eager(result, 2, itemsize(dtype), casts=1)
    return Cost(2 * M * N * K, operands * FP8 + result * itemsize(dtype), 0, unfused)


def flash_attention_cost(
    B: int,
    H: int,
    K: int,
    T: int,
    S: int,
    D: int,
    causal: bool = True,
    window: Window = None,
    dtype: DType = "bfloat16",
    *,
    backward: bool = False,
    recompute: bool = True,
) -> Cost:
    """Fused attention: the visible pairs only, scores never in memory.

    Forward: 2 products (scores, weighted sum). Backward: 4 (dV, dP, dQ, dK), and a fifth, the scores once more, when
    `recompute` (what a flash kernel executes, and what published backward rates count: 2.5x the forward).
    Bytes: q, k, v, out and the log-sum-exp (for fp32 and the factor that undoes its rounding); backward reads those and
    dout, and writes dq, dk, dv. Unfused, keys and values are repeated for each head and every pair's score, hidden or
    not, goes through memory: forward scaled, masked for its maximum, less that, masked, exp, masked, summed, divided;
    backward the quotient's five operators, mask, exp, mask, scale.
    """
    pairs = B * H * visible_pairs(T, S, causal, window)
    q_size = B * H * T * D
    kv_size = B * K * _visible_keys(T, S, causal, window) * D
    size = itemsize(dtype)
    lse = B * H * T * STATISTIC * (2 if size > 2 else 1)
    all_pairs = B * H * T * S
    product = (all_pairs + q_size + B * H * S * D) * size
    repeated = 2 * B * (K + H) * S * D * size  # backward, the gradients of a group are summed
    if not backward:
        unfused = 2 * product + repeated + _eager(all_pairs, 16, size, casts=2)
        return Cost(4 * pairs * D, (2 * q_size + 2 * kv_size) * size + lse, pairs, unfused)
    products = 5 if recompute else 4
    # dk and dv are written whole: keys that no query sees get zeros
    read_write = 4 * q_size + 2 * kv_size + 2 * B * K * S * D
    unfused = 4 * product + repeated * (K < H) + _eager(all_pairs, 23, size, casts=2)
    return Cost(2 * products * pairs * D, read_write * size + lse, pairs, unfused)


def flash_attention_varlen_cost(
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    H: int,
    K: int,
    D: int,
    causal: bool = True,
    window: Window = None,
    dtype: DType = "bfloat16",
    *,
    backward: bool = False,
    recompute: bool = True,
) -> Cost:
    """Fused attention over packed sequences of the given lengths (the differences of cu_seqlens)."""
    if len(seqlens_q) != len(seqlens_k):
        raise ValueError(f"seqlens_k: expected {len(seqlens_q)} lengths as in seqlens_q, got {len(seqlens_k)}")
    total = Cost(0, 0)
    for T, S in zip(seqlens_q, seqlens_k, strict=True):
        total += flash_attention_cost(1, H, K, T, S, D, causal, window, dtype, backward=backward, recompute=recompute)
    return total


def rms_norm_cost(
    M: int, N: int, dtype: DType = "bfloat16", *, residual: bool = False, weight: bool = True, backward: bool = False
) -> Cost:
    """RMSNorm of M rows of N, with its rstd (fp32, one per row); weight and its gradient have x's dtype.

    Forward per element: square, sum, times rstd, times weight, and one sum with a residual, whose x + residual is a
    second output. Backward per element: xhat, w dy, their product and its sum, xhat c, the difference, times rstd, and
    two for dw; with a residual the gradient of the second output is read and added. Unfused backward: two products of
    w and dy and a sum for dw, two of rstd and a sum, then the mean's and the square's four.
    """
    size = itemsize(dtype)
    elements = M * N
    if not backward:
        flops = (3 + weight + residual) * elements
        moved = (2 + 2 * residual) * elements + weight * N
        passes = 5 + 2 * weight
    else:
        flops = (6 + 3 * weight + residual) * elements
        moved = (3 + residual) * elements + 2 * weight * N
        passes = 17 + 6 * weight
    unfused = _eager(elements, passes, size, casts=2) + 3 * residual * elements * size
    return Cost(flops, moved * size + M * STATISTIC, 0, unfused)


def rope_cost(B: int, H: int, K: int, T: int, D: int, dtype: DType = "bfloat16", *, backward: bool = False) -> Cost:
    """Rotation of q and k by cos and sin (T, D / 2): 4 products and 2 sums for each pair of elements.

    Backward is the inverse rotation and costs the same; `backward` is taken so that every op is called alike.
    """
    elements = B * T * (H + K) * D
    unfused = _eager(elements, 10 if backward else 9, itemsize(dtype), casts=2)  # on halves: 4 products, 2 sums; joined
    return Cost(3 * elements, 2 * elements * itemsize(dtype) + T * D * STATISTIC, 0, unfused)


def rope_qkv_cost(B: int, H: int, K: int, T: int, D: int, dtype: DType = "bfloat16", *, backward: bool = False) -> Cost:
    """The rotation of q and k, and the copy of v, out of one product's rows or back into them.

    Unfused, the backward joins the three gradients head by head and then lays them out by token.
    """
    turned, row = rope_cost(B, H, K, T, D, dtype, backward=backward), B * T * D * itemsize(dtype)
    copied = 2 * K * row
    unfused = turned.unfused_bytes + (4 * (H + 2 * K) * row if backward else copied)
    return Cost(turned.flops, turned.bytes + copied, 0, unfused)


def swiglu_cost(M: int, N: int, dtype: DType = "bfloat16", *, backward: bool = False) -> Cost:
    """silu(gate) * up over M rows of N; backward reads gate, up, dy and writes two gradients."""
    elements = M * N
    flops, moved, passes = (11, 5, 9) if backward else (5, 3, 5)
    unfused = _eager(elements, passes, itemsize(dtype), casts=3)
    return Cost(flops * elements, moved * elements * itemsize(dtype), elements, unfused)


def gelu_cost(M: int, N: int, dtype: DType = "bfloat16", *, backward: bool = False) -> Cost:
    """x Phi(x), with the error function counted as one operation and as one exponential."""
    elements = M * N
    flops, moved = (8, 3) if backward else (5, 2)
    return Cost(flops * elements, moved * elements * itemsize(dtype), (1 + backward) * elements)


def _class_weights(M: int, V: int, label_smoothing: bool) -> int:
    """Bytes of the fp32 weights that M rows read: every class's under smoothed labels, else the targets' own."""
    return (V if label_smoothing else min(M, V)) * STATISTIC


def cross_entropy_cost(
    M: int, V: int, dtype: DType = "bfloat16", *, backward: bool = False, label_smoothing: bool = False,
    class_weight: bool = False,
) -> Cost:  # fmt: skip
    """Softmax cross-entropy of M rows of V logits; one fp32 log-sum-exp per row, losses fp32.

    Forward per logit: maximum, difference, exponential, sum. Backward: difference, exponential, scale. Smoothed labels
    add a sum forward and a difference backward, weighted ones (fp32, per class) a product to each; weights without
    them concern the rows alone. Unfused, the backward also fills the gathered logits' gradient with zeros, adds to it,
    and adds the two gradients. Smoothed forward lse - x is made and summed, weighted in between; backward the sum's
    gradient is spread (and weighted) to lse and, negated, to x.
    """
    size = itemsize(dtype)
    logits = M * V * size
    rows = M * (INDEX + STATISTIC) + class_weight * _class_weights(M, V, label_smoothing)
    more = label_smoothing * (1 + class_weight)
    passes = (12 if backward else 1) + label_smoothing * ((7 if backward else 3) + 2 * class_weight)
    unfused = _eager(M * V, passes, size, casts=1)
    if backward:
        return Cost((3 + more) * M * V, 2 * logits + rows, M * V, unfused)
    return Cost((4 + more) * M * V, logits + rows + M * STATISTIC, M * V, unfused)


def linear_cross_entropy_cost(
    M: int, N: int, V: int, dtype: DType = "bfloat16", *, backward: bool = False, recompute: bool = True,
    keep_gradients: bool = False, label_smoothing: bool = False, class_weight: bool = False,
) -> Cost:  # fmt: skip
    """x (M, N) @ weight (V, N)ᵀ and the cross-entropy of the result, whose logits are never in memory.

    Backward: dx and dweight, and the logits once more when `recompute` (they were not kept). With `keep_gradients` the
    forward makes dx and dweight, from a second exponential, and the backward scales them by one number.
    """
    product = 2 * M * N * V
    operands = (M + V) * N * itemsize(dtype)
    classes = class_weight * _class_weights(M, V, label_smoothing)
    rows = M * (INDEX + STATISTIC) + classes
    options = {"label_smoothing": label_smoothing, "class_weight": class_weight}
    loss = cross_entropy_cost(M, V, dtype, backward=backward, **options)
    apart = matmul_cost(M, V, N, dtype, backward=backward) + loss
    if keep_gradients:
        moved = 2 * operands + STATISTIC  # the loss, or its gradient
        if backward:
            return Cost(0, moved, 0, apart.unfused)
        return Cost(3 * product, moved + M * INDEX + classes, 2 * M * V, apart.unfused)
    if backward:
        exps = M * V if recompute else 0
        return Cost((3 if recompute else 2) * product, 2 * operands + rows, exps, apart.unfused)
    return Cost(product, operands + rows + M * STATISTIC, M * V, apart.unfused)


def embedding_cost(M: int, N: int, V: int, dtype: DType = "bfloat16", *, backward: bool = False) -> Cost:
    """M rows of N looked up in a table of V rows; backward adds M rows into a dense gradient of the table."""
    rows = M * N * itemsize(dtype)
    if backward:
        return Cost(M * N, rows + M * INDEX + V * N * itemsize(dtype))
    return Cost(0, 2 * rows + M * INDEX)


def adamw_cost(
    parameters: int, dtype: DType = "float32", *, state_dtype: DType = "float32", gradient_dtype: DType | None = None,
    copy_dtype: DType | None = None,
) -> Cost:  # fmt: skip
    """One step of AdamW: reads parameter, gradient and two moments, writes parameter and moments; ~15 FLOPs each.

    gradient_dtype: where it is not the parameter's.  copy_dtype: of a copy of the parameter that is written too.
    Unfused, eight operators: the decay of the weights, the first moment, two for the second, its root, quotient and
    epsilon, and the step; together they pass 6 times over parameter or gradient and 14 times over moments. A gradient
    of another dtype is cast first, a copy last.
    """
    size, state = itemsize(dtype), itemsize(state_dtype)
    gradient, copy = itemsize(gradient_dtype or dtype), itemsize(copy_dtype) if copy_dtype else 0
    unfused = 6 * size + 14 * state + (gradient + size) * (gradient != size) + (size + copy) * (copy > 0)
    return Cost(15 * parameters, parameters * (2 * size + gradient + 4 * state + copy), 0, parameters * unfused)


def muon_cost(
    rows: int, columns: int, dtype: DType = "bfloat16", *, steps: int = 5, state_dtype: DType = "float32"
) -> Cost:
    """One step of Muon on a matrix: momentum, then `steps` of Newton-Schulz in `dtype`, three products each.

    With s the shorter side and l the longer, a step is X Xᵀ (s, s), its square, and their polynomial times X (s, l).
    In fp32, from l = 2 s on, there is one X Xᵀ and one product with X; a step has four products (s, s), the first and
    the last one have three and two.
    Bytes: the parameter and the momentum, read and written, the gradient, and each product's operands and result.
    """
    short, long = sorted((rows, columns))
    square, wide = 2 * short**3, 2 * short * short * long
    if steps and itemsize(dtype) >= 4 and long >= 2 * short:
        products = 2 * wide + (4 * steps - 3) * square
        moved = 3 * short * long + (2 + 3 * (4 * steps - 3)) * short * short
    else:
        products = steps * (2 * wide + square)
        moved = steps * (3 * short * long + 4 * short * short)
    return Cost(products, moved * itemsize(dtype) + 5 * rows * columns * itemsize(state_dtype))
