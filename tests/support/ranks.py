"""Work on several processes of this machine, which talk through gloo, and what it gave in each."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, folder: Path, work: Callable[..., Any], *args: Any, group: bool = True) -> list[Any]:
    """What work(*args) returns in each of `world` processes, which have torchrun's environment.

    group: with torch's default group.  Raises what torch says of the first that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # the processes take the fast path of a plain CPU
        mp.spawn(_one, (world, str(folder), group, work, args), nprocs=world)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _one(rank: int, world: int, folder: str, group: bool, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if group:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(work(*args)))
    if group:
        dist.barrier()  # a process that leaves early breaks the others' connections
        dist.destroy_process_group()
