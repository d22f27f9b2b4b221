"""`rooflight train` and `rooflight replay`: the training loop's command lines.

Every key of the configuration is a flag of `train` (options.py).
"""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import overrides, signature

app = typer.Typer(help="Train a transformer on token files.")

_CONFIG = Annotated[
    Path | None, typer.Option(help="TOML file of training options; its \\[model] table may name a preset.")
]
_PRESET = Annotated[str | None, typer.Option(help="Model preset, in place of the file's model.")]


@app.callback()
def _group() -> None:
    """Makes `train` a command of this app, which would otherwise be the app itself."""


@app.command()
def replay(
    dump: Annotated[Path, typer.Argument(help="A dump: a folder under a run's diverged/.")],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ..., in place of the run's.")] = None,
) -> None:
    """Compute a step again whose loss or gradient was not finite, and say where it stops being so.

    Exit status: 0 when it is not finite again, 1 when it is.
    """
    from .run.replay import replay as again

    result = again(dump, device=device)
    typer.echo("\n".join(result.lines()))
    if not result.reproduced:
        raise typer.Exit(1)


def train(config: Path | None = None, preset: str | None = None, **flags: Any) -> None:
    """Train a model on token files; options given here override those of the configuration file.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint; --resume goes on from it. `none` leaves an option empty, as in
    --grad-clip none. Exit status: 0 at the end, and after SIGTERM or SIGHUP; 130 after Ctrl-C; 2 where something given
    was wrong, 1 where training failed.
    """
    # Before torch is imported: OpenMP threads that spin while they wait cost up to 10x on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .config import TrainConfig, read_toml
    from .distributed import launched
    from .loop import train as run

    given, shape = overrides(flags)
    values = {} if config is None else read_toml(config)
    if preset is not None:
        values["model"] = {"preset": preset}
    if shape:
        model = values.get("model", {})
        values["model"] = {**model, **shape} if isinstance(model, dict) else model  # from_dict refuses that
    result = run(TrainConfig.from_dict(values | given))
    if launched().first:
        loss = ""
        if result.val_loss is not None:
            loss = f"validation loss {result.val_loss:.4f}, {result.val_bits_per_byte:.4f} bits per byte; "
        typer.echo(
            f"{result.step} steps, {result.tokens:,} tokens in {result.seconds:.0f} s ({result.stopped}); {loss}"
            f"{result.tokens_per_second:,.0f} tokens/s, MFU {result.mfu:.1%}; {result.checkpoint}"
        )
    if result.signal == signal.SIGINT:
        raise typer.Exit(130)


_first = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    for name, annotation in (("config", _CONFIG), ("preset", _PRESET))
]
train.__signature__ = signature(*_first)  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
app.command()(train)
