"""Prediction beside measurement: parameters, FLOPs, memory and time of one training step, component by component.

The prediction is written to disk before anything of it is measured, and every model's measurement as soon as it is
there. All models share a budget of seconds.
"""

from __future__ import annotations

import gc
import statistics
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...model import ModelConfig, estimate
from ...model.ceilings import Ceilings
from ...model.estimate import Estimate
from ...training.config import TrainConfig, model_config
from ...training.files import write_json
from ...training.loop import TrainResult
from ..measure.harness import machine
from ..rates.ceilings import BUSY, ceilings_of, faster_now, require_ceilings, unmeasured
from ..rates.ceilings import SECONDS as CEILINGS_SECONDS
from ..rates.kernel_rates import ops_on
from . import counters
from .compared import ComponentRow, Row, Validation
from .components import Timed, measure_components
from .host import eager_seconds, host_seconds
from .residual import Clock, Residual, busy_seconds, split
from .step import Step, count_flops

SECONDS = 125.0  # for all models: with imports and the model that is running when they end, under 150
STEP_SECONDS = 5.0  # for the median of the whole step, where the budget leaves as much
STEP_SHARE, COMPONENTS_SHARE = 0.15, 0.4  # of a model's seconds, for running; the rest is for making what runs
RUNS = 28  # of a step at the least, or what comes to one: memory, time, a graph, the profiler, and in components
TITLES = {"adamw": "AdamW", "muon": "Muon and AdamW"}
JOINED = {"loss": "logits"}  # one kernel computes both: their rows are measured, and compared, together


def read_model(text: str) -> tuple[str, ModelConfig]:
    """(name, configuration) of a preset, or of a TOML file with a [model] table or the fields themselves.

    Raises ValueError naming what is wrong, FileNotFoundError when the file is not there.
    """
    if not text.endswith(".toml"):
        return text, model_config({"preset": text})
    path = Path(text)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    table = values.get("model", values)
    if not isinstance(table, dict):
        raise ValueError(f"{path}: model: expected a table [model] of fields or of a preset's name, got {table!r}")
    return path.stem, model_config(table)


def predict(
    config: ModelConfig,
    *,
    batch_size: int,
    context_length: int | None,
    dtype: str,
    device: torch.device,
    optimizer: str = "adamw",
    fp8: bool = False,
    ceilings: Ceilings | None = None,
) -> Estimate:
    """The closed form on these ceilings, or on those kept of this machine.

    Raises ValueError when none are kept or an argument is impossible.
    """
    estimated = partial(
        estimate,
        config,
        batch_size=batch_size,
        context_length=context_length,
        dtype=dtype,
        causal="full",  # as torch's FlopCounterMode counts
        ops=ops_on(device)[0],
        optimizer=optimizer,
        fp8=fp8,
    )
    estimated()  # an impossible argument is named before ceilings are asked for
    return estimated(ceilings=ceilings or require_ceilings(device))


def validate(
    models: dict[str, ModelConfig],
    device: torch.device,
    *,
    batch_size: int,
    context_length: int | None = None,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    fp8: bool = False,
    compiled: bool = False,
    counted: bool = False,
    runs: int = 1,
    seconds: float = SECONDS,
    predictions: Path,
    progress: Callable[[str], object] = lambda what: None,
    keep: Callable[[list[Validation], dict[str, str]], object] = lambda done, failures: None,
) -> list[Validation]:
    """Predict every model's step, write that to `predictions` (JSON), then measure them one after another.

    counted: also by the GPU's counters, where there are any.  runs: rounds over all models, of which each quantity's
    median counts.  seconds: for all of it; a model for which they do not suffice is left out.  keep gets, after each
    model, what is measured so far, and {model: why not} of those that do not fit into the seconds or the memory.
    Raises ValueError unless seconds > 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected > 0, got {seconds}")
    deadline = time.perf_counter() + seconds
    predicted = {
        name: predict(
            config,
            batch_size=batch_size,
            context_length=context_length,
            dtype=dtype,
            device=device,
            optimizer=optimizer,
            fp8=fp8,
        )
        for name, config in models.items()
    }
    written = {
        name: e.to_dict() | {"ceilings": None, "eager_seconds": eager_seconds(e), "host_seconds": host_seconds(e)}
        for name, e in predicted.items()
    }
    stands_on = require_ceilings(device).to_dict()  # once, for all of them
    write_json(
        predictions,
        {"kind": "prediction", "machine": machine(device), "ceilings": stands_on, "predictions": written},
    )
    measured: dict[str, list[Validation]] = {name: [] for name in models}
    failures: dict[str, str] = {}
    turns = [name for _ in range(runs) for name in models]
    for i, name in enumerate(turns):
        left, e = deadline - time.perf_counter(), predicted[name]
        if not measured[name] and (name in failures or left < RUNS * (e.seconds or 0.0)):
            failures.setdefault(name, f"left out: {max(0.0, left):.0f} of {seconds:.0f} seconds were left for it")
        elif left > 0:
            try:
                share = left / (len(turns) - i)
                measured[name].append(_measure(name, e, device, compiled, counted, share, progress))
            except torch.OutOfMemoryError:
                failures[name] = _does_not_fit(e)
            _free(device)
        keep([_median(same) for same in measured.values() if same], failures)
    return [_median(same) for same in measured.values() if same]


def _free(device: torch.device) -> None:
    """Give back a model's memory: the next one's tensors are of other sizes."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _does_not_fit(e: Estimate) -> str:
    assert e.ceilings is not None
    memory = e.ceilings.memory_bytes
    has = "" if memory is None else f" of the device's {memory / 2**30:.1f}"
    return f"does not fit into memory: predicted {e.memory_bytes / 2**30:.1f} GiB{has} for a step"


