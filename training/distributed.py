"""Several processes that are one: torch's process groups, and its engines behind names of our own.

    torchrun --nproc-per-node 2 train.py

    world = launched()                                    # from torchrun's environment
    with process_group(world, device):
        model = data_parallel(model)                      # each process has the parameters: DDP (Li et al. 2020)
        model = fully_sharded(model, units=model.layers)  # or a part of them: FSDP2 (Zhao et al. 2023)
        optimizer = sharded_optimizer(model.parameters(), AdamW, lr=1e-3)  # a part of DDP's states: ZeRO (Rajbhandari
                                                                           # et al. 2020)

Every process takes its rows of a batch, and gradients are means over all rows.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .meeting import meeting, started_before

# What a process waits for the others: a checkpoint that rank 0 writes, a compiler that another one runs.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among the `size` that share the work; alone by default, where nothing here communicates."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    restarts: int = 0  # of the processes, by torchrun
    launch: str | None = None  # torchrun's id of what it started, the same after restarts

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """The device of this process, where all have been told `name`: of "auto" and "cuda", the local_rank-th GPU.

        Raises ValueError on the name of a single GPU, or where the machine has too few.
        """
        if self.size == 1 or name == "cpu":
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device must be auto, cuda or cpu in a run of {self.size} processes, got {name!r}")
        if not torch.cuda.is_available():
            return "cpu" if name == "auto" else name
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {self.local_rank} of this machine has no GPU, of {torch.cuda.device_count()}: start "
                "no more processes than that (--nproc-per-node)"
            )
        return f"cuda:{self.local_rank}"

    def rows(self, n: int) -> slice:
        """This process's of n rows; the parts differ by at most one row."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def all_rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, each of which has as many, in their order."""
        return torch.cat(gathered(x.contiguous())) if self.size > 1 else x

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over the processes, in place."""
        return self.sum(x).div_(self.size) if self.size > 1 else x

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over the processes, which so agree. No GPU takes part, nor is waited for."""
        if self.size == 1:
            return list(numbers)
        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def wait(self) -> None:
        """Until every process is here."""
        self.largest(0)


ALONE = World()


def launched() -> World:
    """The place that torchrun's environment gives this process; alone where it says nothing.

    Raises ValueError where WORLD_SIZE is no number of processes, or RANK none of them, as another would be waited for.
    """

    def number(name: str, otherwise: int, least: int = 0, below: float = math.inf) -> int:
        value = os.environ.get(name) or str(otherwise)
        if not (value.isdecimal() and least <= int(value) < below):
            bound = "" if below == math.inf else f" and below WORLD_SIZE {below}"
            raise ValueError(f"{name}: expected a whole number of at least {least}{bound}, got {value!r}")
        return int(value)

    size = number("WORLD_SIZE", 1, least=1)
    rank = number("RANK", 0, below=size)
    restarts, launch = number("TORCHELASTIC_RESTART_COUNT", 0), os.environ.get("TORCHELASTIC_RUN_ID")
    return World(rank, size, number("LOCAL_RANK", rank), restarts=restarts, launch=launch)


def restarted(world: World) -> bool:
    """Whether torchrun has started processes of this launch before these; the first process may ask."""
    return world.restarts > 0 or started_before(world.rank, world.size, TIMEOUT)


