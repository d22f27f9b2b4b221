"""Work on several processes of this machine, which talk through gloo, and what it gave in each."""

from __future__ import annotations

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


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(*args) returns in each of `size` processes, which have torchrun's environment.

    work: of a module that a new process can import, as tests.support's.  folder: for what they return.
    Raises what torch says of the first that fails.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        patch.delenv("TRITON_INTERPRET", raising=False)  # the processes take the fast path of a plain CPU
        mp.spawn(_one, (size, str(folder), work, args), nprocs=size)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _one(rank: int, size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
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
