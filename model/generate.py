"""Sampling with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.dispatch import autocast_dtype
from .transformer import Transformer
from .typed import typed


class KVCache:
    """Keys and values of every layer, (L, B, K, capacity, D) each, allocated once; `length` tokens are held.

    A layer appends its own with `update`; the transformer advances `length` when all have.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int) -> None:
        c, weight = model.config, model.embedding.weight
        device = weight.device
        dtype = autocast_dtype(device.type) or weight.dtype
        shape = (c.n_layer, batch_size, c.n_kv_head, capacity, c.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.windows, self.length = [c.layer_window(layer) for layer in range(c.n_layer)], 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, D) at `length`; returns the keys and values that the T new queries can see, views."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        # dropping keys from the left keeps the masks right: they are aligned to the last query and the last key
        window = self.windows[layer]
        first = 0 if window is None else max(0, self.length - window)
        return self.keys[layer, :, :, first:end], self.values[layer, :, :, first:end]


def sampling_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The distribution that a next token is drawn from, (..., V), fp32 (fp64 for fp64); logits: (..., V).

    top_k keeps the k greatest, with all that equal the k-th. top_p keeps the smallest set of most probable tokens whose
    probability reaches p, always one at least (Holtzman et al. 2020, §3.1); temperature comes first, then top_k, then
    top_p. Temperature 0, or one too small for the logits' dtype, puts everything on the greatest logit, the first of
    equals. allowed: (V,), bool: the others have probability 0 from the start.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if temperature < torch.finfo(logits.dtype).tiny:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # from the greatest downwards: a small temperature may send the others to -inf, never the greatest to inf
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of the tokens ahead of each
        ordered = ordered.masked_fill(before >= top_p, 0)
        ordered[..., 0] = ordered[..., 0].clamp(min=torch.finfo(ordered.dtype).tiny)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


@typed
def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompts with what the model continues them by.

    tokens: (B, T) or (T,), int64, T >= 1.  Returns (B, T + n) or (T + n,), n = max_new_tokens, or fewer when every row
    has drawn stop_token; a row that has keeps repeating it.  temperature 0 is greedy; `sampling_probabilities` says
    what top_k and top_p do.  allowed: (V,), bool: tokens that may be drawn, for a model whose vocabulary is padded past
    its tokenizer's.  generator: a torch.Generator on the model's device, for repeatable draws.
    Every new token costs one forward pass of one token per row: keys and values are cached. Positions never slide, so
    T + max_new_tokens is at most context_length.
    Raises ValueError naming the argument.
    """
    rows = tokens[None] if tokens.dim() == 1 else tokens
    new = stream(
        model, rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop_token=stop_token,
        allowed=allowed, generator=generator,
    )  # fmt: skip
    rows = torch.cat((rows, *new), dim=1)
    return rows[0] if tokens.dim() == 1 else rows


@typed
def stream(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate`, (B, 1) at a time, as they are drawn; tokens: (B, T).

    Raises ValueError as generate does, when it is called and not when the first token is asked for.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens: expected (batch, tokens) or (tokens,) with a token at least, got {tuple(tokens.shape)}"
        )
    limit, vocab_size = model.config.context_length, model.config.vocab_size
    if max_new_tokens < 0 or tokens.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: expected 0 .. {max(0, limit - tokens.shape[1])} (context_length {limit} less a prompt of "
            f"{tokens.shape[1]}), got {max_new_tokens}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected a whole number >= 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1] or None, got {top_p}")
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"stop_token: expected a token id below {vocab_size} or None, got {stop_token}")
    if allowed is not None:
        if allowed.shape != (vocab_size,) or allowed.dtype != torch.bool or not allowed.any():
            got = f"{allowed.dtype}{tuple(allowed.shape)}"
            raise ValueError(f"allowed: expected bool, shape ({vocab_size},), true for one token at least, got {got}")
        allowed = allowed.to(tokens.device)
    return _stream(model, tokens, max_new_tokens, stop_token, generator, temperature, top_k, top_p, allowed)


def _stream(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    stop_token: int | None,
    generator: torch.Generator | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    allowed: Tensor | None,
) -> Iterator[Tensor]:
    cache = KVCache(model, tokens.shape[0], tokens.shape[1] + max_new_tokens)
    scaling = model.config.rope_scaling
    # where LongRoPE turns to its other frequencies, keys turned by the first ones are of no use any more
    turning = scaling.original_context_length if scaling is not None and scaling.kind == "longrope" else None
    new, drawn = tokens, [tokens]
    stopped = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        with torch.no_grad():  # a generator's caller must not run inside it
            if turning is not None and cache.length == turning:
                cache.length, new = 0, torch.cat(drawn, 1)
            x = model.hidden_states(new, cache=cache)[:, -1]  # (B, d): only the last token's logits are needed
            p = sampling_probabilities(
                model.logits(x), temperature=temperature, top_k=top_k, top_p=top_p, allowed=allowed
            )
            new = torch.multinomial(p, 1, generator=generator)
        if stop_token is not None:
            new = new.masked_fill(stopped, stop_token)
            stopped |= new == stop_token
        drawn.append(new)
        yield new
        if stop_token is not None and stopped.all():
            return
