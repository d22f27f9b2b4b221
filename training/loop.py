"""The training loop: batches in, checkpoints and a log out."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import kernels
from ..kernels import dispatch, reference
from ..model import Transformer, estimate
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import Batches, TokenFile, check_window, open_tokens, validation_batches
from .files import write_json
from .graph import Captured, CudaGraphs, Graphs, TrainStep, autocast, set_rates
from .optim import build_optimizers, low_precision
from .pretrained import copy_weights
from .progress import Display, RunLog
from .throughput import PeakMemory, keep_freed_memory, measure_peak_flops, mfu


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The loss or the gradient is no longer finite."""


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
    mfu: float  # of the steps alone; model FLOPs, causal attention counted exactly
    peak_flops: float  # FLOP/s, what mfu is held against
    peak_memory_bytes: int  # CUDA: allocated by torch; CPU: resident, beyond what the process held before
    step_seconds: float  # median
    stopped: str  # "steps", "time" or "interrupted"
    checkpoint: Path


@dataclass
class _Totals:
    """What a checkpoint carries beside the weights, so that a resumed run reports on the whole."""

    elapsed: float = 0.0  # seconds, all of the run
    stepping: float = 0.0  # seconds in steps
    train_loss: float = math.nan
    val_loss: float | None = None
    first_val_loss: float | None = None


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Train a model as `config` says; see TrainConfig for every option. Writes out_dir/config.json, log.jsonl,
    checkpoints/.

    Ctrl-C or SIGTERM ends the step in hand, saves a checkpoint and returns with stopped "interrupted"; a second Ctrl-C
    raises KeyboardInterrupt at once. console: where progress goes (default: standard error).
    Raises ValueError when data, checkpoint and configuration do not fit together or out_dir holds a run that is not to
    be resumed, FileNotFoundError when data is missing, TrainingDiverged when the loss or the gradient stops being
    finite (checkpoints stay as they were).
    """
    return _Run(config, console or Console(stderr=True)).train()


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
) -> float:
    """Mean loss in nats per token over the file's non-overlapping windows, or over max_batches batches of them."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for inputs, targets in validation_batches(data.tokens, batch_size, context_length, device, max_batches=max_batches):
        with autocast(device, dtype):
            total += model(inputs, targets).double() * targets.numel()
        count += targets.numel()
    return total.item() / count


