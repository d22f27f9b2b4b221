"""What a training step holds in memory, from the configuration alone.

A step is a list of stages: the forward pass walks down it and keeps what each stage saves, the backward pass walks up,
frees that, and leaves gradients. The peak is the most that is held at any stage, its working set included.

Three implementations of the operations differ in what they save:

    triton   rooflight.kernels on a GPU: fused, statistics and inputs only
    cpu      rooflight.kernels on a plain CPU: torch's scaled_dot_product_attention, the loss in chunks, and norms
             and rotations with their backward passes written out (kernels/plain.py)
    eager    rooflight.kernels.reference: the scores are kept as exponentials, probabilities and their quotient
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.cost import FP8, INDEX, STATISTIC, itemsize
from ..kernels.linear_cross_entropy import chunk_rows, keeps_gradients, padded
from .config import ModelConfig, hidden_matrices
from .fp8 import SCALES, Matrix, block_matrices
from .parts import parts

FP32 = 4
OPS = ("triton", "cpu", "eager")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Parameters, gradients and moments (AdamW's two, Muon's one) are fp32, by fsdp sharded.

    Where the optimizer keeps copies of the blocks' matrices, gradients may have their dtype: `in_low_precision`.

    casts        the weights in the products' dtype: the optimizer's copies, autocast's, or of sharded ones what is
                 gathered at a time
    activations  what the forward pass keeps for the backward pass; in fp8 the codes of the weights are among it
    peak         the most that is held at once
    peak_at      when: in the backward pass of the component of that name, or in the "AdamW" or "Muon" step
    """

    parameters: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    peak: int
    peak_at: str


@dataclass(frozen=True)
class Stage:
    """Part of a block, or what comes before and after the blocks.

    saved      bytes kept from its forward for its backward pass
    working    bytes that its backward pass needs beyond those, at its worst moment
    weights    parameters of its matrices: their gradients stay, and in a block their casts are held till then
    forward    bytes that its forward pass needs at its worst moment, where the step may peak there
    in_fp8     of the weights those in fp8, of which no cast is held: their codes are among what is saved
    """

    name: str
    saved: int
    working: int
    weights: int = 0
    forward: int = 0
    in_fp8: int = 0


def in_low_precision(dtype: str, ops: str, optimizer: str, gpus: int, parallel: str) -> tuple[bool, bool]:
    """(copies, gradients): what there is in the products' dtype of the blocks' matrices.

    Copies where the optimizer has the matrices whole, and writes both. Gradients too for AdamW on a single GPU: DDP's
    buckets have the parameters' dtype.
    """
    copies = ops == "triton" and itemsize(dtype) < FP32 and (gpus == 1 or parallel == "ddp")
    return copies, copies and optimizer == "adamw" and gpus == 1