def _median(same: Sequence[Validation]) -> Validation:
    """One validation of several of the same model: what was measured becomes its median."""

    def middle(key: str) -> list[Any]:
        columns = zip(*(getattr(validation, key) for validation in same), strict=True)
        return [replace(rows[0], measured=statistics.median(row.measured for row in rows)) for rows in columns]

    def median(key: str) -> float | None:
        values = [getattr(validation, key) for validation in same if getattr(validation, key) is not None]
        return statistics.median(values) if values else None

    return replace(
        same[0],
        rows=tuple(middle("rows")),
        components=tuple(middle("components")),
        step_seconds=median("step_seconds"),
        host_seconds=median("host_seconds"),
        split=_median_split([validation.split for validation in same if validation.split]),
    )


def _median_split(splits: Sequence[Residual]) -> Residual | None:
    names = ("kernels", "gaps", "clock")
    return Residual(*(statistics.median(getattr(s, name) for s in splits) for name in names)) if splits else None


def _measure(
    name: str,
    e: Estimate,
    device: torch.device,
    compiled: bool,
    counted: bool,
    seconds: float,
    progress: Callable[[str], object],
) -> Validation:
    """One model's step and components in about so many seconds; torch.OutOfMemoryError where the step does not fit."""
    deadline = time.perf_counter() + seconds
    sizes = e.config, e.batch_size, e.context_length, getattr(torch, e.dtype), device
    options: dict[str, Any] = {"optimizer": e.optimizer, "fp8": e.in_fp8 is not None}
    progress(f"{name}: FLOPs, memory")
    step = Step(*sizes, **options)
    rows = [*_counted(e), _memory(e, step.peak_bytes())]
    progress(f"{name}: step")
    step_seconds = min(STEP_SECONDS, STEP_SHARE * seconds)
    with Clock(device) as during:
        whole, host = step.seconds(step_seconds)
    rows += _times(e, eager_seconds(e), whole, f"eager, {_title(e)}")
    if host is not None and (predicted_host := host_seconds(e)) is not None:
        what = "until the host has issued an eager step"
        rows.append(Row("host's part", "ms", predicted_host * 1e3, host * 1e3, what))
    notes = []
    if device.type == "cuda":
        progress(f"{name}: step, as a CUDA graph")
        try:
            replayed, _ = step.seconds(step_seconds, graph=True)
            rows += _times(e, e.seconds, replayed, f"one CUDA graph, {_title(e)}", ", graphed")
        except RuntimeError as error:
            notes.append(f"no CUDA graph of the step: {str(error).strip().splitlines()[0]}")
    busy = busy_seconds(step, device)
    del step
    _free(device)
    with Clock(device) as alone:
        components = measure_components(
            *sizes,
            **options,
            seconds=COMPONENTS_SHARE * max(0.0, deadline - time.perf_counter()),
            progress=lambda what: progress(f"{name}: {what}"),
        )
    side_by_side = tuple(_side_by_side(e, components))
    parted = split(whole, sum(row.measured for row in side_by_side), busy, (during.megahertz, alone.megahertz))
    if compiled:
        progress(f"{name}: step, compiled")
        fused, _ = Step(*sizes, compiled=True, **options).seconds(step_seconds)
        rows += _times(e, e.seconds, fused, f"torch.compile, {_title(e)}", ", compiled")
    assert e.ceilings is not None
    if (times := faster_now(e.ceilings, device, e.dtype)) > BUSY:
        measured = f"its rates of {e.ceilings.date}: `rooflight bench ceilings` measures them anew"
        notes.insert(0, f"this machine is {times:.2f} times as fast now as {measured}")
    missing = unmeasured(e.ceilings, device, e.dtype)
    if missing:
        notes.insert(0, f"no rate was measured of {', '.join(missing)}: the machine's rates stand in")
    if counted and counters.available(device, e.dtype):
        progress(f"{name}: the GPU's counters")
        try:
            rows += _executed(e, *counters.count_step(e, device))
        except RuntimeError as error:
            notes.append(str(error))
    return Validation(name, e, tuple(rows), side_by_side, whole, tuple(notes), host, parted)


