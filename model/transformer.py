"""A decoder-only transformer: RMSNorm before each sublayer, RoPE, grouped-query attention, no biases.

    B batch    T tokens    S keys (T, or more with a cache)    V vocab_size    L n_layer
    d d_model  H n_head    K n_kv_head    D head_dim           F d_ff

    tokens (B, T) ── embedding ──► x (B, T, d)
    L times:  x = x + o_proj(attention(rope(q, k), v))     q (B, H, T, D), k and v (B, K, S, D): one product of norm(x)
              x = x + down_proj(silu(gate) * up)           gate and up (B, T, F): one product of norm(x)
    norm(x) ── lm_head ──► logits (B, T, V), or with targets ── linear_cross_entropy ──► mean loss, fp32

The sums are not made by kernels of their own: the norm that reads x is given its two terms.

The operations come from a namespace, `ops`: rooflight.kernels, or rooflight.kernels.reference for the oracle model.

Mixed precision is torch.autocast around forward: parameters stay fp32, the residual stream takes autocast's dtype,
norm statistics, attention's softmax and the loss are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import kernels
from ..kernels.linear_cross_entropy import pad_rows
from .config import ModelConfig
from .layers import Embedding, JoinedLinear, Linear, RMSNorm, Sublayer
from .typed import check_ids, typed

OPS = ("rms_norm", "rope", "rope_qkv", "flash_attention", "flash_attention_varlen", "swiglu", "linear_cross_entropy")


class Cache(Protocol):
    """Keys and values of the tokens already seen (generate.KVCache)."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class Positions:
    """Where the tokens of one forward pass stand: RoPE's tables and rows, document bounds, and the cache."""

    def __init__(
        self, cos: Tensor, sin: Tensor, rows: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None
    ) -> None:
        self.cos, self.sin = cos, sin  # (context_length, D / 2), fp32
        self.rows = rows  # (T,), or None: 0 .. T-1
        self.cu_seqlens = cu_seqlens  # (documents + 1,), int32, or None
        self.cache = cache


class Attention(Sublayer):
    def __init__(self, config: ModelConfig, layer: int, ops: SimpleNamespace) -> None:
        super().__init__()
        d, H, K, D = config.d_model, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.heads, self.ops = layer, (H, K), ops
        self.context_length = config.context_length
        self.mask = {"causal": True, "window": config.window, "softcap": config.softcap}
        self.qkv_proj = JoinedLinear(d, q_proj=H * D, k_proj=K * D, v_proj=K * D)
        self.o_proj = Linear(H * D, d)
        self.q_norm = RMSNorm(D, config.norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps, ops) if config.qk_norm else None

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        q, k, v = self._rotated(self.qkv_proj(x), at)  # (B, heads, T, D)
        if at.cu_seqlens is not None:
            q, k, v = (y[0].transpose(0, 1) for y in (q, k, v))  # (T, heads, D)
            longest = min(x.shape[1], self.context_length)
            bounds = (at.cu_seqlens, at.cu_seqlens, longest, longest)
            return self.o_proj(self.ops.flash_attention_varlen(q, k, v, *bounds, **self.mask).flatten(1)[None])
        if at.cache is not None:
            k, v = at.cache.update(self.layer, k, v)
        y = self.ops.flash_attention(q, k, v, **self.mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _rotated(self, qkv: Tensor, at: Positions) -> tuple[Tensor, Tensor, Tensor]:
        H, K = self.heads
        if self.q_norm is None or self.k_norm is None:
            return self.ops.rope_qkv(qkv, at.cos, at.sin, H, K, positions=at.rows)
        q, k, v = qkv.unflatten(-1, (H + 2 * K, -1)).split((H, K, K), 2)
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        return *self.ops.rope(q, k, at.cos, at.sin, positions=at.rows), v


class FeedForward(Sublayer):
    gate_up_proj: JoinedLinear | None

    def __init__(self, config: ModelConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        d, F_ = config.d_model, config.d_ff
        self.ops = ops
        if config.ffn == "swiglu":
            self.gate_up_proj = JoinedLinear(d, gate_proj=F_, up_proj=F_)
        else:
            self.gate_up_proj, self.up_proj = None, Linear(d, F_)
        self.down_proj = Linear(F_, d)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(self.ops.swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, ops: SimpleNamespace) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, ops)
        self.attention = Attention(config, layer, ops)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps, ops)
        self.ffn = FeedForward(config, ops)

    def forward(self, x: Tensor, h: Tensor | None, at: Positions) -> tuple[Tensor, Tensor]:
        """The stream before this block's FFN, and what the FFN adds to it: the next norm takes their sum.

        x, h: the same of the block before; h is None where x is the whole stream.
        """
        y, x = self.attention_norm.of_sum(x, h)
        y, x = self.ffn_norm.of_sum(x, self.attention(y, at))
        return x, self.ffn(y)


def _whole(block: Block, x: Tensor, at: Positions) -> Tensor:
    """The block from stream to stream: what checkpointing keeps of it is then one tensor, not two."""
    x, h = block(x, None, at)
    return x + h


