"""The peer of a whole training step: the same transformer as people write it in PyTorch, without our kernels.

torch's own rms_norm, scaled_dot_product_attention, activations and cross-entropy, RoPE in elementwise operations,
parameters named as ours are, so that one model's state loads into the other. The vocabulary is padded to a multiple of
64 where that is asked for, as nanoGPT's users do: an odd one is slow in every product with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import ModelConfig


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(c.d_model, heads * c.head_dim, bias=False) for heads in (c.n_head, c.n_kv_head, c.n_kv_head)
        )
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        q, k = (_rotate(y, cos, sin) for y in (q, k))
        gqa = self.c.n_head != self.c.n_kv_head
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class _FeedForward(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=False) if c.ffn == "swiglu" else None
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        h = F.gelu(up, approximate="tanh") if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(h)


class _Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(c.d_model, c.norm_eps) for _ in range(2))
        self.attention, self.ffn = _Attention(c), _FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x).to(x.dtype), cos, sin)
        return x + self.ffn(self.ffn_norm(x).to(x.dtype))


class PlainTransformer(nn.Module):
    """forward(tokens (B, T), targets (B, T)) -> the mean cross-entropy; config's shapes, the vocabulary as given.

    Raises ValueError on what scaled_dot_product_attention does not do: a window, or softcap.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int | None = None) -> None:
        super().__init__()
        for name, plain in (("window", None), ("softcap", 0.0)):
            if getattr(config, name) != plain:
                raise ValueError(f"config.{name}: expected {plain} for the plain model, got {getattr(config, name)}")
        c = config
        self.config = c
        self.embedding = nn.Embedding(vocab_size or c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(_Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.d_model, vocab_size or c.vocab_size, bias=False)
        feature = torch.arange(0, c.head_dim, 2, dtype=torch.float64)
        angle = torch.outer(
            torch.arange(c.context_length, dtype=torch.float64), c.rope_theta ** (-feature / c.head_dim)
        )
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        T = tokens.shape[1]
        for block in self.layers:
            x = block(x, self.cos[:T], self.sin[:T])  # type: ignore[index]
        x = self.norm(x).to(x.dtype)
        logits = F.linear(x, self.embedding.weight if self.lm_head is None else self.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
