"""The transformer's blocks: attention, the feed-forward network, and the norms around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import JoinedLinear, Linear, RMSNorm, Sublayer


class Cache(Protocol):
    """Keys and values of the tokens already seen (generate.KVCache)."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


Tables = tuple[Tensor, Tensor]  # RoPE's cos and sin, (context_length, rope_dim / 2), fp32


class Positions:
    """Where the tokens of one forward pass stand: RoPE's tables and rows, document bounds, and the cache."""

    def __init__(
        self, tables: Tables, local: Tables, rows: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None
    ) -> None:
        self.tables, self.local = tables, local  # of the layers without a window, and of those with one
        self.rows = rows  # (T,), or None: 0 .. T-1
        self.cu_seqlens = cu_seqlens  # (documents + 1,), int32, or None
        self.cache = cache


class Attention(Sublayer):
    def __init__(self, config: ModelConfig, layer: int, ops: SimpleNamespace) -> None:
        super().__init__()
        d, H, K, D = config.d_model, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.heads, self.head_dim, self.ops = layer, (H, K), D, ops
        self.context_length = config.context_length
        self.window = config.layer_window(layer)
        self.mask = {"causal": True, "window": self.window, "softcap": config.softcap, "scale": config.attention_scale}
        self.rotates, self.interleaved = layer not in config.nope_layers, config.rope_interleaved
        self.qkv_proj = JoinedLinear(d, config.qkv_bias, q_proj=H * D, k_proj=K * D, v_proj=K * D)
        self.o_proj = Linear(H * D, d, config.output_bias)
        whole = config.qk_norm == "all"  # of all heads at once
        self.q_norm = RMSNorm(H * D if whole else D, config, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(K * D if whole else D, config, ops) if config.qk_norm else None

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
        cos, sin = at.tables if self.window is None else at.local
        if self.q_norm is None and self.rotates and not self.interleaved:
            return self.ops.rope_qkv(qkv, cos, sin, H, K, positions=at.rows)
        q, k, v = qkv.split([heads * self.head_dim for heads in (H, K, K)], -1)
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        if self.rotates:
            q, k = self.ops.rope(q, k, cos, sin, interleaved=self.interleaved, positions=at.rows)
        return q, k, v

    def _normed(self, norm: RMSNorm | None, y: Tensor) -> Tensor:
        """(B, T, heads D), normalised over each head or over all of them, as the norm's weight is long."""
        return y if norm is None else norm(y.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2)


class FeedForward(Sublayer):
    gate_up_proj: JoinedLinear | None

    def __init__(self, config: ModelConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        d, F_, bias = config.d_model, config.d_ff, config.ffn_bias
        self.ops, self.kind = ops, config.ffn
        if config.ffn == "gelu":
            self.gate_up_proj, self.up_proj = None, Linear(d, F_, bias)
        else:
            self.gate_up_proj = JoinedLinear(d, bias, gate_proj=F_, up_proj=F_)
        self.down_proj = Linear(F_, d, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            return self.down_proj(self.ops.gelu(self.up_proj(x)))
        if self.kind == "swiglu":
            return self.down_proj(self.ops.swiglu(self.gate_up_proj(x)))
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class Block(nn.Module):
    """Attention and the FFN, each with a norm before it, after it or both, and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int, ops: SimpleNamespace) -> None:
        super().__init__()

        def norm(*placements: str) -> RMSNorm | None:
            return RMSNorm(config.d_model, config, ops) if config.norm_placement in placements else None

        self.residual_scale = config.residual_scale
        self.attention_norm = norm("pre", "both")
        self.attention = Attention(config, layer, ops)
        self.attention_post_norm = norm("post", "both")
        self.ffn_norm = norm("pre", "both")
        self.ffn = FeedForward(config, ops)
        self.ffn_post_norm = norm("post", "both")

    def forward(self, x: Tensor, h: Tensor | None, at: Positions) -> tuple[Tensor, Tensor]:
        """The stream before this block's FFN, and what the FFN adds to it: the next norm takes their sum.

        x, h: the same of the block before; h is None where x is the whole stream.
        """
        y, x = _read(self.attention_norm, x, h)
        h = self._added(self.attention(y, at), self.attention_post_norm)
        y, x = _read(self.ffn_norm, x, h)
        return x, self._added(self.ffn(y), self.ffn_post_norm)

    def _added(self, y: Tensor, norm: RMSNorm | None) -> Tensor:
        y = y if norm is None else norm(y)
        return y if self.residual_scale == 1 else y * self.residual_scale


def _read(norm: RMSNorm | None, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a sublayer is applied to, and the stream x + h."""
    if norm is not None:
        return norm.of_sum(x, h)
    x = x if h is None else x + h
    return x, x