class _Run:
    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.device = resolve_device(config.device)
        self.dtype = getattr(torch, config.dtype)
        ops = _ops(config.kernels, self.device)
        self.train_data = self._open(config.train_data)
        self.val_data = None if config.val_data is None else self._open(config.val_data)
        if self.val_data and self.val_data.tokenizer_hash != self.train_data.tokenizer_hash:
            raise ValueError(
                f"train_data {config.train_data} and val_data {config.val_data} come from different tokenizers"
            )
        self.directory = config.out_dir / "checkpoints"
        found = list_checkpoints(self.directory)
        if found and not config.resume:
            raise ValueError(f"out_dir {config.out_dir} holds a run already: resume it, or choose another")
        self.peak_flops = config.peak_flops or measure_peak_flops(self.device, self.dtype)

        if self.device.type == "cpu":
            keep_freed_memory()
        self.memory = PeakMemory(self.device)
        torch.manual_seed(config.seed)
        with self.device:
            self.model = Transformer(config.model, ops=ops, checkpointing=config.checkpointing)
        if config.init_from is not None and not found:
            copy_weights(config.init_from, self.model)
        # compiled code casts weights by itself, and the oracles' optimizer is torch's
        plain = config.compile or ops is reference
        copies = {} if plain else low_precision(self.device, self.dtype, config.gradient_accumulation)
        self.optimizers = build_optimizers(
            self.model,
            optimizer=config.optimizer,
            lr=config.lr,
            muon_lr=config.muon_lr,
            muon_momentum=config.muon_momentum,
            betas=config.betas,
            weight_decay=config.weight_decay,
            muon_dtype=self.dtype,
            triton=False if ops is reference else None,
            **copies,
        )
        self.peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step, self.totals = 0, _Totals()
        self.checkpoint: Path | None = None
        if found:
            self._resume(found[-1])
        forward: Callable[..., Tensor] = torch.compile(self.model) if config.compile else self.model
        graphs = _graphs(config, self.device)
        self.take_step = TrainStep(
            forward,
            self.model.parameters(),
            self.optimizers,
            device=self.device,
            dtype=self.dtype,
            micro_batches=config.gradient_accumulation,
            max_norm=config.grad_clip or math.inf,
            graphs=graphs,
            say=self.console.print,
        )
        # Not compiled: without gradients, and with the last batch's rows, it would be twice more. In a graph it says
        # nothing of its own: what cannot be captured there could not be in the step either.
        self.validated: Callable[..., Tensor] = self.model
        if graphs is not None:
            self.validated = Captured(self.model, graphs, warmup=1, failed=lambda error: None)
        work = estimate(config.model, batch_size=config.batch_size, dtype=config.dtype)
        self.step_flops = work.forward_flops + work.backward_flops
        self.step_tokens = config.batch_size * config.model.context_length

    def _open(self, path: Path) -> TokenFile:
        data = open_tokens(path, vocab_size=self.config.model.vocab_size)
        check_window(data.tokens, self.config.batch_size, self.config.model.context_length)
        return data

    def _resume(self, checkpoint: Path) -> None:
        self.step, extra = load_checkpoint(checkpoint, self.model, self.optimizers)
        if extra["tokenizer_hash"] != self.train_data.tokenizer_hash:
            raise ValueError(f"{checkpoint} was trained on tokens of another tokenizer than {self.config.train_data}")
        self.totals = _Totals(**extra["totals"])
        self.checkpoint = checkpoint

    def train(self) -> TrainResult:
        config, totals = self.config, self.totals
        config.out_dir.mkdir(parents=True, exist_ok=True)
        write_json(config.out_dir / "config.json", config.to_dict())
        if config.compile:
            self._compile()
        self.started = time.perf_counter() - totals.elapsed
        means: list[float] = []  # seconds per step, one mean per log interval
        with ExitStack() as stack:
            log = RunLog(config.out_dir / "log.jsonl", keep_to=self.step if self.checkpoint else None)
            stack.callback(log.close)
            signals = stack.enter_context(_StopSignals())
            display = stack.enter_context(Display(self.console))
            batches = self._batches()
            progress = self._progress()
            if self.checkpoint:
                display.say(f"going on from step {self.step}, {self.checkpoint}")
            if self.step == 0 and self.val_data is not None:
                record = {"step": 0, "tokens": 0, **self._validate()}
                log.write(record)
                display.update(progress, record)

            ending = progress >= 1
            interval = _Interval(self.device)
            while not ending:
                self._set_rates(progress)
                interval.add(*self.take_step(*next(batches)))
                self.step += 1
                progress = self._progress()
                ending = progress >= 1 or signals.received
                due = progress >= 1 or (self.step % config.eval_every == 0 and not signals.received)
                validating = due and self.val_data is not None
                saving = self.step % config.checkpoint_every == 0 or ending
                if not (saving or validating or self.step % config.log_every == 0):
                    display.advance(progress)
                    continue
                record = self._record(interval)
                means.append(interval.seconds / interval.steps)
                if validating:
                    record |= self._validate()
                log.write(record)
                display.update(progress, record)
                if saving:
                    self._save()
                interval = _Interval(self.device)
        totals.elapsed = self._elapsed()
        stopped = "interrupted" if progress < 1 else "steps" if self.step >= config.max_steps else "time"
        return self._result(stopped, means)

    def _batches(self) -> Batches:
        c = self.config
        tokens, length = self.train_data.tokens, c.model.context_length
        return Batches(tokens, c.batch_size, length, self.device, seed=c.seed, step=self.step)

    def _compile(self) -> None:
        """A forward and a backward before the clock starts, since max_seconds counts training and not the compiler."""
        n = self.config.gradient_accumulation
        inputs, targets = (x.chunk(n)[0] for x in next(self._batches()))
        with autocast(self.device, self.dtype):
            loss = self.take_step.forward(inputs, targets) / n
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _progress(self) -> float:
        by_steps = self.step / self.config.max_steps
        return max(by_steps, self._elapsed() / self.config.max_seconds) if self.config.max_seconds else by_steps

    def _set_rates(self, progress: float) -> None:
        # half a step on, so that neither the first step of a warm-up nor the last of a decay is wasted on a zero rate
        factor = self.config.lr_factor(progress + 0.5 / self.config.max_steps)
        set_rates(self.optimizers, [[peak * factor for peak in peaks] for peaks in self.peak_lrs])

    def _record(self, interval: _Interval) -> dict[str, Any]:
        """What the interval since the last record did; the only place that waits for the device."""
        loss, norm = interval.close()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"loss {loss}, gradient norm {norm} by step {self.step}, {self._elapsed():.0f} s in: lower the "
                f"learning rate or lengthen the warm-up; the last checkpoint is {self.checkpoint or 'none'}"
            )
        self.totals.train_loss = loss
        self.totals.stepping += interval.seconds
        step_seconds = interval.seconds / interval.steps
        lrs = {type(o).__name__.lower() + "_lr": float(o.param_groups[0]["lr"]) for o in self.optimizers[1:]}
        return {
            "step": self.step,
            "tokens": self.step * self.step_tokens,
            "elapsed": self._elapsed(),
            "loss": loss,
            "grad_norm": norm,
            "lr": float(self.optimizers[0].param_groups[0]["lr"]),
            **lrs,
            "tokens_per_second": self.step_tokens / step_seconds,
            "mfu": mfu(self.step_flops, step_seconds, self.peak_flops),
        }

    def _validate(self) -> dict[str, float]:
        assert self.val_data is not None
        config = self.config
        loss = evaluate(
            self.validated,
            self.val_data,
            batch_size=config.batch_size // config.gradient_accumulation,
            context_length=config.model.context_length,
            device=self.device,
            dtype=self.dtype,
            max_batches=config.eval_batches,
        )
        self.totals.val_loss = loss
        if self.totals.first_val_loss is None:
            self.totals.first_val_loss = loss
        return {"val_loss": loss, "val_bpb": self.val_data.bits_per_byte(loss)}

    def _save(self) -> None:
        self.totals.elapsed = self._elapsed()
        self.checkpoint = save_checkpoint(
            self.directory,
            self.model,
            self.optimizers,
            step=self.step,
            extra={"totals": asdict(self.totals), "tokenizer_hash": self.train_data.tokenizer_hash},
            keep=self.config.keep_checkpoints,
        )

    def _result(self, stopped: str, means: list[float]) -> TrainResult:
        totals = self.totals
        assert self.checkpoint is not None
        step_seconds = totals.stepping / self.step
        return TrainResult(
            step=self.step,
            train_loss=totals.train_loss,
            val_loss=totals.val_loss,
            first_val_loss=totals.first_val_loss,
            val_bits_per_byte=None
            if totals.val_loss is None or self.val_data is None
            else self.val_data.bits_per_byte(totals.val_loss),
            seconds=totals.elapsed,
            tokens=self.step * self.step_tokens,
            tokens_per_second=self.step_tokens / step_seconds,
            mfu=mfu(self.step_flops, step_seconds, self.peak_flops),
            peak_flops=self.peak_flops,
            peak_memory_bytes=self.memory.peak(),
            step_seconds=statistics.median(means) if means else step_seconds,
            stopped=stopped,
            checkpoint=self.checkpoint,
        )


class _Interval:
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


class _StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `received`; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


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


def _ops(name: str, device: torch.device) -> ModuleType:
    """The implementation of the model's operations; nobody trains in Triton's interpreter unless they ask for it."""
    if name == "triton" and device.type != "cuda" and not dispatch.INTERPRETED:
        raise ValueError(f"kernels 'triton' need a CUDA device, or TRITON_INTERPRET=1, got device {device}")
    if name == "eager" or (name == "auto" and device.type == "cpu" and dispatch.INTERPRETED):
        return reference
    return kernels


def _graphs(config: TrainConfig, device: torch.device) -> Graphs | None:
    """Where the run's graphs are captured; None where it has none."""
    return CudaGraphs(device) if config.cuda_graph and device.type == "cuda" else None
