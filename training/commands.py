"""`rooflight train`: the command line of the training loop. Every key of the configuration is a flag (options.py)."""

from __future__ import annotations

import inspect
import os
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


def train(config: Path | None = None, preset: str | None = None, **flags: Any) -> None:
    """Train a model on token files; options given here override those of the configuration file.

    Ctrl-C saves a checkpoint; --resume goes on from it. `none` leaves an option empty, as in --grad-clip none.
    """
    # Before torch is imported: OpenMP threads that spin while they wait cost up to 10x on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .config import TrainConfig, read_toml
    from .loop import train as run

    given, shape = overrides(flags)
    values = {} if config is None else read_toml(config)
    if preset is not None:
        values["model"] = {"preset": preset}
    if shape:
        model = values.get("model", {})
        values["model"] = {**model, **shape} if isinstance(model, dict) else model  # from_dict refuses that
    result = run(TrainConfig.from_dict(values | given))
    loss = ""
    if result.val_loss is not None:
        loss = f"validation loss {result.val_loss:.4f}, {result.val_bits_per_byte:.4f} bits per byte; "
    typer.echo(
        f"{result.step} steps, {result.tokens:,} tokens in {result.seconds:.0f} s ({result.stopped}); {loss}"
        f"{result.tokens_per_second:,.0f} tokens/s, MFU {result.mfu:.1%}; {result.checkpoint}"
    )
    if result.stopped == "interrupted":
        raise typer.Exit(130)


_first = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    for name, annotation in (("config", _CONFIG), ("preset", _PRESET))
]
train.__signature__ = signature(*_first)  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
app.command()(train)
