"""What a run has come to: in all, since it began, and since its last record."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Counters and times include the earlier parts of a resumed run, peak memory does not."""

    step: int
    train_loss: float  # nats per token, mean of the last log interval
    val_loss: float | None  # nats per token, latest; None without validation data
    first_val_loss: float | None  # before the first step
    val_bits_per_byte: float | None
    seconds: float  # in all: steps, validation, checkpoints
    tokens: int  # trained on
    tokens_per_second: float  # of the steps alone
    mfu: float  # of the steps alone, of all GPUs; model FLOPs, causal attention counted exactly
    peak_flops: float  # FLOP/s, what mfu is held against
    peak_memory_bytes: (
        int  # of this process; CUDA: allocated by torch; CPU: resident, beyond what the process held before
    )
    step_seconds: float  # median
    stopped: str  # "steps", "time" or "interrupted"
    checkpoint: Path
    signal: int | None = None  # what interrupted it


@dataclass
class Totals:
    """What a checkpoint carries beside the weights, so that a resumed run reports on the whole."""

    tokens: int = 0  # counted: the batch size may change when a run resumes
    elapsed: float = 0.0  # seconds, all of the run
    stepping: float = 0.0  # seconds in steps
    train_loss: float = math.nan
    val_loss: float | None = None
    first_val_loss: float | None = None


class Interval:
    """The steps between two log records: their losses stay on the device until `close` asks for them."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps, self.seconds = 0, 0.0
        self._start = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.loss += loss
        self.norm = norm
        self.steps += 1

    def close(self) -> tuple[float, float]:
        """Mean loss and last gradient norm. A norm that was not finite has spoilt every loss and norm after it."""
        loss, norm = self.loss.item() / self.steps, self.norm.item()
        self.seconds = time.perf_counter() - self._start
        return loss, norm