def stages(
    c: ModelConfig, n_token: int, context_length: int, dtype: str, ops: str, gradient: int = FP32, cast: int = 0,
    fp8: bool = False,
) -> tuple[Stage, list[Stage], list[Stage]]:  # fmt: skip
    """(embedding, one block's stages, what follows the last block); each tensor stands with the stage that reads it.

    gradient, cast: bytes of those of a block's parameter; a cast is held until the gradient is there.
    """
    s, N, d, F, V = itemsize(dtype), n_token, c.d_model, c.d_ff, c.vocab_size
    eager, cpu = ops == "eager", ops == "cpu"
    recomputed = cpu and (c.window is not None or c.softcap > 0)  # the score matrices, which eager keeps
    low = s < FP32
    stream = N * d * s
    q, kv = N * c.n_head * c.head_dim * s, N * c.n_kv_head * c.head_dim * s
    rows = N * c.n_head  # of the score matrices
    pairs = rows * context_length

    def norm(rows: int, size: int) -> int:
        # eager: the input in fp32 (in fp32 that is the input itself) and the normalised rows before the weight
        return rows * (size * (2 * FP32 if eager else s) + STATISTIC)

    matrices = block_matrices(c)
    taken = {name: fp8 and matrix.fp8 for name, matrix in matrices.items()}

    def kept(name: str, of_input: int) -> int:
        """What a product keeps of its input; in fp8 the codes of both operands."""
        n, k = matrices[name]
        return (N * k + n * k) * FP8 + SCALES if taken[name] else of_input

    def weights_in_fp8(*names: str) -> int:
        return sum(matrices[name].weights for name in names if taken[name])

    def product_working(name: str) -> int:
        """What a product's backward takes beyond dy and what it kept, its results included."""
        if not taken[name]:
            return 0  # stands where it matters
        return _fp8_working(N, matrices[name], s, gradient, ops)

    if ops == "eager":
        # q, k and v repeated for every head; exp(s - max) and p in fp32, p / sum in the dtype; out, made contiguous
        attention = (
            (4 - taken["o"]) * q
            + pairs * ((3 if c.softcap > 0 else 2) * FP32 + s)
            + rows * (STATISTIC + 1)
            + context_length**2
        )
        # the quotient rule: the quotient's gradient g and -g, p / sum and p / sum², their product; p / sum was freed
        attention_working = 5 * pairs * FP32 - pairs * s + q * taken["o"]  # dout, in the place of the copy
    else:  # q, k, v, out, log-sum-exp (with its rounding's factor in fp32)
        attention = 2 * q + 2 * kv + rows * STATISTIC * (1 if low or (cpu and not recomputed) else 2)
        attention_working = 2 * q + 2 * kv + 2 * rows * STATISTIC  # dout, dq, dk, dv, delta and lse again
        if recomputed:  # p, dp and their product, tanh's slope, dout row by row, dq twice; q, k, v, dout are fp32 there
            attention_working += pairs * FP32 * (4 if c.softcap > 0 else 3) + (2 * (2 * q + 2 * kv) if low else q) + q
    swiglu = c.ffn != "gelu"  # geglu as well: gate and up
    widened = swiglu and ops != "triton"  # the oracle's gate, on a plain CPU too
    activation = 3 * FP32 if widened else (2 if swiglu else 1) * s
    # the activation's backward: the gradients of its output and its inputs, when what the second product kept is freed
    # and its matrix has its gradient
    gradients = 3 * FP32 if widened else (3 if swiglu else 2) * s
    second = d * F * (gradient - (0 if taken["down"] else cast)) - kept("down", N * F * s)
    up_working = N * matrices["up"].rows * s + product_working("up") - N * F * activation + second
    ffn_working = stream + max(N * F * gradients + second, product_working("down"), up_working * taken["up"])
    ffn_forward = 0
    if taken["down"]:  # its input, the norm's result, attention's, and their sum where no norm keeps it
        alive = N * F * s + (3 if low and eager else 2) * stream
        ffn_forward = alive + _fp8_forward(N, matrices["down"], s, ops) - kept("down", 0) * (ops != "triton")
    rope = context_length * c.head_dim * FP32 if eager else 0  # the tables' rows
    qk_norm = norm(rows, c.head_dim) + norm(N * c.n_kv_head, c.head_dim) if c.qk_norm else 0

    # in low precision eager's copies, a plain CPU's too, stand beside the stream's own gradient; in fp32 they take its
    # place
    norm_working = 4 * N * d * FP32 + stream * (1 + cpu) * low if eager or cpu else 3 * stream
    block = [
        Stage("norms", norm(N, d) + qk_norm, norm_working),
        Stage(
            "QKV", kept("qkv", stream), stream + q + 2 * kv + max(stream, product_working("qkv")),
            matrices["qkv"].weights, in_fp8=weights_in_fp8("qkv"),
        ),
        Stage("RoPE", rope, 2 * (q + 2 * kv)),
        Stage("scores and weighted sum", attention, attention_working),
        Stage(
            "output projection", kept("o", 0), stream + max(q, product_working("o")),
            matrices["o"].weights, in_fp8=weights_in_fp8("o"),
        ),
        Stage("norms", norm(N, d), norm_working),
        Stage(
            "FFN", kept("up", stream) + N * F * activation + kept("down", N * F * s), ffn_working,
            matrices["up"].weights + matrices["down"].weights, ffn_forward, weights_in_fp8("up", "down"),
        ),
    ]  # fmt: skip
    embedding = Stage("embedding", 0, V * d * FP32 if c.tie_embeddings else 0)
    if ops == "eager":
        # the logits in fp32; then the gathered logit's gradient, z - lse, its exponential, and their product
        loss = Stage("loss", N * (V * FP32 + STATISTIC + INDEX + 1) + V * d * s * low, 4 * N * V * FP32, V * d)
    else:
        loss = _fused_loss(N, d, V, dtype, ops)
    # a loss that makes its gradients in the forward pass keeps them, and not the rows that it was given
    logits = Stage("logits", 0 if loss.forward else stream, 0)
    # nothing but the norm reads the last sum
    return embedding, block, [Stage("norms", norm(N, d), norm_working - stream * cpu), logits, loss]