def _title(e: Estimate) -> str:
    return TITLES[e.optimizer] + ", fp8" * (e.in_fp8 is not None)


def _executed(e: Estimate, operations: float, moved: float) -> list[Row]:
    """What the kernels really did, and the closed form of it."""
    predicted = sum(e.ledgers["executed"].values()) + sum(c.update.executed_flops for c in e.components)
    least = sum(c.bytes for c in e.components)
    return [
        Row("executed FLOPs", "TFLOP", predicted / 1e12, operations / 1e12, "the tensor cores' counters, by ncu"),
        Row("bytes moved", "GB", least / 1e9, moved / 1e9, "DRAM, by ncu; predicted: the least of each kernel"),
    ]


def _counted(e: Estimate) -> list[Row]:
    parameters, flops = count_flops(e.config, e.batch_size, e.context_length, e.in_fp8 is not None)
    return [
        Row("parameters", "", e.parameters, parameters, "counted in the model"),
        Row("matrix FLOPs", "GFLOP", e.flops / 1e9, flops / 1e9, "torch's FlopCounterMode"),
    ]


def _memory(e: Estimate, measured: int) -> Row:
    what = "allocated by torch, one eager step"
    return Row("peak memory", "MiB", e.memory_bytes / 2**20, measured / 2**20, what)


def _times(e: Estimate, predicted: float | None, seconds: float, what: str, suffix: str = "") -> list[Row]:
    assert predicted is not None
    return [
        Row(f"step time{suffix}", "ms", predicted * 1e3, seconds * 1e3, what),
        Row(f"throughput{suffix}", "k tokens/s", e.tokens / predicted / 1e3, e.tokens / seconds / 1e3, what),
    ]


def _side_by_side(e: Estimate, measured: dict[str, Timed]) -> list[ComponentRow]:
    predicted: dict[str, float] = {}
    for component in e.components:
        name = JOINED.get(component.name, component.name)
        predicted[name] = predicted.get(name, 0.0) + (component.seconds or 0.0)
    titles = {name: f"{name} and {joined}" for joined, name in JOINED.items()}
    return [ComponentRow(titles.get(name, name), predicted[name], measured[name].seconds) for name in predicted]


def validate_step(
    run: TrainConfig, device: torch.device, measured: TrainResult, *, seconds: float = CEILINGS_SECONDS
) -> Validation:
    """Hold the closed form of a run's training step against an eager step of its own, and the run's time against both.

    seconds: for this machine's ceilings, where none are kept.
    """
    # handed on, not read again: a machine without a folder to keep them in has none to read
    ceilings = ceilings_of(device, run.dtype, seconds)
    sizes: dict[str, Any] = {"batch_size": run.batch_size, "context_length": run.model.context_length}
    options: dict[str, Any] = {"optimizer": run.optimizer, "fp8": run.fp8}
    e = predict(run.model, **sizes, dtype=run.dtype, device=device, ceilings=ceilings, **options)
    step = Step(run.model, run.batch_size, run.model.context_length, getattr(torch, run.dtype), device, **options)
    memory = _memory(e, step.peak_bytes())
    alone, _ = step.seconds(STEP_SECONDS)
    rows = [*_counted(e), memory, *_times(e, eager_seconds(e), alone, f"eager, one step alone, {_title(e)}")]
    what = f"the run{', compiled' * run.compile}: with data, clipping, logging"
    rows.append(Row("step time in training", "ms", (e.seconds or 0) * 1e3, measured.step_seconds * 1e3, what))
    return Validation("One training step", e, tuple(rows), (), alone)
