"""The training loop: batches in, checkpoints and a log out."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..model import estimate
from ..model.typed import typed
from .checkpoint import BackgroundSaves, list_checkpoints, load_latest, save_checkpoint, set_aside
from .checkpoint.ranks import Ranks
from .config import TrainConfig
from .data import Batches, end_of_document, open_corpus
from .distributed import World, is_lost_peer, launched, process_group, restarted, tell_launcher
from .files import write_json
from .graph import autocast
from .learner import Learner, choose_ops, evaluate, resolve_device, whose_memory
from .pretrained import require_model
from .run.progress import Display, Records, check_sinks
from .run.replay import find_divergence, is_finite
from .run.result import Interval, Totals, TrainResult
from .run.run_folder import CHECKPOINTS, RunFolder, launch_of
from .run.stopping import (
    LostPeer,
    StopSignals,
    TrainingDiverged,
    TrainingFailed,
    check_memory,
    is_out_of_memory,
    predicted_step,
    what_fits,
)
from .throughput import PeakMemory, device_memory, keep_freed_memory, measure_peak_flops, mfu

_UNTOLD = ("out_dir", "resume", "overwrite")  # changes that a resumed run does not speak of


@typed
def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Train a model as `config` says; see TrainConfig for every option. Writes out_dir/config.json, log.jsonl,
    checkpoints/.

    Started by torchrun, with config.parallel "ddp" or "fsdp", every process calls it: each trains on its rows of the
    batches, and the first writes and tells. Processes that torchrun has restarted go on from the latest checkpoint, if
    their launch had come to have the folder.
    Ctrl-C, SIGTERM or SIGHUP ends the step in hand, saves a checkpoint and returns with stopped "interrupted"; a second
    Ctrl-C raises KeyboardInterrupt at once. console: where progress goes (default: standard error).
    Raises ValueError when data, checkpoint and configuration do not fit together, the batch does not fit the machine or
    out_dir is not the run's to write in (see RunFolder), FileNotFoundError when data is missing; TrainingFailed when
    the run had begun: TrainingDiverged when the loss or the gradient stops being finite, or a full disk, or memory
    (checkpoints stay as they were).
    """
    world = launched()
    # asked before the folder is looked at: each first process is to be counted, and in its second run is no restart
    if world.first and restarted(world) and launch_of(config.out_dir) == world.launch:
        config = replace(config, resume=True, overwrite=False)
    console = (console or Console(stderr=True)) if world.first else Console(quiet=True, force_terminal=False)
    try:
        _refuse_ranks(config, world)
        return _Run(config, console, world).train()
    except LostPeer:
        raise  # what torchrun is to name is the other's error
    except Exception as error:
        tell_launcher(error)
        raise


def _refuse_ranks(config: TrainConfig, world: World) -> None:
    if world.size == 1:
        return
    if config.parallel == "none":
        raise ValueError(
            f"a launcher started this process as one of WORLD_SIZE {world.size}, each of which would train the whole "
            'run by itself: set parallel to "ddp" or "fsdp", or start one process, without the launcher'
        )
    n = config.gradient_accumulation
    if config.batch_size % (world.size * n):
        raise ValueError(
            f"batch_size must be a multiple of {world.size} processes times gradient_accumulation {n}, got "
            f"{config.batch_size}"
        )