def _fp8_working(N: int, matrix: Matrix, s: int, gradient: int, ops: str) -> int:
    """What the backward of a product in fp8, of N rows, takes beyond dy and what it kept; its results included."""
    n, k = matrix
    dx, dw = N * k * s, n * k * gradient
    if ops == "triton":  # dy's codes, as it is and transposed
        return 2 * N * n * FP8 + dx + dw
    low, operands = s < FP32, N * n + N * k + n * k
    casting = N * n * (2 * FP32 if low else FP32 + FP8)  # dy and the quotient in fp32, or the quotient and its codes
    # all operands and the result in fp32, or the result before and after its scales
    return max(casting, N * n * FP8 + dx + FP32 * max(operands, 2 * n * k), N * n * FP8 + 2 * FP32 * N * k)


def _fp8_forward(N: int, matrix: Matrix, s: int, ops: str) -> int:
    """What a product in fp8 holds in its forward pass beside its operands; on a GPU beside what it keeps too."""
    n, k = matrix
    if ops == "triton":
        return (N * k + n * k) * FP8 + N * n * s
    codes = (N * k + n * k) * FP8
    casting = N * k * (2 * FP32 if s < FP32 else FP32 + FP8)
    return max(casting, codes + FP32 * (N * k + n * k + N * n), codes + 2 * FP32 * N * n)


def _fused_loss(N: int, d: int, V: int, dtype: str, ops: str) -> Stage:
    """linear_cross_entropy of N rows and an fp32 weight; its worst moment is the first or a later chunk's."""
    s, low = itemsize(dtype), itemsize(dtype) < FP32
    keep = keeps_gradients("mean", getattr(torch, dtype))
    rows = chunk_rows(N, V, "cuda" if ops == "triton" else "cpu")
    dx, dweight = N * d * s, V * d * FP32
    high = (padded(V) if low else V) * d  # the weight as the products take it
    cast = high * s * low
    # a chunk's share of dweight: a GPU adds it within the product; of one chunk in fp32 it is dweight
    share = 0 if low and ops == "triton" else high * s
    total = high * FP32
    logits = rows * padded(V) * s
    # on a plain CPU the logits in fp32, whose place their exponentials and the gradient take
    wide = rows * V * FP32 * low * (ops == "cpu")
    one = rows >= N
    first = max(wide, share + total * low)
    # torch casts what it adds to fp32 first
    later = 0 if one else total + max(wide, share + total * low * (ops == "cpu"))
    working = dx + cast + logits + max(first, later)
    if not keep:
        return Stage("loss", N * STATISTIC, working, V * d)
    # the gradients are made in the forward pass, from rows that are there till it ends (dx is as large), and kept with
    # the loss; the backward scales them into others
    return Stage("loss", dx + dweight + STATISTIC, dx + dweight, V * d, forward=dx + working)


def saved_activations(
    config: ModelConfig, n_token: int, context_length: int, dtype: str, ops: str, fp8: bool = False
) -> dict[str, int]:
    """Bytes kept for the backward pass, per component, all layers, without checkpointing."""
    embedding, block, last = stages(config, n_token, context_length, dtype, ops, fp8=fp8)
    saved: dict[str, int] = {}
    for times, stage in [(1, embedding), *((config.n_layer, s) for s in block), *((1, s) for s in last)]:
        saved[stage.name] = saved.get(stage.name, 0) + times * stage.saved
    return saved


