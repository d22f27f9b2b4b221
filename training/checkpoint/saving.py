"""Saving a checkpoint: by one process, or by all those of a run together; at once, or while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...model import Transformer
from ...model.hf.weights import as_os_errors
from ...model.transformer import unwrapped
from ...model.typed import typed
from ..distributed import TIMEOUT, is_sharded
from ..files import remove_folder
from .folder import MODEL, SHARDS, STATE, WEIGHTS, earlier_whole, file_entries, write_manifest
from .ranks import Ranks


@typed
def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    tokenizer_hash: str | None = None,
    keep: int = 2,
) -> Path:
    """Write `directory`/step-<step>, then remove all older whole checkpoints but keep - 1. Returns its path.

    model: a Transformer, or one inside torch.compile or DistributedDataParallel, or sharded by fully_shard.
    extra: further plain values and tensors for state.pt.  tokenizer_hash: of the tokenizer that made the data.
    The states of torch's random generators, CPU and CUDA, are saved with it.
    Where torch.distributed has several ranks, all of them call it, with the same arguments, on a file system that they
    share; extra is rank 0's. An optimizer's state that several ranks hold must be the same on each.
    Raises ValueError, before anything is written, when keep < 1, the step's checkpoint exists or the model is another
    module; OSError when it cannot be written, a full disk say, with nothing left of it. All ranks raise what one does,
    but for the loss of a rank, which raises what torch.distributed does.
    """
    ranks = Ranks()
    final = _new_name(directory, step, keep, ranks)
    return _write(final, _snapshot(model, optimizers, step, extra, ranks), tokenizer_hash, keep, ranks)


class BackgroundSaves:
    """save_checkpoint, of which `begin` only copies the tensors to the CPU: a thread writes them, one at a time.

    Where there are several ranks all of them make one and call it alike: their threads talk through a group of gloo of
    their own. A checkpoint is as atomic as any, and what a crash leaves is the one before it. Entered, it waits at the
    end for what it has begun.
    saved: told, in that thread, the path of each that is whole.
    """

    def __init__(self, saved: Callable[[Path], object] = lambda path: None) -> None:
        self._saved = saved
        self._ranks = Ranks()
        if self._ranks.size > 1:
            self._ranks = Ranks(dist.new_group(backend="gloo", timeout=TIMEOUT))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._begun: Future[Path] | None = None

    def begin(
        self,
        directory: str | Path,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        step: int,
        extra: dict[str, Any] | None = None,
        tokenizer_hash: str | None = None,
        keep: int = 2,
    ) -> None:
        """Save a checkpoint as save_checkpoint does, after the one before has been finished, whose errors it raises."""
        self.finish()
        final = _new_name(directory, step, keep, self._ranks)
        snapshot = _snapshot(model, optimizers, step, extra, self._ranks)
        snapshot.copy()

        def write() -> Path:
            path = _write(final, snapshot, tokenizer_hash, keep, self._ranks)
            self._saved(path)
            return path

        self._begun = self._thread.submit(write)

    def finish(self) -> Path | None:
        """Wait for the checkpoint that was begun last; its path, None where there is none since the last call.

        Raises what save_checkpoint would have.
        """
        begun, self._begun = self._begun, None
        return None if begun is None else begun.result()

    def __enter__(self) -> BackgroundSaves:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.finish()


@dataclass
class _Snapshot:
    """What a checkpoint holds, still in memory."""

    config: dict[str, Any]
    sharded: bool
    tensors: dict[str, Tensor]  # by the names that they have in the file, or in the shards
    state: dict[str, Any]  # of state.pt
    generators: Any  # torch's, of this rank

    def copy(self) -> None:
        """From now on what the model and the optimizers do leaves it as it is."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        staged = BlockingAsyncStager().stage({"tensors": self.tensors, "state": self.state})
        self.tensors, self.state = staged["tensors"], staged["state"]


def _new_name(directory: str | Path, step: int, keep: int, ranks: Ranks) -> Path:
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    final = Path(directory) / f"step-{step:08d}"
    if ranks.first(final.exists):
        raise ValueError(f"step {step} has a checkpoint already: {final}")
    return final


