"""A step whose loss or gradient was not finite: kept as it stood before its update, and computed again.

    <out_dir>/diverged/step-00000034/

is a checkpoint (checkpoint/): parameters, optimizers, random generators and step of that moment, with the step's
batch, its loss and its gradient's norm beside them. It needs nothing else of the run, not even its tokens; the batch is
that of all processes, so that one computes again what several had, in their micro-batches one after another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.typed import typed
from ..checkpoint import find_checkpoint, load_checkpoint, load_extra, save_checkpoint
from ..config import TrainConfig
from ..data import Batch, bounds_of
from ..files import remove_folder
from ..graph import autocast
from ..learner import Learner, resolve_device

DUMPS = "diverged"


@dataclass(frozen=True)
class Replay:
    """What computing a dumped step again gave."""

    step: int  # steps done before it
    loss: float
    grad_norm: float
    loss_then: float
    grad_norm_then: float
    first_module: str | None  # the first in the forward pass whose output is not finite
    gradients: tuple[str, ...]  # parameters whose gradients are not finite, in the model's order

    @property
    def reproduced(self) -> bool:
        return not is_finite(self.loss, self.grad_norm)

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"step {self.step + 1}: loss {self.loss} ({self.loss_then} in the run), gradient norm {self.grad_norm} "
            f"({self.grad_norm_then})",
            "reproduced: not finite" if self.reproduced else "not reproduced: finite this time",
        ]
        if self.first_module is not None:
            lines.append(f"first output that is not finite: {self.first_module}")
        if self.gradients:
            lines.append(f"{len(self.gradients)} gradients that are not: {', '.join(self.gradients)}")
        return lines


def is_finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def find_divergence(
    learner: Learner,
    checkpoint: Path | None,
    factors: Sequence[float],
    batch: Callable[[int], Batch],
    *,
    out_dir: Path,
    tokenizer_hash: str,
) -> tuple[int, Path] | None:
    """Run the steps since `checkpoint` (None: since the start) again and dump the first that is not finite.

    factors: of the learning rate, one for each step.  batch: that of a step, by the steps done before it.
    Returns the step's number, from 1, and its dump; None when every step was finite.
    A run looks at its losses when it logs: between records nothing waits for the device, so that by the time the loss
    is seen the parameters are spoilt. Steps are the same when they run again, as they are when a run resumes.
    """
    learner.restart()
    done = load_checkpoint(checkpoint, learner.model, learner.optimizers)[0] if checkpoint else 0
    for factor in factors:
        tensors = batch(done)
        inputs, targets = tensors[:2]
        loss, norm = (x.item() for x in learner.take_step.gradients(*tensors))
        if not is_finite(loss, norm):
            extra = {
                "config": learner.config.to_dict(),
                "processes": learner.world.size,
                "inputs": learner.world.all_rows(inputs).to("cpu", torch.int32),
                "targets": learner.world.all_rows(targets).to("cpu", torch.int32),
                "loss": loss,
                "grad_norm": norm,
            }
            directory = out_dir / DUMPS
            if learner.world.first and (earlier := directory / f"step-{done:08d}").exists():
                remove_folder(earlier)
            return done + 1, save_checkpoint(
                directory, learner.model, learner.optimizers, step=done, extra=extra, tokenizer_hash=tokenizer_hash
            )
        learner.set_rates(factor)
        learner.take_step.update()
        done += 1
    return None


@typed
def replay(path: str | Path, *, device: str | None = None) -> Replay:
    """Compute a dumped step's loss and gradient again.

    device: in place of the run's, as in TrainConfig.
    Raises FileNotFoundError when there is no dump, ValueError when `path` is none or is damaged.
    """
    path = find_checkpoint(path)
    extra = load_extra(path)
    if not {"config", "inputs", "targets", "loss", "grad_norm"} <= extra.keys():
        raise ValueError(f"{path} is a checkpoint, and no dump of a step that was not finite")
    config = TrainConfig.from_dict(extra["config"] | {"init_from": None})  # which may be gone
    n = config.gradient_accumulation * extra.get("processes", 1)  # of as many rows as a process had at once
    options = {"device": device or config.device, "cuda_graph": False, "gradient_accumulation": n}
    config = dataclasses.replace(config, **options)
    where = resolve_device(config.device)
    learner = Learner(config, where)
    count, _ = load_checkpoint(path, learner.model, learner.optimizers)
    batch: Batch = tuple(extra[name].long() for name in ("inputs", "targets"))
    if config.documents:
        batch += (bounds_of(batch[1], n),)
    batch = tuple(x.to(where) for x in batch)
    loss, norm = learner.take_step.gradients(*batch)
    gradients = tuple(
        name for name, p in learner.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    )
    parts = zip(*(x.chunk(n) for x in batch), strict=True)
    first = next(filter(None, (_first_module(learner, part) for part in parts)), None)
    return Replay(count, loss.item(), norm.item(), extra["loss"], extra["grad_norm"], first, gradients)


@torch.no_grad()
def _first_module(learner: Learner, batch: Batch) -> str | None:
    """The name of the first module whose output is not finite, "loss" when only that is not; not compiled."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all() for x in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name or "loss")) for name, module in learner.model.named_modules()]
    try:
        with autocast(learner.device, learner.dtype):
            learner.validated(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
