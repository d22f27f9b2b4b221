"""What ends a run before its end: signals, failures, and a batch that does not fit."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from ...model.estimate import Estimate, estimate, largest_batch
from ..config import TrainConfig

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TrainingFailed(RuntimeError):  # noqa: N818
    """A run that had begun could not go on; its last checkpoint is as it was."""


class TrainingDiverged(TrainingFailed):
    """The loss or the gradient is no longer finite."""


class LostPeer(TrainingFailed):
    """Another process of the run has ended, and this one cannot go on alone."""


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP only sets `received` to its number; a second SIGINT raises
    KeyboardInterrupt.

    A SIGHUP that is ignored stays so: nohup asked for that.
    patient: for a second SIGINT too, as torchrun passes on what the terminal has sent to all.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in STOPPING:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        self.received = self.received or number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, numpy or Python could not allocate."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def predicted_step(config: TrainConfig, ops: str, processes: int = 1) -> Estimate:
    """The estimate of one process's micro-batch; ops: whose memory it is, as in model.estimate."""
    batch_size = config.batch_size // (processes * config.gradient_accumulation)
    return estimate(config.model, batch_size=batch_size, **_settings(config, ops, processes))


def _settings(config: TrainConfig, ops: str, processes: int) -> dict[str, Any]:
    settings = {"dtype": config.dtype, "checkpointing": config.checkpointing, "ops": ops}
    settings |= {"optimizer": config.optimizer, "fp8": config.fp8}
    if processes == 1:
        return settings
    return settings | {"gpus": processes, "parallel": config.parallel, "reshard": config.reshard}


def check_memory(config: TrainConfig, ops: str, capacity: int, processes: int = 1) -> None:
    """Raise ValueError when a process is predicted to hold more than `capacity`, the machine's memory in bytes.

    For a CPU, where the system would end the process without a word, and a checkpoint in the background is copied to.
    """
    # the batch and its gather's indices, int64, stand beside the step
    batch = 16 * (config.batch_size // processes) * (config.model.context_length + 1)
    memory = predicted_step(config, ops, processes).memory
    copied = (memory.parameters + memory.optimizer) * config.async_checkpoints
    need = memory.peak + batch + copied
    if need > capacity:
        raise ValueError(
            f"batch_size {config.batch_size} needs {need / 1e9:,.1f} GB of memory at its peak (predicted), and there "
            f"are {capacity / 1e9:,.1f} GB: {what_fits(config, ops, capacity - copied, processes)}"
        )


def what_fits(config: TrainConfig, ops: str, capacity: int, processes: int = 1) -> str:
    """In words: the largest micro-batch whose step is predicted to fit, of all processes together, and the accumulation
    that makes it so."""
    fits = largest_batch(config.model, capacity, **_settings(config, ops, processes))
    if fits == 0:
        further = "" if config.checkpointing else ", and checkpointing may"
        return f"not even one sequence fits (predicted){further}"
    size = config.batch_size // processes
    least = -(-size // fits)
    n = next((n for n in range(least, min(size, least + 100_000) + 1) if size % n == 0), None)
    accumulating = f", or gradient_accumulation {n} with batch_size {config.batch_size}" if n and fits < size else ""
    return f"batch_size {fits * processes} fits (predicted){accumulating}"
