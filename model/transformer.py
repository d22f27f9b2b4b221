"""A decoder-only transformer: RMSNorm before each sublayer, RoPE, grouped-query attention.

    B batch    T tokens    S keys (T, or more with a cache)    V vocab_size    L n_layer
    d d_model  H n_head    K n_kv_head    D head_dim           F d_ff

    tokens (B, T) ── embedding ──► x (B, T, d)
    L times:  x = x + o_proj(attention(rope(q, k), v))     q (B, H, T, D), k and v (B, K, S, D): one product of norm(x)
              x = x + down_proj(silu(gate) * up)           gate and up (B, T, F): one product of norm(x)
    norm(x) ── lm_head ──► logits (B, T, V), or with targets ── linear_cross_entropy ──► mean loss, fp32

The sums are not made by kernels of their own: the norm that reads x is given its two terms. That is the plain model;
what a configuration may change of it (norms after the sublayers, biases, scales, layers of two kinds) is ModelConfig's
to say, and blocks.py's to do.

The operations come from a namespace, `ops`: rooflight.kernels, or rooflight.kernels.reference for the oracle model.

Mixed precision is torch.autocast around forward: parameters stay fp32, the residual stream takes autocast's dtype,
norm statistics, attention's softmax and the loss are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import kernels
from ..kernels.dispatch import autocast_dtype
from ..kernels.linear_cross_entropy import pad_rows
from ..kernels.rope_tables import RopeScaling, rope_tables
from .blocks import Block, Cache, Positions, Tables
from .config import ModelConfig
from .layers import Embedding, Linear, RMSNorm
from .typed import check_ids, typed

OPS = (
    "rms_norm",
    "rope",
    "rope_qkv",
    "flash_attention",
    "flash_attention_varlen",
    "gelu",
    "swiglu",
    "linear_cross_entropy",
)


def _whole(block: Block, x: Tensor, at: Positions) -> Tensor:
    """The block from stream to stream: what checkpointing keeps of it is then one tensor, not two."""
    x, h = block(x, None, at)
    return x + h


class Transformer(nn.Module):
    """The model of `config`, in fp32 on the default device; `with torch.device(...)` chooses another.

    ops: a namespace with the functions in OPS: rooflight.kernels, or rooflight.kernels.reference for the oracle model.
    checkpointing: keep only each block's input, and run the block once more in the backward pass (Chen et al. 2016).
    """

    cos: Tensor  # (context_length, rope_dim / 2), fp32
    sin: Tensor

    @typed
    def __init__(
        self, config: ModelConfig, ops: ModuleType | SimpleNamespace = kernels, *, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        # functions, unlike a module, survive copy.deepcopy and pickle
        self.ops = SimpleNamespace(**{name: getattr(ops, name) for name in OPS})
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Block(config, layer, self.ops) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config, self.ops)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self._set_rope_tables(self.embedding.weight.device)

    def _set_rope_tables(self, device: torch.device) -> None:
        """cos and sin; beside them, where the model has two kinds of table, those of the layers with a window (local)
        and those of sequences that need no stretching (short)."""
        c = self.config

        def register(kind: str, theta: float, scaling: RopeScaling | None, length: int) -> None:
            tables = rope_tables(
                c.context_length, c.rope_dim, theta=theta, scaling=scaling, length=length, device=device
            )
            for name, table in zip(("cos", "sin"), tables, strict=True):
                self.register_buffer(name + kind, table, persistent=False)

        register("", c.rope_theta, c.rope_scaling, c.context_length)
        if c.rope_local_theta is not None:
            register("_local", c.rope_local_theta, None, c.context_length)
        if c.rope_scaling is not None and c.rope_scaling.kind == "longrope":
            register("_short", c.rope_theta, c.rope_scaling, 1)

    def _rope_tables(self, longest: int | Tensor) -> tuple[Tables, Tables]:
        """The tables of the layers without a window and of those with one; longest: positions up to which to look."""
        tables, scaling = (self.cos, self.sin), self.config.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            short = self.get_buffer("cos_short"), self.get_buffer("sin_short")
            stretched = longest > (scaling.original_context_length or 0)
            if isinstance(stretched, Tensor):  # known to the device alone
                tables = torch.where(stretched, tables[0], short[0]), torch.where(stretched, tables[1], short[1])
            elif not stretched:
                tables = short
        if self.config.rope_local_theta is None:
            return tables, tables
        return tables, (self.get_buffer("cos_local"), self.get_buffer("sin_local"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        """A cast of the model (.bfloat16(), .to_empty()) must neither round nor lose the rotation tables."""
        super()._apply(fn, recurse)
        self._set_rope_tables(self.cos.device)
        return self

    def reset_parameters(self) -> None:
        """Draw every parameter again, as construction does (after to_empty() of a model built on meta)."""
        for module in self.modules():
            if isinstance(module, Linear | Embedding | RMSNorm):
                module.reset_parameters()

    @property
    def output_weight(self) -> Tensor:
        """The matrix that makes logits, (V, d): lm_head's, or the embedding's when tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits (B, T, V), or with targets the mean cross-entropy, an fp32 scalar in nats.

        tokens: (B, T), int64, T at most context_length.  targets: (B, T), int64; -100 is left out of the mean.
        cu_seqlens: (documents + 1,), int32, from 0 to B T: bounds of the documents packed in the flattened tokens, none
        longer than context_length. A token attends within its document, and positions start anew in each.
        cache: the tokens follow those already in it.
        reduction: of the loss: "mean", "none" for each token's own, (B, T), 0 where the target is -100, or "sum": those
        of a step's micro-batches, over kernels.cross_entropy.count_targets of its whole batch, add up to its mean.
        Raises ValueError on a shape mismatch or on more tokens than context_length.
        """
        x = self.hidden_states(tokens, cu_seqlens=cu_seqlens, cache=cache)
        if targets is None:
            return self.logits(x)
        check_ids("targets", targets)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: expected the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}")
        # the weight stays fp32: the op casts it, keeps no copy, and sums its gradient in fp32
        softcap = self.config.logit_softcap
        rows, options = targets.flatten(), {"softcap": softcap, "reduction": reduction}
        loss = self.ops.linear_cross_entropy(x.flatten(0, 1), self.output_weight, rows, **options)
        return loss.view(targets.shape) if reduction == "none" else loss

    def logits(self, x: Tensor) -> Tensor:
        """(..., d) hidden states to (..., V), in x's dtype; rows lie further apart than V where the weight is cast."""
        z, cap = self._uncapped(x), self.config.logit_softcap
        return cap * torch.tanh(z / cap) if cap > 0 else z

    def _uncapped(self, x: Tensor) -> Tensor:
        weight = self.output_weight
        if weight.dtype == x.dtype:
            # A copy only to align an odd V would move it twice more, where a step of generation reads it once.
            return F.linear(x, weight)
        # The cast copies anyway: with rows of zeros up to an aligned V the product runs at full speed. H200,
        # 2026-11-27, XL's V = 50257: 4096 rows 0.97 ms, unaligned 6.9; one row 0.16, unaligned 0.18.
        return F.linear(x, pad_rows(weight, x.dtype))[..., : weight.shape[0]]

    def hidden_states(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What lm_head is applied to, (B, T, d), after the last norm, times logit_scale; arguments as in forward."""
        check_ids("tokens", tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected shape (batch, tokens), got {tuple(tokens.shape)}")
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cache: expected None with cu_seqlens, whose documents are whole")
        shape, limit = tokens.shape, self.config.context_length
        if cu_seqlens is not None:
            tokens = tokens.reshape(1, -1)
            rows: Tensor | None = self._rows_in_documents(tokens.shape[1], cu_seqlens)
            longest: int | Tensor = cu_seqlens.diff().max()
        else:
            start = 0 if cache is None else cache.length
            end = start + tokens.shape[1]
            if end > limit:
                raise ValueError(f"tokens: expected at most context_length = {limit} positions, got {end}")
            rows, longest = torch.arange(start, end, device=tokens.device) if start else None, end
        at = Positions(*self._rope_tables(longest), rows, cu_seqlens, cache)

        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if (dtype := autocast_dtype(x.device.type)) is not None:
            x = x.to(dtype)
        h = None
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                # nothing in a block is random, and a capture cannot read a generator's state
                x = checkpoint(_whole, block, x, at, use_reentrant=False, preserve_rng_state=False)
            else:
                x, h = block(x, h, at)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.norm.of_sum(x, h)[0].view(*shape, self.config.d_model)
        return x if self.config.logit_scale == 1 else x * self.config.logit_scale

    def _rows_in_documents(self, n_token: int, cu_seqlens: Tensor) -> Tensor:
        """Each token's position in its own document, (n_token,), without waiting for the device."""
        check_ids("cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens: expected (documents + 1,), int32, got {cu_seqlens.dtype}{cu_seqlens.shape}")
        limit = self.config.context_length
        index = torch.arange(n_token, device=cu_seqlens.device, dtype=torch.int32)
        document = torch.searchsorted(cu_seqlens, index, right=True) - 1
        rows = torch.where(index < cu_seqlens[-1], index - cu_seqlens[document], 0)  # padding stands nowhere
        # a longer document would read past the rotation tables; a GPU is asked without a wait, and fails later
        fits, message = (rows < limit).all(), f"cu_seqlens: expected documents of at most {limit} tokens"
        if torch.compiler.is_compiling() or rows.device.type != "cpu":
            torch._assert_async(fits, message)
        elif not fits:
            raise ValueError(message)
        return rows


def unwrapped(model: nn.Module) -> Transformer | None:
    """The Transformer inside torch.compile's and DistributedDataParallel's wrappers, if it is one."""
    inner: object = model
    while inner is not None and not isinstance(inner, Transformer):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return inner