@contextmanager
def process_group(world: World, device: torch.device, *, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """While entered, torch's default group joins the processes of `world`: NCCL between GPUs, gloo between CPUs.

    A group that there is already is used and left as it is. timeout: of a collective, whose processes that wait for
    one that does not come then fail. Nothing where the process is alone.
    """
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = meeting(world.rank, world.size, timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    except BaseException:
        # NCCL's end waits for what this process has left undone; the end of the process, which comes now, does not
        if ours and device.type != "cuda":
            dist.destroy_process_group()
        raise
    if ours:
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed, as it does where another process has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def tell_launcher(error: Exception) -> None:
    """Leave the error where torchrun looks for it, to name it when all processes have ended."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        ErrorHandler().record_exception(error)


def data_parallel(module: nn.Module, *, bucket_mb: float | None = None) -> nn.parallel.DistributedDataParallel:
    """`module` with rank 0's parameters and buffers, whose gradients a backward pass makes means over the processes.

    They travel in buckets of bucket_mb (None: torch's size), each as soon as it is full, while the backward pass goes
    on; gradients are views of the buckets. Nothing is left to wait for when backward() returns.  Buffers are not
    exchanged again.
    """
    options: dict[str, Any] = {} if bucket_mb is None else {"bucket_cap_mb": bucket_mb}
    device = next(module.parameters()).device
    if device.type == "cuda":
        options["device_ids"] = [device.index]
    wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, **options)
    # not as an argument: torch 2.13 deprecates that, and 2.11 has no other
    wrapped.broadcast_buffers = False
    return wrapped


def fully_sharded(
    module: nn.Module,
    units: Iterable[nn.Module] = (),
    *,
    dtype: torch.dtype | None = None,
    cast_inputs: bool = True,
    reshard: bool = True,
    replicated: Iterable[nn.Parameter] = (),
    device: torch.device | None = None,
) -> nn.Module:
    """`module` itself, of whose parameters each process keeps its rows (DTensor, Shard(0)), as FSDP2 has it.

    units: modules whose parameters are gathered together, each while it computes; the rest of the module's are one
    unit more. In the backward pass gradients are reduced, in fp32, and scattered: means over the processes.
    dtype: parameters are gathered and compute in it; what an optimizer sees keeps its own.  cast_inputs: so are
    floating inputs of the units cast.  reshard: let go of a unit's parameters after its forward pass, and gather them
    again in the backward pass.  replicated: parameters that stay whole; `average_gradients` is their reduction.
    device: where the parameters will be, of a module on meta; else the GPU, where there is one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # torch's own choice is the GPU, where there is one, whatever the module is on
    kind = (device or next(module.parameters()).device).type
    mesh = None if kind == "meta" else init_device_mesh(kind, (dist.get_world_size(),))

    policy = MixedPrecisionPolicy(cast_forward_inputs=cast_inputs)
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=cast_inputs)
    whole = set(replicated)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)
    # what the root holds the backward pass needs at once
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    return module


def sharded_optimizer(params: Iterable[Any], optimizer_class: type[Optimizer], **options: Any) -> Optimizer:
    """An optimizer_class(params, **options) whose states the processes divide between them.

    Each steps the parameters whose states it has, and sends them to the others. params: the same in every process, as
    are their gradients.
    """
    with warnings.catch_warnings():  # torch's own, of torch.jit in the files beside it
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class, **options)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Make the gradients of whole parameters means over the processes, in one collective for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], like: Tensor
) -> list[list[Tensor]]:
    """Send the tensors sent[r] to each process r, in one collective; returns those that each sent here.

    shapes: theirs, by process.  like: a tensor of the dtype, on the device, that they all have.
    """
    counts = [[math.prod(shape) for shape in some] for some in shapes]
    nothing = like.new_empty(0)
    flat = torch.cat([nothing, *(x.flatten() for some in sent for x in some)])
    received = like.new_empty(sum(map(sum, counts)))
    # as bytes, of which no backend lacks the dtype
    dist.all_to_all_single(
        received.view(torch.uint8),
        flat.view(torch.uint8),
        [like.itemsize * sum(some) for some in counts],
        [like.itemsize * sum(x.numel() for x in some) for some in sent],
    )
    parts = iter(received.split([n for some in counts for n in some]))
    return [[next(parts).view(*shape) for shape in some] for some in shapes]


def full_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by name, gathered where they are sharded; every process calls it and has them all."""
    return {name: full(p.detach()) for name, p in module.named_parameters()}


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "device_mesh")  # a DTensor, whose import costs every run


def full(x: Tensor) -> Tensor:
    """x, gathered where it is sharded: a collective."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of sharded tensors, sharing their memory; others are themselves."""
    return [x.to_local() if is_sharded(x) else x for x in tensors]  # type: ignore[attr-defined]


def gathered(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """x of every process of the group (default: of all), of one shape, in their order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


@torch.no_grad()
def reset_shards(module: nn.Module, whole: nn.Module, device: torch.device) -> None:
    """Give the sharded `module` the values that `whole`, the same on the meta device, draws on `device`.

    One submodule draws at a time, as whole.reset_parameters() would have them do, and no more of it is ever there.
    """
    for ours, theirs in zip(module.modules(), whole.modules(), strict=True):
        if not list(theirs.parameters(recurse=False)):
            continue
        theirs.to_empty(device=device, recurse=False)
        theirs.reset_parameters()  # type: ignore[operator]
        copy_parameters(theirs, ours)
        theirs.to_empty(device="meta", recurse=False)


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Write `source`'s parameters, which are whole and the same everywhere, into `target`'s, which may be shards."""
    for p, value in zip(target.parameters(), source.parameters(), strict=True):
        if is_sharded(p):
            first, n = shard_rows(p.shape[0], p.device_mesh.size(), p.device_mesh.get_local_rank())  # type: ignore[attr-defined]
            p.to_local().copy_(value[first : first + n])  # type: ignore[attr-defined]
        else:
            p.copy_(value)


def shard_rows(n: int, size: int, rank: int) -> tuple[int, int]:
    """(first, count): the rows of n that rank has in a Shard(0) between `size`, which cuts as torch.chunk does."""
    each = -(-n // size)
    first = min(n, rank * each)
    return first, min(n, first + each) - first
