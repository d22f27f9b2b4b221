"""What learns in a run: the device it is on, a model, its optimizers and their step; and its validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import dispatch, reference
from ..model import Transformer
from ..model.typed import typed
from .config import TrainConfig
from .data import TokenFile, validation_batches
from .distributed import ALONE, World, copy_parameters, data_parallel, fully_sharded
from .graph import Captured, CudaGraphs, Graphs, TrainStep, autocast, set_rates
from .optim import build_optimizers, low_precision
from .pretrained import copy_weights


class Learner:
    """A model and optimizers as `config` has them begin, and their step.

    Building seeds torch's generators with config.seed.  fresh: begin with init_from's weights, if any; a run
    that resumes has others anyway.  say: told in a sentence why the step cannot be captured.  world: the processes
    that learn together, by config.parallel; each builds its own, all at once.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        fresh: bool = True,
        say: Callable[[str], object] = print,
        world: World = ALONE,
    ) -> None:
        self.world, self.parallel = world, config.parallel if world.size > 1 else "none"
        self.config, self.device, self.dtype = config, device, getattr(torch, config.dtype)
        self.ops, self.fresh = choose_ops(config.kernels, device), fresh
        self.model = self._begun()
        engine: nn.Module = self.model
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.parallel == "fsdp":
            low = None if self.dtype == torch.float32 else self.dtype
            fully_sharded(self.model, self.model.layers, dtype=low, cast_inputs=False, reshard=config.reshard)
        elif self.parallel == "ddp":
            engine = ddp = data_parallel(self.model)
            no_sync = ddp.no_sync
        # compiled code casts weights by itself, and the oracles' optimizer is torch's
        plain = config.compile or self.ops is reference
        plain = plain or self.parallel == "fsdp"  # whose parameters are gathered in that dtype
        # DDP's buckets have the parameters' dtype, as accumulated gradients have
        several = config.gradient_accumulation > 1 or self.parallel == "ddp"
        copies = {} if plain else low_precision(device, self.dtype, accumulates=several)
        self.optimizers = build_optimizers(
            self.model,
            optimizer=config.optimizer,
            lr=config.lr,
            muon_lr=config.muon_lr,
            muon_momentum=config.muon_momentum,
            betas=config.betas,
            weight_decay=config.weight_decay,
            muon_dtype=self.dtype,
            triton=False if self.ops is reference else None,
            world=world,
            **copies,
        )
        self._peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.forward: Callable[..., Tensor] = torch.compile(engine) if config.compile else engine
        graphs = graphs_for(config, device)
        if graphs is not None and self.parallel != "none":
            say("the step runs without a CUDA graph: other processes take part in it")
            graphs = None
        self.take_step = TrainStep(
            self.forward,
            self.model.parameters(),
            self.optimizers,
            device=device,
            dtype=self.dtype,
            micro_batches=config.gradient_accumulation,
            max_norm=config.grad_clip or math.inf,
            graphs=graphs,
            say=say,
            world=world,
            no_sync=no_sync,
        )
        # Not compiled: without gradients, and with the last batch's rows, it would be twice more. In a graph it says
        # nothing of its own: what cannot be captured there could not be in the step either.
        self.validated: Callable[..., Tensor] = self.model
        if graphs is not None:
            self.validated = Captured(self.model, graphs, warmup=1, failed=lambda error: None)

    def _begun(self) -> Transformer:
        torch.manual_seed(self.config.seed)
        with self.device:
            model = Transformer(self.config.model, ops=self.ops, checkpointing=self.config.checkpointing)
        if self.config.init_from is not None and self.fresh:
            copy_weights(self.config.init_from, model)
        return model

    def rows(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This process's rows of a batch for all."""
        return tuple(x[self.world.rows(len(x))] for x in batch)

    def set_rates(self, factor: float) -> None:
        """Every learning rate to `factor` times its peak."""
        set_rates(self.optimizers, [[peak * factor for peak in peaks] for peaks in self._peak_lrs])

    def restart(self) -> None:
        """Model, optimizers and random generators as they began, in place; the step is captured no more."""
        self.take_step.forget_graphs()
        self.validated = self.model
        copy_parameters(self._begun(), self.model)
        for optimizer in self.optimizers:
            optimizer.state.clear()


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor, Tensor], Tensor],
    data: TokenFile,
    *,
    batch_size: int,
    context_length: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_batches: int | None = None,
    vocab_size: int | None = None,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token over the file's non-overlapping windows, or over max_batches batches of them.

    vocab_size: the model's, to hold the ids to.  world: processes that divide each batch; all call it, and all get the
    mean.
    Raises ValueError on an id that the model does not have.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for inputs, targets in validation_batches(
        data.tokens, batch_size, context_length, device, max_batches=max_batches, vocab_size=vocab_size
    ):
        rows = world.rows(len(inputs))
        # a process without a row computes one for nothing: a sharded model's processes compute together
        some = rows if rows.start < rows.stop else slice(0, 1)
        with autocast(device, dtype):
            loss = model(inputs[some], targets[some]).double()
        n = targets[rows].numel()
        if n:
            total += loss * n
        count += n
    total, tokens = world.sum(torch.stack([total, total.new_tensor(count)]))
    return total.item() / tokens.item()


@typed
def resolve_device(name: str) -> torch.device:
    """The device of that name, "auto" being CUDA when there is one. Raises ValueError on one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto or a torch device, got {name!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} needs a CUDA GPU, and torch finds none")
    try:
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of another kind, or one GPU too far
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device must be one that torch has here, got {name!r}: {why}") from None
    return device


def choose_ops(name: str, device: torch.device) -> ModuleType:
    """The implementation of the model's operations; nobody trains in Triton's interpreter unless they ask for it."""
    if name == "triton" and device.type != "cuda" and not dispatch.INTERPRETED:
        raise ValueError(f"kernels 'triton' need a CUDA device, or TRITON_INTERPRET=1, got device {device}")
    if name == "eager" or (name == "auto" and device.type == "cpu" and dispatch.INTERPRETED):
        return reference
    return kernels


def whose_memory(ops: ModuleType, device: torch.device) -> str:
    """What model.estimate calls the memory of these operations on that device."""
    return "eager" if ops is reference else "triton" if device.type == "cuda" else "cpu"


def graphs_for(config: TrainConfig, device: torch.device) -> Graphs | None:
    """Where the run's graphs are captured; None where it has none."""
    return CudaGraphs(device) if config.cuda_graph and device.type == "cuda" else None
