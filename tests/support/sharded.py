"""One training step of a model sharded by FSDP2, on CPU processes that talk through gloo."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.model import ModelConfig, Transformer
from rooflight.training.optim import AdamW


class Sent(TorchDispatchMode):
    """Bytes that this process sends in collectives: of what is gathered or reduced, all but its own share."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            sizes = [x.nbytes for x in args[:2]]  # the whole and a share, in either order
            self.bytes[name] += max(sizes) - min(sizes)
        return func(*args, **(kwargs or {}))


def batch(rank: int, config: ModelConfig, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(config.vocab_size, (batch_size, config.context_length), generator=generator)


def step(rank: int, world: int, folder: str, config: ModelConfig, batch_size: int, dtype: torch.dtype) -> None:
    """Process `rank` of `world`: writes what it held and sent to folder/<rank>.json, rank 0 the gradients too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        torch.manual_seed(0)
        model = Transformer(config)
        for block in model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        tokens = batch(rank, config, batch_size)
        with Sent() as sent:
            loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
        held = {
            "parameters": sum(p.to_local().nbytes for p in model.parameters()),
            "gradients": sum(p.grad.to_local().nbytes for p in model.parameters()),
            "optimizer": sum(
                state[key].to_local().nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
            ),
        }
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(gradients, Path(folder) / "gradients.pt")
        Path(folder, f"{rank}.json").write_text(json.dumps({"held": held, "sent": sent.bytes, "loss": loss.item()}))
        dist.barrier()  # a process that leaves early breaks the others' connections
    finally:
        dist.destroy_process_group()
