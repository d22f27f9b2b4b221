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
from ..kernels import dispatch, fp8, reference
from ..model import Transformer
from ..model.layers import use_fp8
from ..model.typed import typed
from .config import TrainConfig
from .data import IGNORED, Corpus, validation_batches
from .distributed import ALONE, World, data_parallel, fully_sharded, reset_shards
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
        self.model = self._on_meta()
        if config.fp8:
            say(self._use_fp8())
        if self.parallel == "fsdp":
            low = None if self.dtype == torch.float32 else self.dtype
            options: dict[str, Any] = {"dtype": low, "cast_inputs": False, "reshard": config.reshard}
            fully_sharded(self.model, self.model.layers, device=device, **options)
        self.model.to_empty(device=device)  # of a sharded model no process ever has the whole
        self._begin()
        engine: nn.Module = self.model
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.parallel == "ddp":
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
        self.forward = self._on_batches(torch.compile(engine) if config.compile else engine)
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
            by_tokens=config.documents,
            max_norm=config.grad_clip or math.inf,
            graphs=graphs,
            say=say,
            world=world,
            no_sync=no_sync,
        )
        # Not compiled: without gradients, and with the last batch's rows, it would be twice more. In a graph it says
        # nothing of its own: what cannot be captured there could not be in the step either.
        self.validated = self._on_batches(self.model)
        if graphs is not None:
            self.validated = Captured(self.validated, graphs, warmup=1, failed=lambda error: None)

    def _on_batches(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The mean loss of a batch as Batches has it."""
        if not self.config.documents:
            return model
        return lambda inputs, targets, bounds: model(inputs, targets, cu_seqlens=bounds.flatten())

    def _on_meta(self) -> Transformer:
        with torch.device("meta"):
            return Transformer(self.config.model, ops=self.ops, checkpointing=self.config.checkpointing)

    def _begin(self) -> None:
        """The model as it begins, in place."""
        torch.manual_seed(self.config.seed)
        if self.parallel == "fsdp":
            reset_shards(self.model, self._on_meta(), self.device)
        else:
            self.model.reset_parameters()
        if self.config.init_from is not None and self.fresh:
            copy_weights(self.config.init_from, self.model)

    def _use_fp8(self) -> str:
        """Products in fp8 where the model can have them; a sentence on which these are."""
        reason = None if self.ops is reference else fp8.refusal(self.device)
        if reason is not None:
            raise ValueError(f"fp8: {reason}")
        taken, left = use_fp8(self.model.layers, self.ops.fp8_linear)
        others = f"; not {', '.join(left)}, whose sides are no multiples of {fp8.FP8_MULTIPLE}" if left else ""
        return f"products in fp8, in each block: {', '.join(taken)}{others}"

    def set_rates(self, factor: float) -> None:
        """Every learning rate to `factor` times its peak."""
        set_rates(self.optimizers, [[peak * factor for peak in peaks] for peaks in self._peak_lrs])

    def restart(self) -> None:
        """Model, optimizers and random generators as they began, in place; the step is captured no more."""
        self.take_step.forget_graphs()
        self.validated = self._on_batches(self.model)
        self._begin()
        for optimizer in self.optimizers:
            optimizer.state.clear()


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor],
    data: Corpus,
    *,
    batch_size: int,
    context_length: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_batches: int | None = None,
    eod: int | None = None,
    vocab_size: int | None = None,
    world: World = ALONE,
) -> float:
    """Mean loss in nats per token over the files' non-overlapping windows, or over max_batches batches of them.

    model: of a batch's tensors.  eod: the id that ends documents, as in validation_batches.
    vocab_size: the model's, to hold the ids to.  world: the processes that share the batches; each calls it, and gets
    the mean of all.
    Raises ValueError on an id that the model does not have.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    batches = validation_batches(
        data.tokens,
        batch_size,
        context_length,
        device,
        max_batches=max_batches,
        eod=eod,
        vocab_size=vocab_size,
        rank=world.rank,
        world=world.size,
    )
    for batch in batches:
        counted = (batch[1] != IGNORED).sum()
        with autocast(device, dtype):
            loss = model(*batch).double()
        total += torch.where(counted > 0, loss * counted, 0.0)
        count += counted
    return world.sum(total).item() / max(1, world.sum(count).item())


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
