"""The components of a training step, each as the kernels that a forward and a backward pass launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..kernels.cost import (
    Cost,
    adamw_cost,
    cross_entropy_cost,
    embedding_cost,
    flash_attention_cost,
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

LEDGERS = ("full", "exact", "executed")
FP32 = "float32"  # parameters, gradients and both moments; products run in the estimate's dtype
BACKWARD = " backward"
ATTENTION_TILE = (128, 128)  # queries, keys: what one program of the attention kernel takes at a time


@dataclass(frozen=True)
class Work:
    """A kernel's work: what it costs, and its matrix products in each ledger (0 when it has none).

    kernel, sizes: which measured rate is its own.  work: what that rate counts, FLOPs or elements.
    calls: how often the host issues it.
    """

    cost: Cost
    kernel: str
    sizes: tuple[int, ...]
    work: int
    full: int = 0
    exact: int = 0
    executed: int = 0
    calls: int = 1

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
        limits = {"memory": self.cost.bytes / ceilings.copy_bandwidth}
        if self.executed:
            limits["products"] = self.executed / ceilings.gemm_rate(dtype)
        if ceilings.exp_rate is not None:
            limits["exponentials"] = self.cost.exps / ceilings.exp_rate
        limit = max(limits, key=limits.__getitem__)
        return limits[limit], limit

    def seconds(self, ceilings: Ceilings, dtype: str) -> tuple[float, str]:
        """The time it takes, by the kernel's own rate where that was measured, else its roof; and the roof's limit."""
        roof, limit = self.roof(ceilings, dtype)
        rate = ceilings.rate(f"{self.kernel} {dtype}", self.sizes)
        return roof if rate is None else self.work / rate, limit


def _gemm(M: int, N: int, K: int, dtype: str, *, backward: bool = False) -> Work:
    cost = matmul_cost(M, N, K, dtype, backward=backward)
    return Work(cost, "gemm" + BACKWARD * backward, (M, N, K), cost.flops, cost.flops, cost.flops, cost.flops)


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
    optimizer: str = "adamw", copies: bool = False, low_gradients: bool = False,
) -> list[Part]:  # fmt: skip
    """The step's components in the model's order, for B sequences of T tokens on each of `gpus` devices.

    copies: the optimizer keeps copies of the blocks' matrices, which then are not cast.  low_gradients: nor are their
    gradients.
    Additions of biases and multiplications by a configuration's scales are left out: they ride on kernels that are
    counted, or are small.
    """
    N, L, d, H, K, D, V = B * T, c.n_layer, c.d_model, c.n_head, c.n_kv_head, c.head_dim, c.vocab_size
    low = dtype != FP32

    def layers(name: str, parameters: int, *works: tuple[Work, Work], once: int = 0, times: int = L) -> Part:
        """Layers of (forward, backward) pairs; the last `once` of them are not run again by checkpointing."""
        forward, backward = [w * times for w, _ in works], [w * times for _, w in works]
        again = [w.again() for w in forward[: len(forward) - once]] if checkpointing else []
        return Part(name, times * parameters, tuple(forward), (*again, *backward))

    def gemm(n: int, k: int) -> tuple[Work, Work]:
        return _gemm(N, n, k, dtype), _gemm(N, n, k, dtype, backward=True)

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
    matrices = 2 if c.ffn == "gelu" else 3
    ffn_cost = partial(gelu_cost if c.ffn == "gelu" else swiglu_cost, N, c.d_ff, dtype)
    ffn_biases = ((matrices - 1) * c.d_ff + d) * c.ffn_bias
    activation = both(ffn_cost, c.ffn, N, c.d_ff)
    columns = (H + 2 * K) * D
    products = layers("QKV", (d + c.qkv_bias) * columns, gemm(columns, d))
    if c.qk_norm:  # the gradients of q, k and v, joined: two thirds of a sum's traffic
        rotation = both(partial(rope_cost, B, H, K, T, D, dtype), "rope", N * (H + K), D)
        joined = _elementwise(Cost(0, 2 * N * columns * itemsize(dtype)), "add", 2 * N * columns // 3)
        products = replace(products, backward=(*products.backward, joined * L))
    else:
        rotation = both(partial(rope_qkv_cost, B, H, K, T, D, dtype), "rope", N * (H + 2 * K), D)

    def cast(weights: int) -> Cost:
        return Cost(0, weights * (4 + itemsize(dtype)) * low)

    logits, loss = _head(N, d, V, dtype, cast(V * d))

    weights = L * (2 * d * (H + K) * D + matrices * d * c.d_ff)
    # of each block four: q, k and v; output; gate and up; down
    casts = [replace(_elementwise(cast(weights), f"cast{b}", weights), calls=4 * L) for b in ("", BACKWARD)]
    cast_passes: Passes = (casts[0],), (casts[1],)
    if copies:  # the products take the copies
        cast_passes = (), () if low_gradients else (casts[1],)
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
        layers("output projection", (H * D + c.output_bias) * d, gemm(d, H * D)),
        layers(
            "FFN",
            matrices * d * c.d_ff + ffn_biases,
            gemm((matrices - 1) * c.d_ff, d),
            activation,
            gemm(d, c.d_ff),
            once=1,
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
