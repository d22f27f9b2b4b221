"""The `rooflight bench` group: measure this machine and hold the estimates against it.

Only typer and the standard library are imported here; what a command needs, it imports when it runs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import Device

bench = typer.Typer(help="Measure this machine and hold the estimates against it.", no_args_is_help=True)

DEFAULT_MODELS = {"cpu": ["tiny"], "cuda": ["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-1b"]}


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM (timeout's) end the block, not the command; whether one did is in the list that is given."""
    stopped: list[int] = []
    # SIGINT too: a shell has its background children ignore it
    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.append(signal.SIGINT)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _progress(console: Any) -> Iterator[Callable[[str], object]]:
    """Tells what is being measured: in one line that changes on a terminal, line by line into a file."""
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield partial(print, flush=True)


@bench.command()
def ceilings(
    device: Device = "auto",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Of products and kernels; bfloat16 when left out. May be given several times."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="The budget: sizes that do not fit into it are left out.")] = 30.0,
) -> None:
    """Measure this machine's rates (products, copies, exponentials, each kernel) and keep them for the estimates.

    They are kept as they come: an interrupt loses nothing.
    """
    from rich.console import Console

    from ..training.loop import resolve_device
    from .rates.ceilings import ceilings_table, keep_ceilings, left_out_lines, load_ceilings, path_of
    from .reports.terminal import show
    from .tune import read_dtypes

    place, dtypes = resolve_device(device), read_dtypes(dtype or ["bfloat16"])
    console, measured = Console(), []
    with _stoppable() as stopped, _progress(console) as progress:
        measured.append(keep_ceilings(place, dtypes=dtypes, seconds=seconds, progress=progress))
    kept = load_ceilings(place)
    if shown := measured[0] if measured else kept:
        show(console, ceilings_table(shown))
        for line in left_out_lines(shown, place):
            console.print(line, soft_wrap=True)
        if shown == kept:
            console.print(f"Kept in {path_of(place)}", soft_wrap=True)
    raise typer.Exit(130 if stopped else 0)