class _Run:
    def __init__(self, config: TrainConfig, console: Console, world: World) -> None:
        self.config, self.console, self.world = config, console, world
        self.device = resolve_device(world.device_name(config.device))
        self.dtype = getattr(torch, config.dtype)
        self.ops = whose_memory(choose_ops(config.kernels, self.device), self.device)
        vocab_size = config.model.vocab_size
        self.train_data = open_corpus(config.train_data, vocab_size=vocab_size, name="train_data")
        self.val_data = None
        if config.val_data is not None:
            self.val_data = open_corpus(config.val_data, vocab_size=vocab_size, name="val_data")
        corpora = [self.train_data] if self.val_data is None else [self.train_data, self.val_data]
        for corpus in corpora:
            corpus.check_windows(config.batch_size, config.model.context_length)
        self.eod = end_of_document(corpora, config.eod) if config.documents else None
        if self.val_data and self.val_data.tokenizer_hash != self.train_data.tokenizer_hash:
            raise ValueError(
                f"train_data {self.train_data} and val_data {self.val_data} come from different tokenizers"
            )
        check_sinks(config)
        self.directory = config.out_dir / CHECKPOINTS
        if self.device.type == "cpu":
            check_memory(config, self.ops, device_memory(self.device), world.size)
        self.folder: AbstractContextManager[Any] = nullcontext()
        if world.first:  # which alone touches out_dir, and looks what it holds
            if config.init_from is not None and (config.overwrite or not list_checkpoints(self.directory)):
                require_model("init_from", config.init_from)
            resume, overwrite, launch = config.resume, config.overwrite, world.launch
            self.folder = RunFolder(config.out_dir, resume=resume, overwrite=overwrite, launch=launch, say=self._say)
        self.checkpoint: Path | None = None
        self.saves: BackgroundSaves | None = None
        self.factors: list[float] = []  # of the learning rate, in each step since the checkpoint
        work = estimate(config.model, batch_size=config.batch_size, dtype=config.dtype)
        self.step_tokens = config.batch_size * config.model.context_length
        self.token_flops = (work.forward_flops + work.backward_flops) / self.step_tokens

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def train(self) -> TrainResult:
        with process_group(self.world, self.device), self.folder:
            try:
                self.world.wait()  # the folder may still refuse the first process
                self._begin()
                return self._loop()
            except OSError as error:
                raise TrainingFailed(f"{error}; the last checkpoint is {self.checkpoint or 'none'}") from error
            except Exception as error:
                if self.world.size > 1 and is_lost_peer(error):
                    raise LostPeer(
                        f"process {self.world.rank} lost another of the {self.world.size}, whose own error says why; "
                        f"the last checkpoint is {self.checkpoint or 'none'}"
                    ) from error
                if not is_out_of_memory(error):
                    raise
                capacity = device_memory(self.device)
                self.console.print(predicted_step(self.config, self.ops, self.world.size).table())
                fits = what_fits(self.config, self.ops, capacity, self.world.size)
                raise TrainingFailed(
                    f"out of memory, of {capacity / 1e9:,.1f} GB: {fits}; the last checkpoint is "
                    f"{self.checkpoint or 'none'}"
                ) from error

    def _begin(self) -> None:
        """Model and optimizers as they start, or as the latest whole checkpoint has them."""
        config = self.config
        self.peak_flops = config.peak_flops or measure_peak_flops(self.device, self.dtype)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.memory = PeakMemory(self.device)
        # as the first process sees the folder: a network file system may show others what it was
        found = Ranks().first(lambda: list_checkpoints(self.directory))
        self.learner = Learner(config, self.device, fresh=not found, say=self._say, world=self.world)
        self.step, self.totals = 0, Totals()
        if found:
            self._resume()

    def _resume(self) -> None:
        config = self.config
        model, optimizers = self.learner.model, self.learner.optimizers
        path, self.step, extra, damaged = load_latest(self.directory, model, optimizers)
        if "config" not in extra:
            raise ValueError(f"{path} was not saved by a run, and cannot be gone on from")
        if extra["tokenizer_hash"] != self.train_data.tokenizer_hash:
            raise ValueError(f"{path} was trained on tokens of another tokenizer than {self.train_data}")
        if extra["n_tokens"] != self.train_data.n_tokens:
            raise ValueError(
                f"train_data must be the {extra['n_tokens']:,} tokens that the run began with, {self.train_data} has "
                f"{self.train_data.n_tokens:,}"
            )
        changed = config.changes_since(extra["config"])
        self.totals = Totals(**extra["totals"])
        self.checkpoint = path
        for error in damaged if self.world.first else ():
            self._say(f"warning: {error}; it is set aside as {set_aside(error.path).name}")
        told = [f"{name} {now!r}, was {then!r}" for name, (then, now) in changed.items() if name not in _UNTOLD]
        self._say(f"going on from step {self.step}, {path}" + "".join(f"; {text}" for text in told))

    def _loop(self) -> TrainResult:
        config, totals = self.config, self.totals
        if self.world.first:
            write_json(config.out_dir / "config.json", config.to_dict())
        self.batches = Batches(
            self.train_data,
            config.batch_size,
            config.model.context_length,
            self.device,
            seed=config.seed,
            step=self.step,
            samples=totals.tokens // config.model.context_length,
            order=config.order,
            rows=self.world.rows(config.batch_size),
            micro_batches=config.gradient_accumulation,
            eod=self.eod,
            vocab_size=config.model.vocab_size,
        )
        if config.compile or self.device.type == "cuda":  # Triton's kernels are compiled too
            self._compile()
        self.started = time.perf_counter() - totals.elapsed
        means: list[float] = []  # seconds per step, one mean per log interval
        with ExitStack() as stack:
            keep_to = self.step if self.checkpoint else None
            records = stack.enter_context(Records(config, keep_to=keep_to, silent=not self.world.first))
            signals = stack.enter_context(StopSignals(patient=self.world.size > 1))
            if config.async_checkpoints:  # within the signals: a second one is not to end the last write
                self.saves = stack.enter_context(BackgroundSaves(self._saved))
            display = stack.enter_context(Display(self.console))
            progress, received = self._agreed(signals)
            if self.step == 0 and self.val_data is not None:
                record = {"step": 0, "tokens": 0, **self._validate()}
                records.write(record)
                display.update(progress, record)

            ending = progress >= 1
            interval = Interval(self.device)
            while not ending:
                self._set_rates(progress)
                interval.add(*self.learner.take_step(*next(self.batches)))
                self.step += 1
                totals.tokens += self.step_tokens
                progress, received = self._agreed(signals)
                ending = progress >= 1 or received is not None
                due = progress >= 1 or (self.step % config.eval_every == 0 and not received)
                validating = due and self.val_data is not None
                saving = self.step % config.checkpoint_every == 0 or ending
                if not (saving or validating or self.step % config.log_every == 0):
                    display.advance(progress)
                    continue
                record = self._record(interval)
                means.append(interval.seconds / interval.steps)
                if validating:
                    record |= self._validate()
                records.write(record)
                display.update(progress, record)
                if saving:
                    self._save()
                interval = Interval(self.device)
        totals.elapsed = self._elapsed()
        stopped = "interrupted" if progress < 1 else "steps" if self.step >= config.max_steps else "time"
        return self._result(stopped, received if progress < 1 else None, means)

    def _compile(self) -> None:
        """A forward and a backward before the clock starts, as max_seconds counts training and not compilers."""
        n = self.config.gradient_accumulation
        micro_batch = (x.chunk(n)[0] for x in self.batches.at(self.step))
        with autocast(self.device, self.dtype):
            loss = self.learner.forward(*micro_batch) / n
        loss.backward()
        self.learner.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _progress(self) -> float:
        by_steps = self.step / self.config.max_steps
        return max(by_steps, self._elapsed() / self.config.max_seconds) if self.config.max_seconds else by_steps

    def _agreed(self, signals: StopSignals) -> tuple[float, int | None]:
        """Progress and the signal received, if any: the same in every process, as what they do next hangs on them."""
        progress, received = self.world.largest(self._progress(), signals.received or 0)
        return progress, int(received) or None

    def _set_rates(self, progress: float) -> None:
        # half a step on, so that neither the first step of a warm-up nor the last of a decay is wasted on a zero rate
        factor = self.config.lr_factor(progress + 0.5 / self.config.max_steps)
        self.factors.append(factor)
        self.learner.set_rates(factor)

    def _record(self, interval: Interval) -> dict[str, Any]:
        """What the interval since the last record did; the only place that waits for the device."""
        loss, norm = interval.close()
        if not is_finite(loss, norm):
            text = f"loss {loss}, gradient norm {norm} by step {self.step}, {self._elapsed():.0f} s in"
            raise TrainingDiverged(
                f"{text}: lower the learning rate or lengthen the warm-up; {self._find_divergence()}; the last "
                f"checkpoint is {self.checkpoint or 'none'}"
            )
        self.totals.train_loss = loss
        self.totals.stepping += interval.seconds
        step_seconds = interval.seconds / interval.steps
        first, *others = self.learner.optimizers
        lrs = {type(o).__name__.lower() + "_lr": float(o.param_groups[0]["lr"]) for o in others}
        return {
            "step": self.step,
            "tokens": self.totals.tokens,
            "elapsed": self._elapsed(),
            "loss": loss,
            "grad_norm": norm,
            "lr": float(first.param_groups[0]["lr"]),
            **lrs,
            "tokens_per_second": self.step_tokens / step_seconds,
            "mfu": mfu(self.token_flops * self.step_tokens, step_seconds, self.peak_flops * self.world.size),
        }

    def _find_divergence(self) -> str:
        """Where the steps since the checkpoint stop being finite when they run again: a clause for the error."""
        try:
            if self.saves is not None:
                self.saves.finish()
            self._say(f"not finite by step {self.step}: running again from {self.checkpoint or 'the start'}")
            found = find_divergence(
                self.learner,
                self.checkpoint,
                self.factors,
                self.batches.at,
                out_dir=self.config.out_dir,
                tokenizer_hash=self.train_data.tokenizer_hash,
            )
        except Exception as error:  # the divergence is what the run ends of
            return f"the step could not be found ({error})"
        if found is None:
            return "run again, every step was finite, so that the machine may be at fault"
        step, path = found
        return f"step {step} is the first, which `rooflight replay {path}` computes again"

    def _validate(self) -> dict[str, float]:
        assert self.val_data is not None
        config = self.config
        loss = evaluate(
            self.learner.validated,
            self.val_data,
            batch_size=config.batch_size // (self.world.size * config.gradient_accumulation),
            context_length=config.model.context_length,
            device=self.device,
            dtype=self.dtype,
            max_batches=config.eval_batches and config.eval_batches * self.world.size,  # the same windows
            eod=self.eod,
            vocab_size=config.model.vocab_size,
            world=self.world,
        )
        self.totals.val_loss = loss
        if self.totals.first_val_loss is None:
            self.totals.first_val_loss = loss
        return {"val_loss": loss, "val_bpb": self.val_data.bits_per_byte(loss)}

    def _save(self) -> None:
        self.totals.elapsed = self._elapsed()
        model, optimizers = self.learner.model, self.learner.optimizers
        content: dict[str, Any] = {
            "step": self.step,
            "extra": {
                "totals": asdict(self.totals),
                "config": self.config.to_dict(),
                "tokenizer_hash": self.train_data.tokenizer_hash,
                "n_tokens": self.train_data.n_tokens,
            },
            "tokenizer_hash": self.train_data.tokenizer_hash,
            "keep": self.config.keep_checkpoints,
        }
        if self.saves is None:
            self._saved(save_checkpoint(self.directory, model, optimizers, **content))
        else:
            self.saves.begin(self.directory, model, optimizers, **content)
        self.factors.clear()

    def _saved(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def _result(self, stopped: str, signal: int | None, means: list[float]) -> TrainResult:
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
            tokens=totals.tokens,
            tokens_per_second=totals.tokens / totals.stepping,
            mfu=mfu(self.token_flops * totals.tokens, totals.stepping, self.peak_flops * self.world.size),
            peak_flops=self.peak_flops,
            peak_memory_bytes=self.memory.peak(),
            step_seconds=statistics.median(means) if means else step_seconds,
            stopped=stopped,
            checkpoint=self.checkpoint,
            signal=signal,
        )
