"""The optimizers of a transformer, its parameter groups, and clipping by the global norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...model.layers import JoinedLinear, Linear, WeightCopy
from ...model.typed import typed
from ..distributed import ALONE, World, gathered, is_sharded, local
from .adamw import AdamW
from .muon import Muon

OPTIMIZERS = ("muon", "adamw")


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