@bench.command()
def validate(
    models: Annotated[list[str] | None, typer.Argument(help="Presets, or TOML files with a \\[model] table.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    context_length: Annotated[int | None, typer.Option(help="Tokens per sequence; the model's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and products.")] = "bfloat16",
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the blocks' matrices.")] = "adamw",
    fp8: Annotated[bool, typer.Option("--fp8", help="The blocks' products in fp8.")] = False,
    device: Device = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Also time the step under torch.compile.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Rounds over all models; the medians count.")] = 1,
    json_path: Annotated[Path, typer.Option("--json", help="The results; the prediction goes beside it.")] = Path(
        "runs/validation.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="Also draw predicted against measured.")] = None,
    seconds: Annotated[float, typer.Option(help="For all models; what does not fit in is left out and named.")] = 125.0,
    counters: Annotated[
        bool, typer.Option("--counters", help="Also read a GPU's counters by ncu: minutes for a large model.")
    ] = False,
) -> None:
    """Predict a training step, write that down, then measure it: every component by itself, and the whole.

    Each model is written to the results as soon as it is measured: an interrupt loses only the one it falls into.
    """
    from rich.console import Console

    from ..training.files import write_json
    from ..training.loop import resolve_device
    from .measure.harness import machine
    from .predict.validate import Validation, read_model
    from .predict.validate import validate as run
    from .ready import require
    from .reports.terminal import show

    require(files=[json_path], figure=plot)
    place = resolve_device(device)
    console = Console()
    predictions = json_path.with_suffix(".predicted.json")
    results: dict[str, Any] = {"kind": "validation", "machine": machine(place), "validations": [], "failures": {}}

    def keep(done: list[Validation], failures: dict[str, str]) -> None:
        results.update(validations=[validation.to_dict() for validation in done], failures=failures)
        write_json(json_path, results)
        told[:] = done

    told: list[Validation] = []
    with _stoppable() as stopped, _progress(console) as progress:
        run(
            dict(read_model(model) for model in models or DEFAULT_MODELS[place.type]),
            place,
            batch_size=batch_size,
            context_length=context_length,
            dtype=dtype,
            optimizer=optimizer,
            fp8=fp8,
            compiled=compiled,
            counted=counters,
            runs=runs,
            seconds=seconds,
            predictions=predictions,
            progress=progress,
            keep=keep,
        )
    for validation in told:
        show(console, *validation.tables())
    for name, why in results["failures"].items():
        console.print(f"{name}: {why}", soft_wrap=True)
    console.print(f"Predicted: {predictions}. Measured: {json_path if told else 'nothing'}.", soft_wrap=True)
    if plot and told:
        from .reports.plots import plot_validation

        plot_validation(results["validations"], plot)
    raise typer.Exit(130 if stopped else 0)


@bench.command()
def step(
    model: Annotated[str, typer.Argument(help="A preset's name, or a TOML file with a \\[model] table.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 16,
    context_length: Annotated[int | None, typer.Option(help="Tokens per sequence; the model's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and products.")] = "bfloat16",
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="Which to take: 'ours, eager', 'ours, graphed', 'ours, compiled', 'plain, eager', 'plain, compiled', "
            "'ours, fp8'."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of steps for each way.")] = 5.0,
    device: Device = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """One training step, ours beside plain PyTorch's in one process, eager and compiled; ours as a CUDA graph too.

    On a CPU ours is compiled where on a GPU it is a graph.
    """
    import torch
    from rich.console import Console

    from ..model import estimate
    from ..training.files import write_json
    from ..training.loop import resolve_device
    from ..training.throughput import measure_peak_flops
    from .measure.harness import machine
    from .predict.side_by_side import as_results, measure_steps, steps_table
    from .predict.validate import read_model
    from .rates.ceilings import load_ceilings
    from .ready import require
    from .reports.terminal import show

    require(files=[json_path])
    place = resolve_device(device)
    console = Console()
    model_name, config = read_model(model)
    length = config.context_length if context_length is None else context_length
    estimate(config, batch_size=batch_size, context_length=length, dtype=dtype)  # ValueError where one cannot be
    kind, rates = getattr(torch, dtype), load_ceilings(place)
    rates = rates if rates and dtype in rates.gemm_flops else None  # nothing is predicted
    title = f"{model_name}, {batch_size} x {length:,}, {dtype}, AdamW"
    done: list[Any] = []
    failures: dict[str, str] = {}

    def keep() -> None:
        if json_path:  # what is measured stays measured, whatever comes
            write_json(json_path, as_results(machine(place), title, done, failures))

    with console.status("the peak rate of a product") as status:
        peak = measure_peak_flops(place, kind)
        for one in measure_steps(
            config, batch_size, length, kind, place,
            ways=way, seconds=seconds, peak_flops=peak, ceilings=rates, progress=status.update, failures=failures,
        ):  # fmt: skip
            done.append(one)
            keep()
    keep()
    if done:
        show(console, steps_table(f"{title}; MFU of {peak / 1e12:,.1f} TFLOP/s, measured", done))
    for name, why in failures.items():
        console.print(f"{name}: {why}", soft_wrap=True)
    raise typer.Exit(0 if done else 1)


@bench.command()
def kernels(
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the measurements here.")] = None,
    device: Device = "auto",
    seconds: Annotated[float, typer.Option(help="Stop after these; what was not measured by then is missing.")] = 510.0,
) -> None:
    """Check and time every kernel case beside its peers: the machine's ceilings first, results before speed."""
    from rich.console import Console

    from ..training.files import write_json
    from ..training.loop import resolve_device
    from .measure.harness import machine
    from .measure.worker import kernels as run
    from .ready import require
    from .reports.kernel_tables import failures_table, kernel_results, table
    from .reports.terminal import show

    if not seconds > 0:
        raise ValueError(f"seconds: expected > 0, got {seconds}")
    require(files=[json_path])
    place = resolve_device(device)
    where = machine(place)
    console = Console()
    console.print("  ".join(f"{key} {value}" for key, value in where.items()), soft_wrap=True)
    heard: list[dict[str, Any]] = []

    def hear(line: dict[str, Any]) -> None:
        if "at" in line:
            status.update(" ".join(line["at"]))
            return
        heard.append(line)
        if json_path and "done" in line:  # what is measured stays measured, whatever comes
            write_json(json_path, kernel_results(where, heard))

    with console.status("starting") as status:
        run(place.type, seconds, hear)
    results = kernel_results(where, heard)
    show(console, table(results["measurements"], results["ceilings"]))
    if results["failures"]:
        show(console, failures_table(results["failures"]))
    if json_path:
        write_json(json_path, results)


@bench.command()
def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="fwd, dkdv or dq; all of them when left out.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head sizes; 64 and 128 when left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32; bfloat16 by default.")] = None,
) -> None:
    """Time attention's tiles and paths on this GPU and keep the fastest for yourself; they are checked first."""
    from rich.console import Console

    from ..kernels.attention.tuned import KERNELS
    from ..training.loop import resolve_device
    from .reports.terminal import show
    from .tune import read_dtypes, require_gpu, save, this_gpu, trials_table
    from .tune import tune as run

    place = resolve_device("auto")
    require_gpu(place)
    console = Console()
    with console.status("") as status:
        trials = run(
            place,
            names=kernel or KERNELS,
            head_dims=head_dim or (64, 128),
            dtypes=read_dtypes(dtype or ["bfloat16"]),
            progress=status.update,
        )
    show(console, trials_table(trials))
    console.print(f"Kept in {save(trials, this_gpu(place))}", soft_wrap=True)


@bench.command()
def paths(
    arch: Annotated[str | None, typer.Option(help="sm_90, gfx942, cpu, ...; this machine's GPU when left out.")] = None,
) -> None:
    """Which path serves which attention call, and why."""
    from rich.console import Console

    from ..training.loop import resolve_device
    from .reports.kernel_tables import paths_table
    from .reports.terminal import show
    from .tune import this_gpu

    device = resolve_device("auto")
    here = this_gpu(device).architecture if device.type == "cuda" else "cpu"
    show(Console(), paths_table(arch or here, device if arch in (None, here) else None))


@bench.command()
def report(
    readme: Annotated[Path, typer.Option(help="The README to write into.")] = Path("README.md"),
    page: Annotated[
        list[Path] | None, typer.Option(help="Also write all tables and plots as one page: Markdown (.md) or HTML.")
    ] = None,
) -> None:
    """Write the tables of bench/results/ into the README, and with --page everything there as a page of its own."""
    from .ready import require
    from .reports.page import write_page
    from .reports.plots import require_plots
    from .reports.report import update_readme

    require(files=[readme, *(page or [])])
    if page:
        require_plots()
    print(f"{readme}: {'updated' if update_readme(readme) else 'already up to date'}")
    for path in page or []:
        write_page(path)
        print(f"{path}: written")
