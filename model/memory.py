"""What a training step holds in memory, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cost import STATISTIC, itemsize
from .config import ModelConfig

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Parameters, gradients and AdamW's two moments are fp32, sharded over the devices.

    casts        the low-precision copies of the weights that autocast makes for the products
    activations  what the forward pass keeps for the backward pass
    transient    the working set of the moment when most is held
    """

    parameters: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    transient: int
    peak: int


def saved_activations(config: ModelConfig, n_token: int, dtype: str) -> dict[str, int]:
    """Bytes that the fused kernels keep for the backward pass, per component, all layers, without checkpointing.

    Each tensor stands with the component that reads it again: a norm its input and rstd, a product its input,
    attention q, k, v, out and the log-sum-exp, the FFN's activation gate and up.
    """
    c, size = config, itemsize(dtype)
    stream = n_token * c.d_model * size
    heads, kv_heads = n_token * c.n_head * c.head_dim * size, n_token * c.n_kv_head * c.head_dim * size
    rstd = n_token * STATISTIC
    qk_norm = heads + kv_heads + (c.n_head + c.n_kv_head) * rstd if c.qk_norm else 0
    inner = n_token * c.d_ff * size
    return {
        "embedding": n_token * 8,
        "norms": (2 * c.n_layer + 1) * (stream + rstd) + c.n_layer * qk_norm,
        "QKV": c.n_layer * stream,
        # out is also what the output projection keeps: one tensor
        "scores and weighted sum": c.n_layer * (2 * heads + 2 * kv_heads + c.n_head * rstd),
        "FFN": c.n_layer * (stream + (3 if c.ffn == "swiglu" else 2) * inner),
        "logits": stream,
        "loss": n_token * (8 + STATISTIC),
    }


def memory(
    config: ModelConfig,
    parameters: int,
    *,
    batch_size: int,
    context_length: int,
    dtype: str,
    checkpointing: bool,
    gpus: int,
) -> Memory:
    """The memory of one training step; see Memory."""
    c, n_token, size = config, batch_size * context_length, itemsize(dtype)
    saved = saved_activations(c, n_token, dtype)
    total = sum(saved.values())
    stream = n_token * c.d_model * size
    outside = saved["embedding"] + stream + n_token * STATISTIC + saved["logits"] + saved["loss"]
    block = (total - outside) // c.n_layer
    activations = outside + c.n_layer * stream if checkpointing else total
    transient = block if checkpointing else 0
    states = -(-parameters // gpus) * FP32
    casts = (parameters - (2 * c.n_layer + 1) * c.d_model) * size if size < FP32 else 0
    start = 3 * states + casts + activations + transient
    end = 4 * states + casts
    return Memory(states, states, 2 * states, casts, activations, transient, max(start, end))