def memory(
    config: ModelConfig,
    parameters: int,
    *,
    batch_size: int,
    context_length: int,
    dtype: str,
    checkpointing: bool = False,
    gpus: int = 1,
    parallel: str = "fsdp",
    reshard: bool = True,
    ops: str = "triton",
    optimizer: str = "adamw",
    fp8: bool = False,
) -> Memory:
    """The memory of one training step of a model with that many parameters; see Memory."""
    shards = gpus if parallel == "fsdp" else 1
    n_token, size = batch_size * context_length, itemsize(dtype)
    copies, low = in_low_precision(dtype, ops, optimizer, gpus, parallel)
    gradient = size if low else FP32  # bytes, of a parameter of the blocks' matrices
    cast = size if size < FP32 and shards == 1 and not copies else 0  # of one weight, until its gradient is there
    embedding, block, last = stages(config, n_token, context_length, dtype, ops, gradient, cast, fp8)
    stream = n_token * config.d_model * size
    state = -(-parameters * FP32 // shards)
    block_saved, block_weights = sum(stage.saved for stage in block), sum(stage.weights for stage in block)
    activations = sum(stage.saved for stage in last) + config.n_layer * (stream if checkpointing else block_saved)
    # a norm that keeps the block's own input keeps no second copy of it
    shared = stream if ops != "eager" or size == FP32 else 0
    hidden = config.n_layer * block_weights  # the loss casts its weight by itself
    # in fp8 codes take the place of casts, among the activations
    block_casts = cast * sum(stage.weights - stage.in_fp8 for stage in block)
    kept, casts = size * hidden if copies else 0, config.n_layer * block_casts
    gradients = state - hidden * (FP32 - gradient)
    gathered = 0
    if shards > 1:  # this block's weights and the next's; without resharding those of all
        gathered = size * ((2 if reshard else config.n_layer) * block_weights + last[-1].weights)

    peak, peak_at = 0, ""
    matrices = hidden_matrices(config) if optimizer == "muon" else {}
    turned = sum(short * long * n for (short, long), n in matrices.items()) * FP32  # bytes of what Muon updates
    moments = 2 * state - turned // shards
    held = state + moments + activations + gathered + kept
    # with checkpointing the casts of the blocks go when the forward pass ends
    held += 0 if checkpointing else casts

    def backward(stage: Stage, cast: int, gradient: int) -> None:
        nonlocal held
        see(held + stage.working, stage.name)
        held += stage.weights * gradient // shards - (stage.weights - stage.in_fp8) * cast - stage.saved

    def see(bytes_held: int, name: str) -> None:
        nonlocal peak, peak_at
        if bytes_held > peak:
            peak, peak_at = bytes_held, name

    # in the forward pass, and in it alone when checkpointing, the casts of the blocks are there too
    see(held - last[-1].saved + last[-1].forward + (casts if checkpointing else 0), last[-1].name)
    if not checkpointing:  # the last block's end, beside both terms of the stream that the block was given
        given = (1 if shared else 2) * stream
        see(held - sum(stage.saved for stage in last) + given + block[-1].forward, block[-1].name)
    for stage in reversed(last):
        backward(stage, 0, FP32)
    for _ in range(config.n_layer):
        if checkpointing:  # the block runs once more
            held += block_saved - shared + block_casts
            see(held + stream + block[-1].forward, block[-1].name)
        for stage in reversed(block):
            backward(stage, cast, gradient)
        if checkpointing:
            held += shared - stream
    see(held + embedding.working, embedding.name)
    update = state + gradients + moments + kept
    see(update, "AdamW")  # in place
    update += turned // shards  # what the matrices are moved by
    if gpus > 1:  # of those that this device orthogonalizes the results, and by fsdp the whole of what goes in
        results = turned // FP32 * size // gpus
        update += results + (turned // gpus if shards > 1 else 0)
        see(update + 2 * results * (gpus // shards), "Muon")  # sent, to itself too, and received
    for (short, long), count in matrices.items():
        # one shape's: stacked, normalised, and in the products
        n = -(-count // gpus)
        stack, square = n * short * long, n * short * short
        normalised = stack * (FP32 + size * (size < FP32))
        products = 2 * (stack + square)
        if size == FP32 and long >= 2 * short:  # on the Gram matrix: five squares, or one beside operand and result
            products = max(stack + 5 * square, 2 * stack + square)
        see(update + stack * FP32 + max(normalised, products * size), "Muon")
    return Memory(state, gradients, moments, kept or casts or gathered, activations, peak, peak_at)


def largest_batch(
    config: ModelConfig,
    memory_bytes: int,
    *,
    context_length: int | None = None,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    gpus: int = 1,
    parallel: str = "fsdp",
    reshard: bool = True,
    ops: str = "triton",
    optimizer: str = "adamw",
    fp8: bool = False,
) -> int:
    """The most sequences per device whose training step fits in `memory_bytes`; 0 when one does not."""
    parameters = sum(part.parameters for part in parts(config, 1, 1, dtype, checkpointing=False, gpus=1))
    T = config.context_length if context_length is None else context_length

    def fits(batch_size: int) -> bool:
        held = memory(
            config, parameters, batch_size=batch_size, context_length=T, dtype=dtype, checkpointing=checkpointing,
            gpus=gpus, parallel=parallel, reshard=reshard, ops=ops, optimizer=optimizer, fp8=fp8,
        )  # fmt: skip
        return held.peak <= memory_bytes

    return largest(fits)


def largest(holds: Callable[[int], bool]) -> int:
    """The largest n of which holds(n) is true, where it is true up to some n and false from there on; 0 if of none."""
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
