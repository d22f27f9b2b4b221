"""Optimizers: AdamW, Muon, the parameter groups of a transformer, and clipping by the global norm.

AdamW (Loshchilov & Hutter 2019, algorithm 2), with g the gradient, t the step, and decay decoupled from the gradient:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), for the hidden matrices only:

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m  (Nesterov)
    w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) O(u)

where O(u), the orthogonal factor U V^T of u = U S V^T, is approximated by five Newton-Schulz steps. Embeddings, the
output head and the norms stay with AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..model.layers import JoinedLinear

# Jordan et al. 2024: the slope at zero as steep as it goes, for singular values that land in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

OPTIMIZERS = ("muon", "adamw")


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high."""
    if not low <= value < high:
        expected = f"at least {low}" if high == math.inf else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_parameter(parameter: Tensor) -> None:
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameters must be float32 or float64, got {parameter.dtype}: keep them in float32 and use torch.autocast"
        )


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


class _GroupedOptimizer(Optimizer):
    """What AdamW and Muon share: a step is one `_update` of each group's parameters that have gradients.

    A group's "rows" say for each parameter of how many rows the matrices are that it joins, () where it is one. In a
    state dict they stand apart, as they do in the model's.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "rows": None})
        for group in self.param_groups:
            group["rows"] = [tuple(r) for r in group["rows"] or [()] * len(group["params"])]
            for p, rows in zip(group["params"], group["rows"], strict=True):
                if rows and sum(rows) != p.shape[0]:
                    raise ValueError(f"rows must add up to those of {tuple(p.shape)}, got {rows}")

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        state: dict[int, Any] = {}
        groups, count = [], 0
        for group in packed["param_groups"]:
            first = count
            for index, rows in zip(group["params"], group["rows"], strict=True):
                parts = range(len(rows) or 1)
                if index in packed["state"]:
                    state |= {count + i: _part(packed["state"][index], rows, i) for i in parts}
                count += len(parts)
            groups.append({**group, "params": list(range(first, count))})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict gave; raises ValueError on groups of other sizes."""
        sizes = [[len(rows) or 1 for rows in group["rows"]] for group in self.param_groups]
        given = [len(group["params"]) for group in state_dict["param_groups"]]
        if given != [sum(group) for group in sizes]:
            raise ValueError(f"state_dict must hold groups of {[sum(group) for group in sizes]} matrices, got {given}")
        state: dict[int, Any] = {}
        groups, count = [], 0
        for ours, theirs, parts in zip(self.param_groups, state_dict["param_groups"], sizes, strict=True):
            indices = iter(theirs["params"])
            for i, n in enumerate(parts, count):
                saved = [state_dict["state"].get(next(indices)) for _ in range(n)]
                if saved[0] is not None:
                    state[i] = _whole(saved)
            groups.append({**theirs, "params": list(range(count, count + len(parts))), "rows": ours["rows"]})
            count += len(parts)
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads = _with_gradients(group)
            if params:
                self._update(group, params, grads)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError


def _part(state: dict[str, Any], rows: tuple[int, ...], i: int) -> dict[str, Any]:
    """A parameter's state, of the i-th matrix alone."""
    if not rows:
        return state
    # the count of steps once each: who loads them apart must not count three times
    return {key: x.split(rows)[i] if x.dim() else x.clone() for key, x in state.items()}


def _whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of the parameter that joins these matrices."""
    first, *others = parts
    return {key: torch.cat([x, *(o[key] for o in others)]) if others and x.dim() else x for key, x in first.items()}


class AdamW(_GroupedOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    params: tensors or parameter groups, float32 or float64 (mixed precision is torch.autocast's work).
    A group is updated by one fused kernel, torch's own: 28 bytes moved a parameter, no temporaries, no synchronisation.
    Raises ValueError on a value out of range or a parameter of another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        # "fused" tells torch, when it loads a state, to put the step beside its parameter
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check("lr", group["lr"], 0.0)
            _check("betas[0]", group["betas"][0], 0.0, 1.0)
            _check("betas[1]", group["betas"][1], 0.0, 1.0)
            _check("eps", group["eps"], 0.0)
            _check("weight_decay", group["weight_decay"], 0.0)
            for parameter in group["params"]:
                _check_parameter(parameter)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        means, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params, grads, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


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


class Muon(_GroupedOptimizer):
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
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        self.dtype = dtype
        for group in self.param_groups:
            _check("lr", group["lr"], 0.0)
            _check("momentum", group["momentum"], 0.0, 1.0)
            _check("weight_decay", group["weight_decay"], 0.0)
            for parameter in group["params"]:
                _check_parameter(parameter)
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

    def _turn(self, batch: list[tuple[Tensor, Tensor]], lr: float) -> None:
        """Move matrices of one shape, or its transpose, along their orthogonalized updates."""
        wide = torch.stack([u.mT if u.shape[0] > u.shape[1] else u for _, u in batch])
        for (p, _), update in zip(batch, orthogonalize(wide, dtype=self.dtype), strict=True):
            rows, columns = p.shape
            p.add_(update.mT if rows > columns else update, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


def build_optimizers(
    model: nn.Module,
    *,
    optimizer: str = "muon",
    lr: float = 3e-3,
    muon_lr: float = 0.02,
    muon_momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> list[Optimizer]:
    """The optimizers of a transformer: [AdamW] for everything, or [AdamW, Muon] with Muon for the hidden matrices.

    Every parameter belongs to one group of one optimizer. Vectors (norms, biases) take no weight decay.
    Raises ValueError on an unknown optimizer or a value out of range.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    hidden, tables, vectors = split_parameters(model)
    decayed = tables if optimizer == "muon" else [*tables, *hidden]
    joined = {id(m.weight): m.rows for m in model.modules() if isinstance(m, JoinedLinear)}

    def group(params: list[nn.Parameter], decay: float) -> dict[str, Any]:
        return {"params": params, "weight_decay": decay, "rows": [joined.get(id(p), ()) for p in params]}

    groups = [group(decayed, weight_decay), group(vectors, 0.0)]
    optimizers: list[Optimizer] = [AdamW([g for g in groups if g["params"]], lr=lr, betas=betas)]
    if optimizer == "muon" and hidden:
        optimizers.append(Muon([group(hidden, weight_decay)], lr=muon_lr, momentum=muon_momentum, dtype=muon_dtype))
    return optimizers


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The model's trainable parameters as (hidden matrices, tables, vectors), each parameter once, in the model's
    order.

    Tables are the weights of nn.Embedding and of a module called lm_head, whose rows are tokens; hidden matrices are
    all other 2-D parameters; vectors is whatever remains (norms, biases).
    """
    tables = {id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name == "lm_head"}
    split: tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]] = ([], [], [])
    for parameter in model.parameters():  # shared parameters come once
        if parameter.requires_grad:
            split[1 if id(parameter) in tables else 0 if parameter.ndim == 2 else 2].append(parameter)
    return split


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients in place so that their joint 2-norm is at most max_norm; returns the norm before, fp32
    scalar.

    Every gradient is multiplied by min(1, max_norm / (norm + 1e-6)), without waiting for the device. A norm that is not
    finite comes back as it is, with the gradients spoilt: the caller decides.
    Raises ValueError unless max_norm > 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
