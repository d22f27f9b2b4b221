"""One step of training: where it runs, the model and optimizers that it updates, gradients, update; validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from .. import kernels
from ..kernels import dispatch, reference
from ..model import Transformer
from .config import TrainConfig
from .data import TokenFile, validation_batches
from .optim import build_optimizers, clip_grad_norm


class TrainStep:
    """A model and optimizers as `config` has them begin, and their step.

    Building seeds torch's generators with config.seed.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device, self.dtype = config, device, getattr(torch, config.dtype)
        torch.manual_seed(config.seed)
        with device:
            self.model = Transformer(
                config.model, ops=choose_ops(config.kernels, device), checkpointing=config.checkpointing
            )
        self.parameters = list(self.model.parameters())
        self.optimizers = build_optimizers(
            self.model,
            optimizer=config.optimizer,
            lr=config.lr,
            muon_lr=config.muon_lr,
            muon_momentum=config.muon_momentum,
            betas=config.betas,
            weight_decay=config.weight_decay,
            muon_dtype=self.dtype,
        )
        self._peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.forward = torch.compile(self.model) if config.compile else self.model

    def restart(self) -> None:
        """Model, optimizers and random generators as they began, in place."""
        config = self.config
        torch.manual_seed(config.seed)
        with self.device:
            fresh = Transformer(config.model, ops=choose_ops(config.kernels, self.device))
        self.model.load_state_dict(fresh.state_dict())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()

    def __call__(self, inputs: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Gradients and update on one batch, (B, T) int64 each, at `factor` times the peak learning rates.

        Returns loss and gradient norm, still on the device.
        """
        loss, norm = self.gradients(inputs, targets)
        self.update(factor)
        return loss, norm

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's mean loss and the norm of its gradient before clipping; gradients are in the parameters."""
        n = self.config.gradient_accumulation
        total = torch.zeros((), device=self.device)
        for some_inputs, some_targets in zip(inputs.chunk(n), targets.chunk(n), strict=True):
            with autocast(self.device, self.dtype):
                loss = self.forward(some_inputs, some_targets) / n
            loss.backward()
            total += loss.detach()
        return total, clip_grad_norm(self.parameters, self.config.grad_clip or math.inf)

    def update(self, factor: float) -> None:
        """The optimizers' step; gradients are gone after it."""
        for optimizer, peaks in zip(self.optimizers, self._peak_lrs, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


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
) -> float:
    """Mean loss in nats per token over the file's non-overlapping windows, or over max_batches batches of them.

    vocab_size: the model's, to hold the ids to. Raises ValueError on one that the model does not have.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for inputs, targets in validation_batches(
        data.tokens, batch_size, context_length, device, max_batches=max_batches, vocab_size=vocab_size
    ):
        with autocast(device, dtype):
            total += model(inputs, targets).double() * targets.numel()
        count += targets.numel()
    return total.item() / count


def resolve_device(name: str) -> torch.device:
    """The device of that name, "auto" being CUDA when there is one. Raises ValueError on one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto or a torch device, got {name!r}: {error}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} needs a CUDA GPU, and torch finds none")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not there: torch finds {torch.cuda.device_count()}")
        return device
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
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


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
