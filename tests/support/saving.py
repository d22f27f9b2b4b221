"""Checkpoints of several CPU processes that talk through gloo: what each rank does in the tests of them.

The numbers of a model and its optimizers are drawn from their names and a seed, so that any process of any run knows
what every tensor must be.
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer
from rooflight.model.transformer import unwrapped
from rooflight.training import loop
from rooflight.training.checkpoint import (
    BackgroundSaves,
    DamagedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from rooflight.training.checkpoint.ranks import Ranks
from rooflight.training.config import TrainConfig
from rooflight.training.optim import build_optimizers
from rooflight.training.run.stopping import TrainingDiverged
from support.ranks import forks

# Nothing divides by 3, the fused q, k and v have unequal rows, and the embedding is the output's matrix too.
CONFIG = ModelConfig(32, 8, 2, 4, n_kv_head=2, d_model=16, d_ff=40, qk_norm=True, tie_embeddings=True)

LAYOUTS = ("one", "fsdp", "ddp")
STATES = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Muon": ("momentum",)}


def build(layout: str = "one", config: ModelConfig = CONFIG) -> tuple[nn.Module, list[Optimizer]]:
    """A model of one process, "one", or of all ranks, "ddp" or "fsdp", and its optimizers."""
    model: nn.Module = Transformer(config, ops=reference)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizers = build_optimizers(model)
    return DistributedDataParallel(model) if layout == "ddp" else model, optimizers


def _expected(model: nn.Module, optimizers: list[Optimizer], seed: int) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    """Of every parameter and state its name, its parameter, its numbers, and where it lies."""
    inner = unwrapped(model)
    assert inner is not None
    names = {p: name for name, p in inner.named_parameters()}

    def drawn(name: str, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode())))

    for p, name in names.items():
        yield name, p, drawn(name, p.shape), None
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for key in STATES[type(optimizer).__name__]:
                whole = torch.tensor(float(seed)) if key == "step" else drawn(names[p] + key, p.shape)
                yield f"{names[p]} {key}", p, whole, (optimizer, key)


def _like(p: Tensor, whole: Tensor) -> Tensor:
    if isinstance(p, DTensor) and whole.dim():
        return distribute_tensor(whole, p.device_mesh, p.placements)
    return whole


@torch.no_grad()
def fill(model: nn.Module, optimizers: list[Optimizer], seed: int) -> None:
    for _, p, whole, place in _expected(model, optimizers, seed):
        if place is None:
            p.copy_(_like(p, whole))
        else:
            place[0].state[p][place[1]] = _like(p, whole)
            if place[1] == "step" and isinstance(p, DTensor) and not p.to_local().numel():
                place[0].state[p]["step"] = torch.zeros(())  # AdamW does not step what it has no rows of


def wrong(model: nn.Module, optimizers: list[Optimizer], seed: int) -> list[str]:
    """The names of the tensors that are not those that `fill` with this seed makes, bit for bit, and in its layout."""
    found = []
    for name, p, whole, place in _expected(model, optimizers, seed):
        value = p.detach() if place is None else place[0].state[p][place[1]]
        if type(value) is not type(like := _like(p, whole)):
            found.append(f"{name} is {type(value).__name__}")
            continue
        if isinstance(value, DTensor):
            value, like = value.to_local(), like.to_local()  # type: ignore[attr-defined]
        if not torch.equal(value, like):
            found.append(name)
    return found


def _rank(rank: int, world: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        work(rank, *args)
        dist.barrier()  # a process that leaves early breaks the others' connections
    finally:
        dist.destroy_process_group()


def start(world: int, folder: Path, work: Callable[..., None], *args: Any) -> Any:
    """`work`(rank, *args) in so many processes; torch's context of them.  folder: for their rendezvous."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    return forks(_rank, world, world, str(folder), work, args, join=False)


def run(world: int, folder: Path, work: Callable[..., None], *args: Any) -> None:
    """`start`, and the end of it. Raises what a rank raised."""
    join(start(world, folder, work, *args))


def join(context: Any) -> None:
    """Wait for all of `start`'s processes; where one fails the others are ended."""
    while not context.join():
        pass


def save_for_ever(rank: int, folder: str, layout: str, background: bool) -> None:
    """Save step after step, until somebody kills a rank; folder/../<rank> says what the others then raise."""
    model, optimizers = build(layout)
    saves = BackgroundSaves()
    try:
        for step in itertools.count(1):
            fill(model, optimizers, step)
            (saves.begin if background else save_checkpoint)(folder, model, optimizers, step=step)
    except Exception as error:
        Path(folder).with_name(str(rank)).write_text(f"{type(error).__name__}: {error}")
        raise


