"""Optimizers: AdamW, Muon, the parameter groups of a transformer, and clipping by the global norm.

AdamW (Loshchilov & Hutter 2019, algorithm 2), with g the gradient, t the step, and decay decoupled from the gradient:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Muon (muon.py) takes the hidden matrices; embeddings, the output head and the norms stay with AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..kernels.adamw import AdamWTables, adamw_update
from ..model.layers import JoinedLinear, Linear, WeightCopy
from ..model.typed import typed
from .distributed import ALONE, World, gathered, is_sharded, local
from .muon import Muon, orthogonalize
from .optimizer import GroupedOptimizer, check, check_parameter

__all__ = [
    "AdamW",
    "Muon",
    "build_optimizers",
    "clip_grad_norm",
    "low_precision",
    "orthogonalize",
    "split_parameters",
]

OPTIMIZERS = ("muon", "adamw")


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


@typed
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
    copy_dtype: torch.dtype | None = None,
    low_gradients: bool = False,
    triton: bool | None = None,
    world: World = ALONE,
) -> list[Optimizer]:
    """The optimizers of a transformer: [AdamW] for everything, or [AdamW, Muon] with Muon for the hidden matrices.

    copy_dtype: keep a copy of the blocks' matrices in autocast's dtype, for their products (model.layers.Linear).
    low_gradients: and let AdamW's of them keep gradients in that dtype, as the products give them. Not where several
    backward passes add up to a step. Only Triton's AdamW takes such gradients.  triton: as in AdamW.  world: as in
    Muon.
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

    copies = {} if copy_dtype is None else _keep_copies(model, copy_dtype)
    if low_gradients and optimizer == "adamw":
        for p in hidden:
            if id(p) in copies and hasattr(p, "grad_dtype"):  # from torch 2.10 on; else gradients are fp32
                p.grad = None  # of the dtype that it had till now
                p.grad_dtype = copy_dtype
    groups = [group(decayed, weight_decay), group(vectors, 0.0)]
    optimizers: list[Optimizer] = [
        AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, copies=copies, triton=triton)
    ]
    if optimizer == "muon" and hidden:
        muon = [group(hidden, weight_decay)]
        optimizers.append(Muon(muon, lr=muon_lr, momentum=muon_momentum, dtype=muon_dtype, copies=copies, world=world))
    return optimizers


def low_precision(device: torch.device, dtype: torch.dtype, *, accumulates: bool = False) -> dict[str, Any]:
    """build_optimizers' options for training by autocast to dtype on that device: copies on a GPU, and low gradients
    unless gradients accumulate."""
    if device.type != "cuda" or dtype == torch.float32:
        return {}
    return {"copy_dtype": dtype, "low_gradients": not accumulates}


def _keep_copies(model: nn.Module, dtype: torch.dtype) -> dict[int, WeightCopy]:
    """Give the linear layers whose products autocast casts for a copy of their weight; by the weight's id."""
    layers = [m for name, m in model.named_modules() if isinstance(m, Linear) and name != "lm_head"]
    copies = {}
    for layer in layers:
        layer.copy = copies[id(layer.weight)] = WeightCopy(layer.weight, dtype)
    return copies


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


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, optimizers: Iterable[Optimizer] = ()) -> Tensor:
    """Scale the gradients in place so that their joint 2-norm is at most max_norm; returns the norm before, fp32
    scalar.

    Every gradient is multiplied by min(1, max_norm / (norm + 1e-6)), without waiting for the device. A norm that is not
    finite comes back as it is, with the gradients spoilt: the caller decides.
    Of sharded parameters (FSDP2's) each process has a part of the gradients and learns the norm of all.
    optimizers: of these, Triton's AdamW multiplies its gradients itself in its next step; they stay as they are.
    Raises ValueError unless max_norm > 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    itself = [o for o in optimizers if isinstance(o, AdamW) and o.runs_triton]
    theirs = {id(p) for o in itself for group in o.param_groups for p in group["params"]}
    whole: list[Tensor] = []
    shards: list[Tensor] = []
    scaled: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is None:
            continue
        (grad,) = local([p.grad])
        if is_sharded(p):
            shards.append(grad)
            group = p.device_mesh.get_group()  # type: ignore[attr-defined]
        else:
            whole.append(grad)
        if id(p) not in theirs:
            scaled[grad.dtype].append(grad)
    if not whole and not shards:
        return torch.zeros(())
    norms = _norms(whole)
    if shards:
        norms += gathered(torch.linalg.vector_norm(torch.stack(_norms(shards))), group)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for o in itself:
        o.factor = factor
    for grads in scaled.values():
        torch._foreach_mul_(grads, factor)
    return norm


def _norms(grads: list[Tensor]) -> list[Tensor]:
    """Each one's 2-norm, in no certain order; sums of squares of two bytes are added up in fp32."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad)
    return [
        n
        for dtype, some in by_dtype.items()
        for n in torch._foreach_norm(some, 2, torch.float32 if dtype.itemsize < 4 else dtype)
    ]
