"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), for the hidden matrices only:

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m  (Nesterov)
    w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) O(u)

where O(u), the orthogonal factor U V^T of u = U S V^T, is approximated by five Newton-Schulz steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..model.layers import WeightCopy
from .optimizer import GroupedOptimizer, check, check_parameter

# Jordan et al. 2024: the slope at zero as steep as it goes, for singular values that land in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor, *, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of each matrix U S V^T, approximately: its singular values are driven into about [0.7, 1.2].

    matrices: (..., rows, columns), worked on as one batch.  dtype: that of the arithmetic (default: the input's;
    bfloat16 suffices, Jordan et al. 2024).  Each step is X <- a X + b (X X^T) X + c (X X^T)^2 X, after X <- X / |X|_F.
    Returns matrices' shape in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products are cheaper on the short side
        x = x.mT
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype or x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(GroupedOptimizer):
    """Momentum orthogonalized by Newton-Schulz, for matrices (Jordan et al. 2024).

    params: 2-D tensors or groups of them.  dtype: that of the Newton-Schulz products.
    The update is scaled by sqrt(max(1, rows / columns)), as in Jordan's code, so lr means the same for every shape.
    Matrices of one shape, or its transpose, are orthogonalized as one batch: a transformer needs three or four batches
    a step, however deep it is. The matrices that a parameter joins ("rows") are orthogonalized each by itself.
    Raises ValueError on a value out of range, or a parameter that is not a float32 or float64 matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        copies: Mapping[int, WeightCopy] | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, copies)
        self.dtype = dtype
        for group in self.param_groups:
            check("lr", group["lr"], 0.0)
            check("momentum", group["momentum"], 0.0, 1.0)
            check("weight_decay", group["weight_decay"], 0.0)
            for parameter in group["params"]:
                check_parameter(parameter)
                if parameter.ndim != 2:
                    raise ValueError(f"Muon's parameters must be matrices, got shape {tuple(parameter.shape)}")

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        means = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, means, momentum) if group["nesterov"] else means

        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        known = {id(p): rows for p, rows in zip(group["params"], group["rows"], strict=True)}
        batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, update in zip(params, updates, strict=True):
            rows = known[id(p)] or p.shape[:1]
            for pair in zip(p.split(rows), update.split(rows), strict=True):
                batches[tuple(sorted(pair[0].shape))].append(pair)
        for batch in batches.values():
            self._turn(batch, lr)
        copied = [p for p in params if id(p) in self.copies]
        if copied:
            torch._foreach_copy_([self.copies[id(p)].tensor for p in copied], copied)
            self._written(copied)

    def _turn(self, batch: list[tuple[Tensor, Tensor]], lr: float | Tensor) -> None:
        """Move matrices of one shape, or its transpose, along their orthogonalized updates."""
        wide = torch.stack([u.mT if u.shape[0] > u.shape[1] else u for _, u in batch])
        for (p, _), update in zip(batch, orthogonalize(wide, dtype=self.dtype), strict=True):
            rows, columns = p.shape
            update, scale = update.mT if rows > columns else update, math.sqrt(max(1.0, rows / columns))
            if isinstance(lr, Tensor):
                p.addcmul_(update, lr, value=-scale)
            else:
                p.add_(update, alpha=-lr * scale)
