"""ALiBi: attention with linear biases, in place of position embeddings (Press et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import check_integer

__all__ = ["alibi_slopes"]


def alibi_slopes(n_head: int, *, device: torch.device | str | None = None) -> Tensor:
    """The standard slopes (n_head,), fp32, that `flash_attention` takes: 2^(-8 i / n_head) for i = 1 .. n_head.

    Where n_head is no power of two: those of the power m below it, then the first n_head - m of every other slope of
    2 m heads, as the authors' code has it (Press et al. 2022, section 3). Raises ValueError on n_head < 1.

    >>> alibi_slopes(4).tolist(), alibi_slopes(3).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    n_head = check_integer("n_head", n_head)
    if n_head < 1:
        raise ValueError(f"n_head: expected at least 1, got {n_head}")
    m = 1 << (n_head.bit_length() - 1)
    exponents = [8 * i / m for i in range(1, m + 1)] + [4 * i / m for i in range(1, 2 * (n_head - m), 2)]
    return torch.tensor([2.0**-x for x in exponents], dtype=torch.float32, device=device)
