"""The components of a training step, each as the kernels that a forward and a backward pass launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..kernels.cost import (
    Cost,
    adamw_cost,
    cross_entropy_cost,
    embedding_cost,
    flash_attention_cost,
    fp8_cast_cost,
    fp8_matmul_cost,
    gelu_cost,
    itemsize,
    linear_cross_entropy_cost,
    matmul_cost,
    muon_cost,
    rms_norm_cost,
    rope_cost,
    rope_qkv_cost,
    swiglu_cost,
    tiled_pairs,
)
from ..kernels.linear_cross_entropy import keeps_gradients
from .ceilings import Ceilings
from .config import ModelConfig, hidden_matrices
from .fp8 import IMITATED, NATIVE, InFp8, Matrix, block_matrices

Pair = tuple["Work", "Work | None"]  # forward and backward

LEDGERS = ("full", "exact", "executed")
FP32 = "float32"  # parameters, gradients and both moments; products run in the estimate's dtype
BACKWARD = " backward"
ATTENTION_TILE = (128, 128)  # queries, keys: what one program of the attention kernel takes at a time


@dataclass(frozen=True)
class Work:
    """A kernel's work: what it costs, and its matrix products in each ledger (0 when it has none).

    kernel, sizes: which measured rate is its own.  work: what that rate counts, FLOPs or elements.
    calls: how often the host issues it.
    fp8: NATIVE or IMITATED where it casts to fp8 or multiplies in it.
    """

    cost: Cost
    kernel: str
    sizes: tuple[int, ...]
    work: int
    full: int = 0
    exact: int = 0
    executed: int = 0
    calls: int = 1
    fp8: str = ""

    def __mul__(self, times: int) -> Work:
        amounts = {name: times * getattr(self, name) for name in ("work", "calls", *LEDGERS)}
        return replace(self, cost=self.cost * times, **amounts)

    def flops(self, ledger: str) -> int:
        return {"full": self.full, "exact": self.exact, "executed": self.executed}[ledger]

    def again(self) -> Work:
        """The same, run a second time by checkpointing: no model needs it."""
        return replace(self, full=0, exact=0)

    def roof(self, ceilings: Ceilings, dtype: str) -> tuple[float, str]:
        """The least time that the machine's rates leave it, and which of them asks for that."""
        moved = self.cost.unfused_bytes if self.fp8 == IMITATED else self.cost.bytes
        limits = {"memory": moved / ceilings.copy_bandwidth}
        if self.executed:
            limits["products"] = self.executed / self._product_rate(ceilings, dtype)[0]
        if ceilings.exp_rate is not None:
            limits["exponentials"] = self.cost.exps / ceilings.exp_rate
        limit = max(limits, key=limits.__getitem__)
        return limits[limit], limit

    def seconds(self, ceilings: Ceilings, dtype: str) -> tuple[float, str]:
        """The time it takes, by the kernel's own rate where that was measured, else its roof; and the roof's limit.

        A product in fp8 has the share of its peak that one of the same sizes has in two bytes, but for the bytes that
        it moves; an imitated one is the sum of the product in fp32 and of what is cast around it.
        """
        roof, limit = self.roof(ceilings, dtype)
        peak, alike = self._product_rate(ceilings, dtype) if self.executed else (0.0, dtype)
        rate = ceilings.rate(f"{self.kernel} {alike}", self.sizes)
        if rate is None:
            return roof, limit
        if self.fp8 == NATIVE and self.executed:
            return max(roof, self.work / (rate * peak / ceilings.gemm_rate(alike))), limit
        around = 0
        if self.fp8 == IMITATED and self.executed:
            M, N, K = self.sizes
            product = matmul_cost(M, N, K, alike, backward=self.kernel.endswith(BACKWARD))
            around = self.cost.unfused_bytes - product.bytes * (self.work // product.flops)
        return self.work / rate + around / ceilings.copy_bandwidth, limit

    def _product_rate(self, ceilings: Ceilings, dtype: str) -> tuple[float, str]:
        """FLOP/s of its products at their best, and the dtype in which products of its sizes were measured."""
        if self.fp8 == NATIVE:
            return ceilings.fp8_rate(dtype, "backward" if self.kernel.endswith(BACKWARD) else "forward")
        alike = FP32 if self.fp8 == IMITATED and FP32 in ceilings.gemm_flops else dtype
        return ceilings.gemm_rate(alike), alike


def _gemm(M: int, N: int, K: int, dtype: str, *, backward: bool = False) -> Work:
    cost = matmul_cost(M, N, K, dtype, backward=backward)
    return Work(cost, "gemm" + BACKWARD * backward, (M, N, K), cost.flops, cost.flops, cost.flops, cost.flops)


def _fp8_product(M: int, matrix: Matrix, dtype: str, weight: str, gradient: str, fp8: str) -> list[Pair]:
    """(forward, backward) of what kernels.fp8_linear launches: casts of x and the weight, and of dy; the products.

    weight, gradient: the dtypes in which the weight is read and its gradient written.
    """
    N, K = matrix

    def cast(rows: int, columns: int, of: str) -> Work:
        return replace(_elementwise(fp8_cast_cost(rows, columns, of), "fp8_cast", rows * columns), fp8=fp8)

    def product(cost: Cost, kernel: str) -> Work:
        return Work(cost, kernel, (M, N, K), cost.flops, cost.flops, cost.flops, cost.flops, fp8=fp8)

    dx, dw = fp8_matmul_cost(M, K, N, dtype), fp8_matmul_cost(N, K, M, gradient)
    return [
        (cast(M, K, dtype), cast(M, N, dtype)),
        (cast(N, K, weight), None),
        (product(fp8_matmul_cost(M, N, K, dtype), "gemm"), product(dx + dw, "gemm" + BACKWARD)),
    ]


def _elementwise(cost: Cost, kernel: str, elements: int, *rows: int) -> Work:
    """rows: the size of a row, for kernels whose speed depends on it."""
    return Work(cost, kernel, (elements, *rows), elements)


@dataclass(frozen=True)
class Part:
    """A component before its works are added up."""

    name: str
    parameters: int = 0
    forward: tuple[Work, ...] = ()
    backward: tuple[Work, ...] = ()
    update: tuple[Work, ...] = ()


def _join(a: Part, b: Part) -> Part:
    return Part(a.name, a.parameters + b.parameters, (*a.forward, *b.forward), (*a.backward, *b.backward))


def parts(
    c: ModelConfig, B: int, T: int, dtype: str, *, checkpointing: bool, gpus: int, parallel: str = "fsdp",
    optimizer: str = "adamw", copies: bool = False, low_gradients: bool = False, fp8: str = "",
) -> list[Part]:  # fmt: skip
    """The step's components in the model's order, for B sequences of T tokens on each of `gpus` devices.

    copies: the optimizer keeps copies of the blocks' matrices, which then are not cast.  low_gradients: nor are their
    gradients.  fp8: NATIVE or IMITATED where the blocks' products are in it, as far as their matrices can be.
    Additions of biases and multiplications by a configuration's scales are left out: they ride on kernels that are
    counted, or are small.
    """
    N, L, d, H, K, D, V = B * T, c.n_layer, c.d_model, c.n_head, c.n_kv_head, c.head_dim, c.vocab_size
    low = dtype != FP32

    def layers(name: str, parameters: int, *works: Pair, once: int = 0, times: int = L) -> Part:
        """Layers of (forward, backward) pairs; the last `once` of them are not run again by checkpointing."""
        forward, backward = [w * times for w, _ in works], [w * times for _, w in works if w]
        again = [w.again() for w in forward[: len(forward) - once]] if checkpointing else []
        return Part(name, times * parameters, tuple(forward), (*again, *backward))

    matrices = block_matrices(c)

    def product(name: str) -> list[Pair]:
        n, k = matrix = matrices[name]
        if fp8 and matrix.fp8:
            weight = dtype if copies else FP32
            return _fp8_product(N, matrix, dtype, weight, weight, fp8)
        return [(_gemm(N, n, k, dtype), _gemm(N, n, k, dtype, backward=True))]

    def both(cost: Callable[..., Cost], kernel: str, *rows: int) -> tuple[Work, Work]:
        forward, backward = cost(backward=False), cost(backward=True)
        elements = math.prod(rows)
        return _elementwise(forward, kernel, elements, rows[-1]), _elementwise(
            backward, kernel + BACKWARD, elements, rows[-1]
        )

    def norm(rows: int, size: int, residual: bool = False) -> tuple[Work, Work]:
        cost = partial(rms_norm_cost, rows, size, dtype, residual=residual)
        return both(cost, "rms_norm" + " residual" * residual, rows, size)

    # of the gradients of a tensor that was read twice: the first norm's input, with checkpointing each block's
    add = _elementwise(Cost(N * d, 3 * N * d * itemsize(dtype)), "add", N * d)
    # Every norm but the first is given the two terms of its sum; nothing comes back of the last one's sum itself. With
    # checkpointing a block makes its last sum by itself.
    plain, summing = norm(N, d), norm(N, d, residual=True)
    if checkpointing:
        in_blocks = layers("norms", 2 * d, plain, summing)
        norms = replace(in_blocks, forward=(*in_blocks.forward, plain[0]), backward=(*in_blocks.backward, plain[1]))
    else:
        backward = (summing[1] * (2 * L - 1), plain[1] * 2)
        norms = Part("norms", 2 * d * L, (summing[0] * (2 * L), plain[0]), backward)
    if c.qk_norm:
        sizes = (H * D, K * D) if c.qk_norm == "all" else (D, D)
        of_heads = layers(
            "norms", sum(sizes), norm(N * H * D // sizes[0], sizes[0]), norm(N * K * D // sizes[1], sizes[1])
        )
        norms = _join(norms, of_heads)
    if c.norm_placement == "both":
        norms = _join(norms, layers("norms", 2 * d, plain, plain))
    norms = replace(norms, parameters=norms.parameters + d)
    ffn_matrices = 2 if c.ffn == "gelu" else 3
    ffn_cost = partial(gelu_cost if c.ffn == "gelu" else swiglu_cost, N, c.d_ff, dtype)
    ffn_biases = ((ffn_matrices - 1) * c.d_ff + d) * c.ffn_bias
    activation = both(ffn_cost, c.ffn, N, c.d_ff)
    columns = (H + 2 * K) * D
    products = layers("QKV", (d + c.qkv_bias) * columns, *product("qkv"))
    if c.qk_norm:  # the gradients of q, k and v, joined: two thirds of a sum's traffic
        rotation = both(partial(rope_cost, B, H, K, T, D, dtype), "rope", N * (H + K), D)
        joined = _elementwise(Cost(0, 2 * N * columns * itemsize(dtype)), "add", 2 * N * columns // 3)
        products = replace(products, backward=(*products.backward, joined * L))
    else:
        rotation = both(partial(rope_qkv_cost, B, H, K, T, D, dtype), "rope", N * (H + 2 * K), D)

    def cast(weights: int) -> Cost:
        return Cost(0, weights * (4 + itemsize(dtype)) * low)

    logits, loss = _head(N, d, V, dtype, cast(V * d))

    def casts_of(some: list[Matrix], suffix: str = "") -> tuple[Work, ...]:
        """All layers' casts of these, of each block's four."""
        elements = L * sum(matrix.weights for matrix in some)
        work = _elementwise(cast(elements), "cast" + suffix, elements)
        return (replace(work, calls=len(some) * L),) if some else ()

    weights = L * sum(matrix.weights for matrix in matrices.values())
    # a product in fp8 reads the fp32 weight itself, and its gradient leaves it in the weight's dtype
    plain_matrices = [matrix for matrix in matrices.values() if not (fp8 and matrix.fp8)]
    cast_passes: Passes = casts_of(plain_matrices), casts_of(plain_matrices, BACKWARD)
    if copies:  # the products take the copies
        cast_passes = (), () if low_gradients else casts_of([*matrices.values()], BACKWARD)
    table = [embedding_cost(N, d, V, FP32, backward=b) for b in (False, True)]
    if low:  # the embedding is looked up in fp32, then takes the dtype of the residual stream
        table = [t + Cost(0, N * d * (4 + itemsize(dtype))) for t in table]
    embedding = [_elementwise(table[0], "embedding", N * d), _elementwise(table[1], "embedding backward", (N + V) * d)]
    full_layers = len(c.full_layers) if c.window is not None else 0
    scores = layers("scores and weighted sum", 0, _attention(c, c.window, B, T, dtype), times=L - full_layers)
    if full_layers:
        scores = _join(scores, layers(scores.name, 0, _attention(c, None, B, T, dtype), times=full_layers))
    parts = [
        Part("embedding", V * d, (embedding[0],), (embedding[1],)),
        norms,
        products,
        layers("RoPE", 0, rotation),
        scores,
        layers("output projection", (H * D + c.output_bias) * d, *product("o")),
        layers(
            "FFN",
            ffn_matrices * d * c.d_ff + ffn_biases,
            *product("up"),
            activation,
            *product("down"),
            # the last product's result is not wanted again; in fp8 what it keeps is there when it has ended
            once=not (fp8 and matrices["down"].fp8),
        ),
        layers("residual sums", 0, (add, add), once=1) if checkpointing else Part("residual sums", backward=(add,)),
        Part("logits", 0 if c.tie_embeddings else V * d, *logits),
        Part("loss", 0, *loss),
        *([Part("casts", 0, *cast_passes)] if any(cast_passes) and low else []),
    ]
    parameters = sum(part.parameters for part in parts)
    shards = gpus if parallel == "fsdp" else 1
    matrices_of = hidden_matrices(c) if optimizer == "muon" else {}
    owned = -(-(parameters - sum(short * long * n for (short, long), n in matrices_of.items())) // shards)
    updates = [_adamw(owned)]
    if copies and not matrices_of:  # the copies, and mostly gradients, in the products' dtype; tables, vectors in fp32
        updates = [_adamw(weights, dtype if low_gradients else FP32, dtype), _adamw(owned - weights)]
    parts.append(Part("AdamW", update=tuple(updates)))
    if matrices_of:
        each = {shape: -(-n // gpus) for shape, n in matrices_of.items()}  # that one device orthogonalizes
        turned = [_muon(*shape, dtype) * n for shape, n in each.items()]
        if shards < gpus:  # the others' momenta and moves
            rest = sum(short * long * (n - each[short, long]) for (short, long), n in matrices_of.items())
            turned.append(_elementwise(muon_cost(1, rest, dtype, steps=0), "momentum", rest))
        if copies:
            turned.append(_elementwise(cast(weights), "cast", weights))
        parts.append(Part("Muon", update=tuple(turned)))
    return parts


Passes = tuple[tuple[Work, ...], tuple[Work, ...]]


def _head(N: int, d: int, V: int, dtype: str, cast: Cost) -> tuple[Passes, Passes]:
    """(logits, loss): the works of linear_cross_entropy's forward and backward pass.

    The loss takes the fp32 weight, and casts it and its gradient by itself. Where the forward keeps the gradients,
    their products run in it, and the backward scales them; the full and exact ledgers leave them to the backward.
    """
    keep = keeps_gradients("mean", getattr(torch, dtype))
    head = [linear_cross_entropy_cost(N, d, V, dtype, backward=b, keep_gradients=keep) for b in (False, True)]
    softmax = [cross_entropy_cost(N, V, dtype, backward=b) for b in (False, True)]
    apart = [h.unfused_bytes - s.unfused_bytes + cast.bytes for h, s in zip(head, softmax, strict=True)]
    product, moved = 2 * N * d * V, [h.bytes + cast.bytes for h in head]
    names = [("linear_cross_entropy" + BACKWARD * backward, (N, d, V)) for backward in (False, True)]
    # the softmax's logits are in no memory: what its rows move, and its measured time, stand with the products
    loss = [Work(replace(s, bytes=0), *name, 0) for name, s in zip(names, softmax, strict=True)]
    forward = Work(Cost(product, moved[0], 0, apart[0]), *names[0], product, product, product, product)
    if not keep:
        again = 3 * product
        backward = Work(Cost(again, moved[1], 0, apart[1]), *names[1], again, 2 * product, 2 * product, again)
        return ((forward,), (backward,)), ((loss[0],), (loss[1],))
    gradients = Work(Cost(2 * product, 0), *names[1], 2 * product, executed=2 * product)
    elements = (N + V) * d
    scale = Work(Cost(0, moved[1], 0, apart[1]), "scale", (elements,), elements, 2 * product, 2 * product)
    return ((forward, gradients), (scale,)), ((*loss,), ())


def _adamw(parameters: int, gradient: str = FP32, copy: str | None = None) -> Work:
    return _elementwise(adamw_cost(parameters, gradient_dtype=gradient, copy_dtype=copy), "adamw", parameters)


def _muon(short: int, long: int, dtype: str) -> Work:
    cost = muon_cost(short, long, dtype)  # products of the optimizer: in no ledger of the model's
    # its rate counts the steps as they are defined, however they are taken
    return Work(cost, "muon", (short, long), muon_cost(short, long).flops, executed=cost.flops)


def _attention(c: ModelConfig, window: int | None, B: int, T: int, dtype: str) -> tuple[Work, Work]:
    """The scores and weighted sum of a layer of that window, forward and backward."""
    args = B, c.n_head, c.n_kv_head, T, T, c.head_dim, True, window, dtype
    forward, backward = flash_attention_cost(*args), flash_attention_cost(*args, backward=True)
    full = 4 * B * c.n_head * c.head_dim * T * T
    block_q, block_k = ATTENTION_TILE
    tiled = 4 * B * c.n_head * c.head_dim * tiled_pairs(T, T, True, window, block_q=block_q, block_k=block_k)
    return (
        Work(forward, "attention", (T, c.head_dim), forward.flops, full, forward.flops, tiled),
        Work(
            backward,
            "attention backward",
            (T, c.head_dim),
            backward.flops,
            2 * full,
            2 * forward.flops,
            tiled * 5 // 2,
        ),
    )


def roofline(works: Sequence[Work], ceilings: Ceilings, dtype: str) -> tuple[float, str]:
    """Seconds of the works one after another, and the limit that most of the time goes to."""
    by_limit: dict[str, float] = {}
    for work in works:
        seconds, limit = work.seconds(ceilings, dtype)
        by_limit[limit] = by_limit.get(limit, 0.0) + seconds
    return sum(by_limit.values()), max(by_limit, key=by_limit.__getitem__)


def in_fp8(rows: Sequence[Part], how: str, ceilings: Ceilings | None, dtype: str) -> InFp8:
    """What of these components is in fp8, `how`."""
    works = [work for row in rows for work in (*row.forward, *row.backward) if work.fp8]
    products, casts = [w for w in works if w.executed], [w for w in works if not w.executed]
    seconds = [roofline(some, ceilings, dtype)[0] if ceilings else None for some in (products, casts)]
    return InFp8(how, sum(w.full for w in products), sum(w.cost.bytes for w in casts), *seconds)
