"""What a run tells: a JSONL log, TensorBoard and Weights & Biases by option; a progress bar or lines for people."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..config import TrainConfig
from ..files import write_text

PLAIN_SECONDS = 5.0  # at least this long between two plain lines


def check_sinks(config: TrainConfig) -> None:
    """Raise ValueError when an option asks for a package that is not there."""
    for option, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None)):
        # a folder of that name, wandb's own in the working directory say, is found too: without an origin
        if wanted and ((spec := find_spec(option)) is None or spec.origin is None):
            raise ValueError(f"{option} needs the package {option}, which is not installed: pip install {option}")


class Records:
    """Where a run's records go: log.jsonl, and what the options ask for beside it. A context; keep_to as in RunLog.

    silent: nowhere.
    """

    def __init__(self, config: TrainConfig, *, keep_to: int | None, silent: bool = False) -> None:
        self._sinks: list[RunLog | TensorBoard | WandB] = []
        if silent:
            return
        self._sinks.append(RunLog(config.out_dir / "log.jsonl", keep_to=keep_to))
        try:
            if config.tensorboard:
                self._sinks.append(TensorBoard(config.out_dir / "tensorboard", keep_to=keep_to))
            if config.wandb is not None:
                self._sinks.append(WandB(config.wandb, config))
        except BaseException:
            self._close(failed=True)
            raise

    def write(self, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=kind is not None)

    def _close(self, *, failed: bool) -> None:
        for sink in self._sinks:
            sink.close(failed=failed)


class RunLog:
    """One JSON object a line, flushed line by line. `keep_to`: drop the records past that step (those of a lost
    tail)."""

    def __init__(self, path: Path, *, keep_to: int | None = None) -> None:
        kept = [] if keep_to is None or not path.exists() else _records_to(path, keep_to)
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self, *, failed: bool) -> None:
        self._file.close()


def _records_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n") + "\n")  # a crash may have taken the last line's end alone
        except (json.JSONDecodeError, KeyError, TypeError):  # cut off by a crash
            break
    return kept


class TensorBoard:
    """Every number of a record as a scalar of its name. `keep_to` as in RunLog: TensorBoard passes over later ones."""

    def __init__(self, folder: Path, *, keep_to: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard

        self._writer = SummaryWriter(str(folder), purge_step=None if keep_to is None else keep_to + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases in `project`, whose id out_dir/wandb.id keeps: a resumed run goes on in it."""

    def __init__(self, project: str, config: TrainConfig) -> None:
        import wandb

        path = config.out_dir / "wandb.id"
        known = path.read_text(encoding="utf-8").strip() if path.exists() else None
        options = {"project": project, "dir": str(config.out_dir), "config": config.to_dict()}
        try:
            self._run = wandb.init(**options, id=known, resume="allow")
        except Exception as error:  # its own, of keys and networks
            raise ValueError(f"wandb could not begin a run of project {project!r}: {error}") from error
        write_text(path, self._run.id + "\n")

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Display:
    """A live bar with loss, tokens/s, MFU and time left; on anything but a terminal, a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._started = time.perf_counter()
        self._last_line = -float("inf")
        self._first_progress: float | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.fields[left]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[right]}"),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=1.0, left="training", right="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, progress: float) -> None:
        """Move the bar, between records."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(progress, 1.0))

    def update(self, progress: float, record: dict[str, Any]) -> None:
        """Show a log record; validations always get a line of their own."""
        now = time.perf_counter()
        left = self._time_left(progress, now)
        parts = [f"loss {record['loss']:.3f}"] if "loss" in record else []
        if "tokens_per_second" in record:
            parts += [f"{record['tokens_per_second']:,.0f} tokens/s", f"MFU {record['mfu']:.1%}"]
        validation = []
        if "val_loss" in record:
            validation = [f"validation loss {record['val_loss']:.3f}, {record['val_bpb']:.3f} bits per byte"]
        step = f"step {record['step']}"
        if self._bar is not None:
            right = "  ".join([*parts, f"{_clock(left)} left"] if left is not None else parts)
            self._bar.update(self._task, completed=min(progress, 1.0), left=step, right=right)
            if validation:
                self.say("  ".join([f"{step:<12}", *parts[:1], *validation]))
        elif validation or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            timing = [f"{_clock(left)} left"] if left is not None else []
            self.say("  ".join([f"{step:<12}", f"{min(progress, 1.0):4.0%}", *parts, *timing, *validation]))

    def _time_left(self, progress: float, now: float) -> float | None:
        if self._first_progress is None:
            self._first_progress, self._started = progress, now
        done = progress - self._first_progress
        return (now - self._started) / done * max(0.0, 1.0 - progress) if done > 0 else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
