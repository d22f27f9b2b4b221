"""How well a model predicts a text: its negative log-likelihood, from which perplexity and bits per byte follow."""

from __future__ import annotations

import torch
from torch import Tensor

from .transformer import Transformer
from .typed import typed

BATCH_TOKENS = 8192  # predictions made in one forward pass, at least one window


@typed
@torch.no_grad()
def negative_log_likelihood(
    model: Transformer, tokens: Tensor, *, context_length: int | None = None, stride: int | None = None
) -> float:
    """The sum over all tokens but the first of -ln p(token | those before it in its window), in nats.

    tokens: (n,), int64, n >= 2, any length, on the model's device.
    context_length: tokens in a window; the model's own by default.  stride: tokens that each window moves on by, at
    most a window; all by default. Of a window only the targets that the one before had not are counted, so a smaller
    stride gives every prediction context_length - stride tokens of context, for as much more work.
    Raises ValueError naming the argument.
    """
    length = model.config.context_length if context_length is None else context_length
    stride = length if stride is None else stride
    if tokens.dim() != 1 or tokens.shape[0] < 2:
        raise ValueError(f"tokens: expected (n,) with two tokens at least, got {tuple(tokens.shape)}")
    if not 1 <= length <= model.config.context_length:
        raise ValueError(f"context_length: expected 1 .. {model.config.context_length}, got {length}")
    if not 1 <= stride <= length:
        raise ValueError(f"stride: expected 1 .. {length}, got {stride}")
    n = tokens.shape[0] - 1  # predictions
    begins = [0] if n <= length else [*range(0, n - length, stride), n - length]
    length = min(length, n)
    total, done = 0.0, 0
    together = max(1, BATCH_TOKENS // length)
    for first in range(0, len(begins), together):
        batch = begins[first : first + together]
        targets = torch.stack([tokens[begin + 1 : begin + 1 + length] for begin in batch])
        for row, begin in enumerate(batch):
            targets[row, : max(0, done - begin)] = -100  # counted already
            done = begin + length
        counted = int((targets != -100).sum())
        inputs = torch.stack([tokens[begin : begin + length] for begin in batch])
        total += model(inputs, targets).item() * counted
    return total