def _draws(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(4)


def save_all(rank: int, folder: str, world: int) -> None:
    """Of each layout a checkpoint, whose numbers and step are its own."""
    with BackgroundSaves() as saves:
        for layout in LAYOUTS[1:] if world > 1 else LAYOUTS[:1]:
            model, optimizers = build(layout)
            step = 10 * world + LAYOUTS.index(layout)
            fill(model, optimizers, step)
            torch.manual_seed(step + rank)
            extra = {"step": step, "ids": torch.arange(step)} if rank == 0 else None
            options: Any = {"step": step, "extra": extra, "tokenizer_hash": "ab" * 32, "keep": 99}
            if world == 2:
                assert save_checkpoint(folder, model, optimizers, **options).name == f"step-{step:08d}"
                continue
            saves.begin(folder, model, optimizers, **options)
            fill(model, optimizers, seed=2)  # the run goes on
            torch.manual_seed(2)
            if layout == "ddp":
                path = saves.finish()
                assert path is not None
                assert path.name == f"step-{step:08d}"
                assert saves.finish() is None


def load_all(rank: int, folder: str, world: int) -> None:
    """Every checkpoint there is, in each layout."""
    for path in list_checkpoints(folder):
        for layout in LAYOUTS[1:] if world > 1 else LAYOUTS[:1]:
            model, optimizers = build(layout)
            fill(model, optimizers, seed=1)
            optimizers[0].param_groups[0]["lr"] = 0.25
            step, extra = load_checkpoint(path, model, optimizers)
            assert path.name == f"step-{step:08d}"
            assert (step, wrong(model, optimizers, step)) == (step, [])
            assert extra["step"] == step
            assert torch.equal(extra["ids"], torch.arange(step))
            assert optimizers[0].param_groups[0]["lr"] == 0.25
            draws = torch.rand(4)
            assert torch.equal(draws, _draws(step + (rank if rank < step // 10 else 0)))


def save_and_load(rank: int, folder: str, world: int) -> None:
    save_all(rank, folder, world)
    load_all(rank, folder, world)


def fail(rank: int, folder: str) -> None:
    """What one rank cannot do or finds wrong, both raise, and then go on."""
    model, optimizers = build("fsdp")
    for step in (1, 2):
        fill(model, optimizers, step)
        save_checkpoint(folder, model, optimizers, step=step, extra={"step": step})

    directory = Path(folder)
    full = resource.getrlimit(resource.RLIMIT_FSIZE)
    for failing in (0, 1):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, full[1]))
        with pytest.raises(OSError, match=rf"could not write .*step-00000003: rank {failing}: .*File too large"):
            save_checkpoint(directory, model, optimizers, step=3)
        saves = BackgroundSaves()
        saves.begin(directory, model, optimizers, step=3)
        with pytest.raises(OSError, match=rf"could not write .*step-00000003: rank {failing}: .*File too large"):
            saves.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, full)
        dist.barrier()  # rank 0 has removed what it began
        assert sorted(p.name for p in directory.iterdir()) == ["step-00000001", "step-00000002"]
    with pytest.raises(ValueError, match="step 2 has a checkpoint already"):
        save_checkpoint(directory, model, optimizers, step=2)
    with pytest.raises(ValueError, match="optimizers must hold the model's parameters"):
        save_checkpoint(directory, model, build("one")[1], step=3)
    with pytest.raises(ValueError, match=r"another model than config\.model: d_ff 40 against 48"):
        load_checkpoint(directory, *build("fsdp", ModelConfig.from_dict({**CONFIG.to_dict(), "d_ff": 48})))
    with pytest.raises(ValueError, match=r"other parameters for optimizer 0: a difference in embedding\.weight"):
        load_checkpoint(directory, model, optimizers[::-1])
    assert wrong(model, optimizers, 2) == []

    class OddError(Exception):
        """Of a function, so that it cannot be sent."""

    def odd() -> None:
        raise OddError("here")

    with pytest.raises(RuntimeError, match="OddError: here"):
        Ranks().first(odd)

    good, bad = directory / "good", directory / "step-00000002"
    for name in ("shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata", "state.pt"):
        dist.barrier()
        if rank == 0:
            shutil.copytree(bad, good)
            content = bytearray((bad / name).read_bytes())
            content[len(content) // 2] ^= 1
            (bad / name).write_bytes(content)
        dist.barrier()
        fill(model, optimizers, 9)
        with pytest.raises(DamagedCheckpoint, match=rf"step-00000002 is damaged: {name} has other bytes"):
            load_checkpoint(directory, model, optimizers)
        assert wrong(model, optimizers, 9) == []  # nothing was restored from it
        path, step, extra, damaged = load_latest(directory, model, optimizers)
        assert (path.name, step, extra) == ("step-00000001", 1, {"step": 1})
        assert [(d.path.name, name in d.reason) for d in damaged] == [("step-00000002", True)]
        assert wrong(model, optimizers, 1) == []
        dist.barrier()
        if rank == 0:
            shutil.rmtree(bad)
            os.rename(good, bad)

    ids = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():  # a forward pass without a backward one, after which FSDP leaves parameters whole
        fill(model, optimizers, 3)
        model(ids)
        save_checkpoint(directory, model, optimizers, step=3)
        fill(model, optimizers, 4)
        model(ids)
        load_checkpoint(directory, model, optimizers)
    assert wrong(model, optimizers, 3) == []


def go_on(rank: int, config: TrainConfig) -> None:
    """train(config) on the ranks that there are, of which the first alone looks whether there are checkpoints."""

    def look(directory: Path) -> list[Path]:
        raise AssertionError(f"rank {rank} may see {directory} as it was before, on a network file system")

    if rank:
        loop.list_checkpoints = look  # type: ignore[assignment]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()))
    loop.train(config, console=Console(file=io.StringIO()))


def save_apart(rank: int, folders: list[str]) -> None:
    """Each rank in a folder of its own, as machines are without a file system in common."""
    os.chdir(folders[rank])
    with pytest.raises(OSError, match="rank 0 does not see what rank 1 has written: they need one file system"):
        save_checkpoint("checkpoints", *build("ddp"), step=1)
    assert list_checkpoints("checkpoints") == []


def diverge(rank: int, config: TrainConfig) -> None:
    """`go_on`, as far as it goes."""
    with pytest.raises(TrainingDiverged, match="which `rooflight replay "):
        go_on(rank, config)
