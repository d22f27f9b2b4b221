"""CS336's second assignment on our pieces: the adapters that its public tests call, and a check of the same behaviour.

The assignment's DDP, FSDP and sharded optimizer, each held to the same model in one process with all of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rooflight.training.distributed import (
    average_gradients,
    data_parallel,
    full_parameters,
    fully_sharded,
    sharded_optimizer,
)


# --- the adapters ---
def get_ddp(module: nn.Module) -> nn.Module:
    return data_parallel(module)


def ddp_on_after_backward(ddp_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """backward() has waited for the last bucket."""


class FSDP(nn.Module):
    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        units = [m for m in module.modules() if type(m).__name__ in ("Linear", "Embedding")]
        sharded = {id(p) for m in units for p in m.parameters()}
        self.replicated = [p for p in module.parameters() if id(p) not in sharded]
        self.module = fully_sharded(module, units, dtype=compute_dtype, replicated=self.replicated)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def get_fsdp(module: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    return FSDP(module, compute_dtype)


def fsdp_on_after_backward(fsdp_model: FSDP, optimizer: torch.optim.Optimizer) -> None:
    average_gradients(fsdp_model.replicated)


def fsdp_gather_full_params(fsdp_model: FSDP) -> dict[str, Tensor]:
    return full_parameters(fsdp_model.module)


def get_sharded_optimizer(
    params: Iterable[Any], optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> torch.optim.Optimizer:
    return sharded_optimizer(params, optimizer_cls, **kwargs)


# --- the check ---
class Toy(nn.Module):
    """A norm, a bias and a parameter that are not trained, a buffer; where tied, weights that two layers share."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        if tied:
            self.second.weight = self.first.weight
        self.head = nn.Linear(16, 50)
        self.head.bias.requires_grad = False
        self.fixed = nn.Parameter(torch.tensor([2.0, 2.0]), requires_grad=False)
        self.register_buffer("offset", torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.norm(x.float()).to(x.dtype)
        return self.head(self.second(self.first(x).relu())) + self.offset.to(x.dtype)


def _train(model: nn.Module, optimizer: Any, after: Any, rows: slice) -> None:
    data = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(50, (12, 9), generator=data)[rows]
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        after(model, optimizer)
        optimizer.step()


def _same_everywhere(tensors: Iterable[Tensor]) -> bool:
    tensors = [t.detach().clone() for t in tensors]
    for t in tensors:
        dist.broadcast(was := t.clone(), 0)
        if not torch.equal(was, t):
            return False
    return True


def _far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in b)


def assignment() -> dict[str, Any]:
    """What the assignment's tests ask for, by what each is held to."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * 12 // world, (rank + 1) * 12 // world)
    sgd: Any = torch.optim.SGD
    told: dict[str, Any] = {}

    torch.manual_seed(rank)  # every process draws another model: rank 0's must be all processes'
    toy = Toy(tied=True)
    own = copy.deepcopy(dict(toy.named_parameters()))
    ddp = get_ddp(toy)
    told["ddp took rank 0's"] = {n for n, p in ddp.module.named_parameters() if not torch.equal(p, own[n])}
    told["ddp begins the same"] = _same_everywhere([*toy.parameters(), *toy.buffers()])
    alone = copy.deepcopy(ddp.module)
    _train(ddp, sgd(ddp.parameters(), lr=0.1), ddp_on_after_backward, rows)
    _train(alone, sgd(alone.parameters(), lr=0.1), lambda *_: None, slice(None))
    told["ddp"] = _far(dict(ddp.module.named_parameters()), dict(alone.named_parameters()))
    told["ddp ends the same"] = _same_everywhere(ddp.parameters())

    torch.manual_seed(7)
    alone = Toy(tied=True)
    sharded = copy.deepcopy(alone)
    options = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999)}
    optimizer = get_sharded_optimizer(sharded.parameters(), torch.optim.AdamW, **options)
    _train(sharded, optimizer, lambda *_: None, slice(None))
    _train(alone, torch.optim.AdamW(alone.parameters(), **options), lambda *_: None, slice(None))
    told["sharded optimizer"] = _far(dict(sharded.named_parameters()), dict(alone.named_parameters()))
    told["states here"] = sum(p.numel() for p in optimizer.optim.state)

    start = Toy(tied=False)
    for dtype in (None, torch.float16):
        alone, model = copy.deepcopy(start), get_fsdp(copy.deepcopy(start), dtype)
        _train(model, sgd(model.parameters(), lr=0.1), fsdp_on_after_backward, rows)
        _train(alone, sgd(alone.parameters(), lr=0.1), lambda *_: None, slice(None))
        found = fsdp_gather_full_params(model)
        told[f"fsdp {dtype}"] = _far(found, dict(alone.named_parameters()))
        trained = [p for p in model.module.parameters() if p.requires_grad]
        told[f"fsdp {dtype} gradients"] = all((p.grad.shape, p.grad.dtype) == (p.shape, p.dtype) for p in trained)
        told[f"fsdp {dtype} replicas"] = _same_everywhere(p.grad for p in model.replicated if p.requires_grad)
        told[f"fsdp {dtype} held"] = sum(p.to_local().numel() for p in trained if hasattr(p, "to_local"))
    return told
