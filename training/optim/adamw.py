"""AdamW (Loshchilov & Hutter 2019, algorithm 2): g the gradient, t the step, decay decoupled from the gradient:

m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ...kernels.adamw import AdamWTables, adamw_update
from ...model.layers import WeightCopy
from ..distributed import is_sharded, local
from .base import GroupedOptimizer, check, check_parameter


class AdamW(GroupedOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    params: tensors or parameter groups, float32 or float64 (mixed precision is torch.autocast's work).
    triton: update by this project's kernel: fp32 parameters on a GPU by default, and only they can. It moves 28 bytes a
    parameter, gradients of two bytes and `copies` included, without temporaries or synchronisation; torch's own fused
    kernel does otherwise.
    Raises ValueError on a value out of range or a parameter of another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        copies: Mapping[int, WeightCopy] | None = None,
        triton: bool | None = None,
    ) -> None:
        # "fused" tells torch, when it loads a state, to put the step beside its parameter
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, defaults, copies)
        self.triton = triton
        self.tables = AdamWTables()
        self.factor: Tensor | None = None  # of the gradients in the next step (clip_grad_norm)
        self._rates: dict[torch.device, tuple[float, Tensor]] = {}
        for group in self.param_groups:
            check("lr", group["lr"], 0.0)
            check("betas[0]", group["betas"][0], 0.0, 1.0)
            check("betas[1]", group["betas"][1], 0.0, 1.0)
            check("eps", group["eps"], 0.0)
            check("weight_decay", group["weight_decay"], 0.0)
            for parameter in group["params"]:
                check_parameter(parameter)

    @property
    def runs_triton(self) -> bool:
        if self.triton is not None:
            return self.triton
        return all(p.is_cuda and p.dtype == torch.float32 for group in self.param_groups for p in group["params"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, or None."""
        loss = super().step(closure)
        self.factor = None
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        means, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        if is_sharded(params[0]):
            # each number by itself, so that every process steps its own
            tensors = [local(some) for some in (params, grads, means, squares)]
            held = [i for i, p in enumerate(tensors[0]) if p.numel()]  # a small one may have no rows here
            params, grads, means, squares, steps = ([some[i] for i in held] for some in (*tensors, steps))
            if not params:
                return
        if self.runs_triton:
            torch._foreach_add_(steps, 1)
            kept = [self.copies.get(id(p)) for p in params]
            copies = [None if copy is None else copy.of(p) for copy, p in zip(kept, params, strict=True)]
            adamw_update(
                params, grads, means, squares, steps, copies, self.tables, lr=self._rate(group["lr"], params[0].device),
                beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], factor=self.factor,
            )  # fmt: skip
            torch.autograd.graph.increment_version([*params, *(c for c in copies if c is not None)])
            self._written(params)
            return
        adamw(
            params, grads, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def _rate(self, lr: float | Tensor, device: torch.device) -> Tensor:
        """The learning rate on the device; in a captured graph a number stays what it was."""
        if isinstance(lr, Tensor):
            return lr
        known = self._rates.get(device)
        if known is None or known[0] != lr:
            self._rates[device] = known = (lr, torch.full((), lr, device=device))
        return known[1]
