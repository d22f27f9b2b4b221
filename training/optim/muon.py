"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), for the hidden matrices only:

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m  (Nesterov)
    w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) O(u)

where O(u), the orthogonal factor U V^T of u = U S V^T, is approximated by five Newton-Schulz steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...model.layers import WeightCopy
from ..distributed import ALONE, World, exchange, is_sharded, local, shard_rows
from .base import GroupedOptimizer, check, check_parameter

# Jordan et al. 2024: the slope at zero as steep as it goes, for singular values that land in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor, *, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of each matrix U S V^T, approximately: its singular values are driven into about [0.7, 1.2].

    matrices: (..., rows, columns), worked on as one batch.  dtype: that of the arithmetic (default: the input's;
    bfloat16 suffices, Jordan et al. 2024).  Each step is X <- a X + b (X X^T) X + c (X X^T)^2 X, after X <- X / |X|_F.
    Where one side is at least twice the other and products are exact to fp32 or better, the steps are taken on G = X
    X^T: with P = a I + b G + c G^2 one is X <- P X and G <- P G P, so that the P are multiplied first, and by X once.
    Returns matrices' shape in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products are cheaper on the short side
        x = x.mT
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype or x.dtype)
    if steps and x.shape[-1] >= 2 * x.shape[-2] and _multiplies_exactly(x):
        x = _factor(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def _factor(gram: Tensor, steps: int) -> Tensor:
    """What the steps multiply X by, from X X^T (n, s, s).

    An error in a small eigenvalue of G grows by a^2 a step, 2e4 in all: to 1e-3 from
    fp32's rounding, to more than G itself from bfloat16's.
    """
    a, b, c = NEWTON_SCHULZ
    factor = None
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = p if factor is None else p @ factor
        if step < steps - 1:
            gram = p @ gram @ p
    assert factor is not None
    return factor


def _multiplies_exactly(x: Tensor) -> bool:
    """Whether products have the precision of fp32 or better, TF32 and its kin left out."""
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return x.dtype == torch.float64 or (x.dtype == torch.float32 and backend.matmul.fp32_precision in ("none", "ieee"))


class Muon(GroupedOptimizer):
    """Momentum orthogonalized by Newton-Schulz, for matrices (Jordan et al. 2024).

    params: 2-D tensors or groups of them.  dtype: that of the Newton-Schulz products.
    The update is scaled by sqrt(max(1, rows / columns)), as in Jordan's code, so lr means the same for every shape.
    Matrices of one shape, or its transpose, are orthogonalized as one batch: a transformer needs three or four batches
    a step, however deep it is. The matrices that a parameter joins ("rows") are orthogonalized each by itself.
    world: the processes that share the parameters, whole with the same gradients (DDP) or by rows (FSDP2): each
    orthogonalizes some parameters' matrices for all.
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
        world: World = ALONE,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, copies)
        self.dtype, self.world = dtype, world
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
        means, grads, held = local([self.state[p]["momentum"] for p in params]), local(grads), local(params)
        torch._foreach_lerp_(means, grads, 1 - momentum)
        updates = list(torch._foreach_lerp(grads, means, momentum)) if group["nesterov"] else means

        torch._foreach_mul_(held, 1 - lr * group["weight_decay"])
        known = {id(p): rows for p, rows in zip(group["params"], group["rows"], strict=True)}
        rows = [known[id(p)] or tuple(p.shape[:1]) for p in params]
        if self.world.size > 1:
            self._move_together(params, held, updates, rows, lr)
        else:
            matrices = [part for p, some in zip(held, rows, strict=True) for part in p.split(some)]
            self._orthogonalize(
                [part for u, some in zip(updates, rows, strict=True) for part in u.split(some)],
                lambda i, update: _move(matrices[i], update, matrices[i].shape[0], lr),
            )
        copied = [p for p in params if id(p) in self.copies]
        if copied:
            torch._foreach_copy_([self.copies[id(p)].tensor for p in copied], copied)
            self._written(copied)

    def _orthogonalize(self, updates: list[Tensor], take: Callable[[int, Tensor], object]) -> None:
        """Give `take` each matrix's place in `updates` and its orthogonal factor; those of one shape are one batch."""
        batches: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, u in enumerate(updates):
            batches[tuple(sorted(u.shape))].append(i)
        for batch in batches.values():
            self._turn([(i, updates[i]) for i in batch], take)

    def _turn(self, batch: list[tuple[int, Tensor]], take: Callable[[int, Tensor], object]) -> None:
        # a function, so that nothing of one batch is held while the next is worked on
        wide = torch.stack([u.mT if u.shape[0] > u.shape[1] else u for _, u in batch])
        for (i, u), update in zip(batch, orthogonalize(wide, dtype=self.dtype), strict=True):
            take(i, update.mT if u.shape[0] > u.shape[1] else update)

    def _move_together(
        self, params: list[Tensor], held: list[Tensor], updates: list[Tensor], rows: list[tuple[int, ...]],
        lr: float | Tensor,
    ) -> None:  # fmt: skip
        """Each parameter's matrices orthogonalized by one process, which gets what others hold of them, and sends them
        the result, in self.dtype."""
        size, rank = self.world.size, self.world.rank
        shapes = [tuple(p.shape) for p in params]
        owners = divide(tuple(shapes), size)
        of = [[i for i, owner in enumerate(owners) if owner == r] for r in range(size)]  # whose parameters are whose
        sharded = is_sharded(params[0])
        # (first, count), the rows of each parameter that each process holds
        holds = [[shard_rows(n, size, r) if sharded else (0, n) for n, _ in shapes] for r in range(size)]
        whole = [updates[i] for i in of[rank]]
        if sharded:
            expected = [[(holds[r][i][1], shapes[i][1]) for i in of[rank]] for r in range(size)]
            shares = [[updates[i] for i in some] for some in of]
            whole = [torch.cat(some) for some in zip(*exchange(shares, expected, updates[0]), strict=True)]

        turned = [u.new_empty(u.shape, dtype=self.dtype) for u in whole]
        mine = [rows[i] for i in of[rank]]
        matrices = [part for t, some in zip(turned, mine, strict=True) for part in t.split(some)]
        self._orthogonalize(
            [m for u, some in zip(whole, mine, strict=True) for m in u.split(some)],
            lambda i, update: matrices[i].copy_(update),
        )

        sent = [[t.narrow(0, *holds[r][i]) for t, i in zip(turned, of[rank], strict=True)] for r in range(size)]
        expected = [[(holds[rank][i][1], shapes[i][1]) for i in some] for some in of]
        received = exchange(sent, expected, updates[0].new_empty(0, dtype=self.dtype))
        for i, update in ((i, u) for some, us in zip(of, received, strict=True) for i, u in zip(some, us, strict=True)):
            (first, count), start = holds[rank][i], 0
            for n in rows[i]:  # what is held of each matrix that the parameter joins
                a, b = max(start, first) - first, min(start + n, first + count) - first
                if a < b:
                    _move(held[i][a:b], update[a:b], n, lr)
                start += n


def _move(p: Tensor, update: Tensor, rows: int, lr: float | Tensor) -> None:
    """Move a matrix of `rows` rows, or some of them, along its orthogonalized update."""
    scale = math.sqrt(max(1.0, rows / p.shape[1]))
    if isinstance(lr, Tensor):
        p.addcmul_(update, lr, value=-scale)
    else:
        p.add_(update, alpha=-lr * scale)


@cache
def divide(shapes: tuple[tuple[int, int], ...], size: int) -> list[int]:
    """Which of `size` processes orthogonalizes each matrix: the costliest first, each to the one with the least work.

    >>> divide(((4, 4), (8, 4), (4, 4), (4, 4)), 2)
    [1, 0, 1, 0]
    """
    work = [0] * size
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i]) * min(shapes[i])):
        owners[i] = work.index(min(work))
        work[owners[i]] += math.prod(shapes[i]) * min(shapes[i])
    return owners
