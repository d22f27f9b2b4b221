"""The loss of training runs, drawn from the logs that they write."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import COLORS, _figure, _save, require_plots

AGAINST = {"step": ("step", "steps"), "tokens": ("tokens", "tokens"), "time": ("elapsed", "seconds")}


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl; `run` may be the log itself. A last line that was cut off is left out.

    Raises FileNotFoundError where there is no log, ValueError on a line that is no record.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no log there, expected a run's folder, with a log.jsonl")
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for n, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or "step" not in record or not _is_drawn(record):
            if n == len(lines) and not line.endswith("\n"):  # a run that is killed in the middle of one
                break
            raise ValueError(f"{path}, line {n}: no record of a step")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no step is in it yet")
    return records


def _is_drawn(record: dict[str, Any]) -> bool:
    """Whether what figures show of a record is numbers."""
    drawn = ("step", "tokens", "elapsed", "loss", "val_loss")
    return all(isinstance(record.get(name), int | float | None) for name in drawn)


def series(records: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Those records that have both."""
    pairs = [(record[x], record[y]) for record in records if record.get(x) is not None and record.get(y) is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def plot_runs(runs: Sequence[Path], path: Path, *, against: str = "step") -> None:
    """A run's training loss as a line, and its validation loss as points, in one colour for each run.

    against: step, tokens or time.  Raises ValueError on another, or without matplotlib; as read_log does for the runs.
    """
    if against not in AGAINST:
        raise ValueError(f"against: expected one of {', '.join(AGAINST)}, got {against!r}")
    require_plots(path.suffix or path.name)
    x, label = AGAINST[against]
    logs = [read_log(run) for run in runs]
    short = os.path.commonpath([run.parent.resolve() for run in runs])
    figure, ((axes,),) = _figure(1, (8, 5))
    for n, (run, records) in enumerate(zip(runs, logs, strict=True)):
        color, name = COLORS[n % len(COLORS)], os.path.relpath(run.resolve(), short)
        axes.plot(*series(records, x, "loss"), color=color, linewidth=1, alpha=0.6, label=f"{name}, training")
        axes.plot(*series(records, x, "val_loss"), "o-", color=color, markersize=4, label=f"{name}, validation")
    axes.set(xlabel=label, ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)
