"""What the optimizers share: parameters that join several matrices, copies in a lower precision, checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...model.layers import WeightCopy


def check(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high."""
    if not low <= value < high:
        expected = f"at least {low}" if high == math.inf else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_parameter(parameter: Tensor) -> None:
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameters must be float32 or float64, got {parameter.dtype}: keep them in float32 and use torch.autocast"
        )


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


class GroupedOptimizer(Optimizer):
    """What AdamW and Muon share: a step is one `_update` of each group's parameters that have gradients.

    A group's "rows" say for each parameter of how many rows the matrices are that it joins, () where it is one. In a
    state dict they stand apart, as they do in the model's.
    A group's "lr" may be set to an fp32 scalar on the parameters' device, which a captured graph then follows; a state
    dict has its number, and loading one writes into it.
    copies: of weights in a lower precision, by their weights' id; they are written with the weights.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], copies: Mapping[int, WeightCopy] | None = None
    ) -> None:
        super().__init__(params, {**defaults, "rows": None})
        self.copies = copies or {}
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
            groups.append({**group, "lr": float(group["lr"]), "params": list(range(first, count))})
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
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        for group, rate in zip(self.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):
                group["lr"] = rate.fill_(group["lr"])

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

    def _written(self, params: list[Tensor]) -> None:
        """These weights and their copies hold the same numbers."""
        for p in params:
            if (copy := self.copies.get(id(p))) is not None:
                copy.written(p)


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