def _snapshot(
    model: nn.Module, optimizers: Sequence[Optimizer], step: int, extra: dict[str, Any] | None, ranks: Ranks
) -> _Snapshot:
    plain = plain_model(model)
    state: dict[str, Any] = {"step": step, "extra": extra or {}}
    cuda = torch.cuda.is_available()
    if sharded := ranks.size > 1 or is_sharded_model(plain):
        from . import shards  # torch.distributed.checkpoint takes a second to import

        parameters = shards.parameters_of(plain)
        state["optimizers"] = shards.optimized_names(parameters, optimizers)
        tensors = shards.tensors_of(parameters, optimizers)
        generators: Any = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
    else:
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        tensors = {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
        generators = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    return _Snapshot(plain.config.to_dict(), sharded, tensors, state, generators)


def _write(final: Path, snapshot: _Snapshot, tokenizer_hash: str | None, keep: int, ranks: Ranks) -> Path:
    step = snapshot.state["step"]
    save = _write_shards if snapshot.sharded else _write_whole
    try:
        with ranks.new_folder(final) as folder:
            files = save(folder, snapshot, ranks)
            ranks.first(lambda: write_manifest(folder, step=step, tokenizer_hash=tokenizer_hash, files=files))
    except OSError as error:
        failure = OSError(f"could not write {final}: {error}")
        failure.errno = error.errno
        raise failure from error

    def remove_old() -> None:
        whole = earlier_whole(final)
        for old in whole[: max(0, len(whole) - (keep - 1))]:
            remove_folder(old)

    ranks.first(remove_old)
    return final


def _write_whole(folder: Path, snapshot: _Snapshot, ranks: Ranks) -> dict[str, Any]:
    """The files of one process; returns what is known of them by now: nothing."""
    rng, cuda_rng = snapshot.generators
    with as_os_errors():
        safetensors.torch.save_file(snapshot.tensors, folder / WEIGHTS)
    _write_rest(folder, snapshot, {"rng": rng, "cuda_rng": cuda_rng})
    return {}


def _write_shards(folder: Path, snapshot: _Snapshot, ranks: Ranks) -> dict[str, Any]:
    """The files of all ranks; returns what the manifest says of those that a rank has written, and read again."""
    from . import shards

    written = shards.write(folder / SHARDS, snapshot.tensors, ranks)
    told = ranks.together(lambda: (file_entries(folder, written), snapshot.generators))

    def rest() -> None:
        for rank, (entries, _) in enumerate(told):
            if any(not (folder / name).is_file() for name in entries):
                raise OSError(f"rank 0 does not see what rank {rank} has written: they need one file system in common")
        _write_rest(folder, snapshot, {"generators": [generators for _, generators in told]})

    ranks.first(rest)
    return {name: entry for entries, _ in told for name, entry in entries.items()}


def _write_rest(folder: Path, snapshot: _Snapshot, generators: dict[str, Any]) -> None:
    (folder / MODEL).write_text(json.dumps(snapshot.config, indent=2) + "\n", encoding="utf-8")
    with as_os_errors(), (folder / STATE).open("wb") as file:
        torch.save(snapshot.state | generators, file)


def plain_model(model: nn.Module) -> Transformer:
    """The Transformer inside torch.compile's or DistributedDataParallel's wrappers, which share its parameters.

    Raises ValueError on any other module, and on wrappers further inside, whose names a plain model would not know.
    """
    inner = unwrapped(model)
    if inner is None:
        raise ValueError(f"model must be a Transformer, got {type(model).__name__}")
    with torch.device("meta"):
        expected = Transformer(inner.config)
    if odd := sorted(dict(inner.named_parameters()).keys() ^ dict(expected.named_parameters()).keys()):
        raise ValueError(f"model must have the parameters of its config, got a difference in {odd[0]}")
    return inner


def is_sharded_model(model: Transformer) -> bool:
    """Whether other processes hold a part of its parameters."""
    return any(map(is_sharded, model.parameters()))
