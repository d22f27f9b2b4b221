"""Training steps in processes that talk through gloo: by DDP, and by FSDP2 with and without resharding."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.bench.measure.memory import peak_bytes
from rooflight.model import ModelConfig, Transformer
from rooflight.training.distributed import World, data_parallel, full, fully_sharded, local
from rooflight.training.optim import build_optimizers


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    parallel: str = "fsdp"
    reshard: bool = True
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    optimizer: str = "adamw"


class Sent(TorchDispatchMode):
    """Bytes that a ring sends in the collectives that FSDP2 asks for: of the whole, all but this process's share. And
    those that Muon sends to other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            sizes = [x.nbytes for x in args[:2]]  # the whole and a share, in either order
            self.bytes["gathered" if "gather" in name else "scattered"] += max(sizes) - min(sizes)
        if name == "c10d::alltoall_base_":
            _, sent, _, _, split = args[:5]
            self.bytes["exchanged"] += sent.itemsize * (sum(split) - split[dist.get_rank()])
        return func(*args, **(kwargs or {}))


def written() -> int | None:
    """Bytes that this process has written so far, to sockets too; None where the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def batch(rank: int, config: ModelConfig, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(config.vocab_size, (batch_size, config.context_length), generator=generator)


def wrap(model: Transformer, case: Case) -> nn.Module:
    """As training wraps it."""
    if case.parallel == "ddp":
        return data_parallel(model)
    dtype = None if case.dtype == torch.float32 else case.dtype
    return fully_sharded(model, model.layers, dtype=dtype, reshard=case.reshard)


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of what this process holds."""
    return sum(x.nbytes for x in local(list(tensors)))


def step(rank: int, folder: Path, case: Case, batch_size: int) -> None:
    """One step; writes what this process held and sent to folder/<case>-<rank>.json, rank 0 the gradients too."""
    torch.manual_seed(0)
    model = Transformer(case.config, checkpointing=case.checkpointing)
    names = [name for name, _ in model.named_parameters()]
    dist.barrier()
    before = written()
    wrapped = wrap(model, case)
    dist.barrier()
    built = written()
    world = World(rank, dist.get_world_size())
    optimizers = build_optimizers(model, optimizer=case.optimizer, muon_dtype=case.dtype, world=world)
    tokens = batch(rank, case.config, batch_size)
    with Sent() as sent:
        loss = wrapped(tokens, tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    dist.barrier()
    after = written()
    params = dict(zip(names, wrapped.parameters(), strict=True))
    report = {
        "held": {
            "parameters": nbytes(params.values()),
            "gradients": nbytes(p.grad for p in params.values()),
            "optimizer": nbytes(
                moment
                for optimizer in optimizers
                for state in optimizer.state.values()
                for moment in (state[key] for key in ("exp_avg", "exp_avg_sq", "momentum") if key in state)
            ),
        },
        "update": peak_bytes(optimizers[-1].step, torch.device("cpu")),
        "sent": sent.bytes,
        "written": None if before is None else {"start": built - before, "step": after - built},
        "loss": loss.item(),
    }
    gradients = {name: full(p.grad) for name, p in params.items()}
    if rank == 0:
        torch.save(gradients, folder / f"{case.name}.pt")
    Path(folder, f"{case.name}-{rank}.json").write_text(json.dumps(report))


def steps(rank: int, world: int, folder: str, cases: list[Case], batch_size: int) -> None:
    """Process `rank` of `world`: every case in turn."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's names change, its own calls too
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        for case in cases:
            step(rank, Path(folder), case, batch_size)
        dist.barrier()  # a process that leaves early breaks the others' connections
    finally:
        dist.destroy_process_group()
