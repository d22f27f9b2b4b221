"""Work on several processes of this machine, which talk through gloo, and what it gave in each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["pytest", "torch._dynamo", "rooflight.training.checkpoint.shards", "rooflight.training.loop"]


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(*args) returns in each of `size` processes, which have torchrun's environment.

    work: of a module that a new process can import, as tests.support's.  folder: for what they return.
    Raises what torch says of the first that fails.
    """
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    forks(_one, size, environment, str(folder), work, args)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def forks(work: Callable[..., Any], size: int, *args: Any, join: bool = True) -> Any:
    """work(rank, *args) in `size` processes, by torch.multiprocessing, of which it returns the context.

    They are forks of one process that has imported what takes 3 s; it keeps the environment in which it was begun.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # the processes take the fast path of a plain CPU
        patch.setenv("OMP_NUM_THREADS", "1")
        return mp.start_processes(work, args, nprocs=size, join=join, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _one(rank: int, environment: dict[str, str], folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(work(*args)))


@contextmanager
def group(folder: Path) -> Iterator[None]:
    """torch's default group of these processes, by a file and not by MASTER_PORT, which another group may want."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    yield
    dist.barrier()  # a process that leaves early breaks the others' connections
    dist.destroy_process_group()