class Transformer(nn.Module):
    """The model of `config`, in fp32 on the default device; `with torch.device(...)` chooses another.

    ops: a namespace with the functions in OPS: rooflight.kernels, or rooflight.kernels.reference for the oracle model.
    checkpointing: keep only each block's input, and run the block once more in the backward pass (Chen et al. 2016).
    """

    cos: Tensor  # (context_length, D / 2), fp32
    sin: Tensor

    @typed
    def __init__(self, config: ModelConfig, ops: ModuleType = kernels, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        # functions, unlike a module, survive copy.deepcopy and pickle
        self.ops = SimpleNamespace(**{name: getattr(ops, name) for name in OPS})
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Block(config, layer, self.ops) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps, self.ops)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self._set_rope_tables(self.embedding.weight.device)

    def _set_rope_tables(self, device: torch.device) -> None:
        c = self.config
        position = torch.arange(c.context_length, dtype=torch.float64, device=device)
        feature = torch.arange(0, c.head_dim, 2, dtype=torch.float64, device=device)
        angle = torch.outer(position, c.rope_theta ** (-feature / c.head_dim))  # (context_length, D / 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

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
    ) -> Tensor:
        """Logits (B, T, V), or with targets the mean cross-entropy, an fp32 scalar in nats.

        tokens: (B, T), int64, T at most context_length.  targets: (B, T), int64; -100 is left out of the mean.
        cu_seqlens: (documents + 1,), int32, from 0 to B T: bounds of the documents packed in the flattened tokens, none
        longer than context_length. A token attends within its document, and positions start anew in each.
        cache: the tokens follow those already in it.
        Raises ValueError on a shape mismatch or on more tokens than context_length.
        """
        x = self.hidden_states(tokens, cu_seqlens=cu_seqlens, cache=cache)
        if targets is None:
            return self.logits(x)
        check_ids("targets", targets)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: expected the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}")
        # the weight stays fp32: the op casts it, keeps no copy, and sums its gradient in fp32
        return self.ops.linear_cross_entropy(x.flatten(0, 1), self.output_weight, targets.flatten())

    def logits(self, x: Tensor) -> Tensor:
        """(..., d) hidden states to (..., V), in x's dtype; rows lie further apart than V where the weight is cast."""
        weight = self.output_weight
        if weight.dtype == x.dtype:
            # A copy only to align an odd V would move it twice more, where a step of generation reads it once.
            return F.linear(x, weight)
        # The cast copies anyway: with rows of zeros up to an aligned V the product runs at full speed. H200,
        # 2026-11-27, XL's V = 50257: 4096 rows 0.97 ms, unaligned 6.9; one row 0.16, unaligned 0.18.
        return F.linear(x, pad_rows(weight, x.dtype))[..., : weight.shape[0]]

    def hidden_states(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What lm_head is applied to, (B, T, d), after the last norm; arguments as in forward."""
        check_ids("tokens", tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected shape (batch, tokens), got {tuple(tokens.shape)}")
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cache: expected None with cu_seqlens, whose documents are whole")
        shape, limit = tokens.shape, self.config.context_length
        if cu_seqlens is not None:
            tokens = tokens.reshape(1, -1)
            rows: Tensor | None = self._rows_in_documents(tokens.shape[1], cu_seqlens)
        else:
            start = 0 if cache is None else cache.length
            end = start + tokens.shape[1]
            if end > limit:
                raise ValueError(f"tokens: expected at most context_length = {limit} positions, got {end}")
            rows = torch.arange(start, end, device=tokens.device) if start else None
        at = Positions(self.cos, self.sin, rows, cu_seqlens, cache)

        x = self.embedding(tokens)
        device = x.device.type
        # torch 2.11 cannot compile is_autocast_available: of the devices used here meta alone has no autocast
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        h = None
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(_whole, block, x, at, use_reentrant=False, preserve_rng_state=False)
            else:
                x, h = block(x, h, at)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm.of_sum(x, h)[0].view(*shape, -1)

    def _rows_in_documents(self, n_token: int, cu_seqlens: Tensor) -> Tensor:
        """Each token's position in its own document, (n_token,), without waiting for the device."""
        check_ids("cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens: expected (documents + 1,), int32, got {cu_seqlens.dtype}{cu_seqlens.shape}")
        limit = self.config.context_length
        index = torch.arange(n_token, device=cu_seqlens.device, dtype=torch.int32)
        document = torch.searchsorted(cu_seqlens, index, right=True) - 1
        rows = index - cu_seqlens[document]
        # a longer document would read past the rotation tables; a GPU is asked without a wait, and fails later
        fits, message = (rows < limit).all(), f"cu_seqlens: expected documents of at most {limit} tokens"
        if torch.compiler.is_compiling() or rows.device.type != "cpu":
            torch._assert_async(fits, message)
        elif not fits:
            raise ValueError(message)
        return rows
