"""The tensors of a run's processes in one folder, by torch.distributed.checkpoint.

Each rank writes what it alone holds (a DTensor's local part), and what all hold is divided between them. A tensor is
read in whatever layout the reader wants it: a DTensor over another number of ranks, or whole.

    model.<name>                        a parameter, under the name that it has in the model (q, k and v as one matrix)
    optimizers.<i>.<name>.<key>         what optimizer i keeps for it, "exp_avg" say

torch writes its index as a pickle, which could run anything when it is read; here it may name torch's own records of
tensors and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ...model import Transformer
from .ranks import Ranks


def parameters_of(model: Transformer) -> dict[str, Tensor]:
    """The model's parameters by name, as the optimizers hold them: under FSDP2, sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward one leaves some whole
    return dict(model.named_parameters())


def optimized_names(parameters: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> list[list[str]]:
    """The names of each optimizer's parameters. Raises ValueError on one that is not the model's."""
    names = {id(p): name for name, p in parameters.items()}
    held = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
    if any(key not in names for keys in held for key in keys):
        raise ValueError("optimizers must hold the model's parameters, got another: build them after fully_shard")
    return [[names[key] for key in keys] for keys in held]


def tensors_of(parameters: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """What is saved, by the names above; the tensors themselves, detached."""
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for i, optimizer in enumerate(optimizers):
        for name, p in parameters.items():
            # a rank without rows of a small parameter does not step it: its count of steps is not the others'
            steps_it = not isinstance(p, DTensor) or p.to_local().numel() > 0
            for key, value in optimizer.state.get(p, {}).items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"optimizers must keep tensors alone, got {key!r} of {type(value).__name__}")
                if not (steps_it or isinstance(value, DTensor)):
                    continue
                tensors[f"optimizers.{i}.{name}.{key}"] = value.detach()
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> list[Path]:
    """Write `tensors` to `folder`, together with the other ranks; the files that this one wrote.

    Raises OSError, on every rank, what any of them could not do.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=ranks.group)
    except CheckpointException as error:  # no Exception, and with every rank's traceback in its text
        rank, (cause, _) = min(error.failures.items())
        raise OSError(f"rank {rank}: {cause}") from error
    return [*folder.glob(f"__{ranks.rank}_*"), *(folder.glob(".metadata") if ranks.rank == 0 else ())]


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # without the folder's name, which is a temporary one


class _Index(pickle.Unpickler):
    """Of the names that a pickle may call for, those of an index of tensors."""

    ALLOWED = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "ChunkStorageMetadata",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"an index of tensors has no {module}.{name}")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Index(file).load()


class Shards:
    """A folder that `write` has written, open for reading. No rank waits for another."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fill these, by their names, in place. Raises RuntimeError or ValueError where one is not there."""
        planner = DefaultLoadPlanner()
        planner.set_up_planner(dict(tensors), self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()

    def empty_states(self, i: int, names: Sequence[str], parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Tensors of the sizes and in the layouts of what optimizer `i` keeps for each of these parameters."""
        states: dict[str, dict[str, Tensor]] = {}
        known = self._metadata.state_dict_metadata
        keys = {name.rpartition(".")[2] for name in known if name.startswith(f"optimizers.{i}.")}
        for name in names:
            p = parameters[name]
            for key in sorted(keys):
                saved = known.get(f"optimizers.{i}.{name}.{key}")
                if isinstance(saved, TensorStorageMetadata):
                    dtype = saved.properties.dtype
                    states.setdefault(name, {})[key] = (
                        torch.empty_like(p, dtype=dtype, requires_grad=False)
                        if saved.size == p.shape
                        else torch.empty(saved.size, dtype=dtype, device=p.device)
                    )
        return states


def read(folder: Path, model: Transformer, optimizers: Sequence[Optimizer], expected: Sequence[Sequence[str]]) -> None:
    """Restore parameters and the optimizers' states in place, in whatever layout they have here.

    expected: the names of each optimizer's parameters. Raises ValueError where they are others.
    """
    shards, parameters = Shards(folder), parameters_of(model)
    names = optimized_names(parameters, optimizers)
    for i, (ours, theirs) in enumerate(zip(names, expected, strict=True)):
        if odd := sorted(set(ours) ^ set(theirs)):
            raise ValueError(f"{folder} holds other parameters for optimizer {i}: a difference in {odd[0]}")
    states = [shards.empty_states(i, named, parameters) for i, named in enumerate(names)]
    shards.read(
        {f"model.{name}": p.detach() for name, p in parameters.items()}
        | {
            f"optimizers.{i}.{name}.{key}": value
            for i, state in enumerate(states)
            for name, kept in state.items()
            for key, value in kept.items()
        }
    )
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.state.clear()
        optimizer.state.update({parameters[name]: kept for name, kept in state.items()})


def _laid_out(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every rank has, in the layout of `like`, without sending anything."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def lay_out_weights(weights: dict[str, Tensor], model: Transformer) -> None:
    """Restore in place, in its layout, what one process's state dict says."""
    parameters = parameters_of(model)
    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict(weights, assign=True)
    for name, tensor in whole.named_parameters():
        parameters[name].copy_(_laid_out(tensor, parameters[name]))


def lay_out_states(optimizer: Optimizer) -> None:
    """Give the optimizer's states, which every rank has whole, the layouts of their parameters."""
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == p.shape:
                state[key] = _laid_out(value, p)
