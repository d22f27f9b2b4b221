"""`rooflight train` and `rooflight replay`: the command lines of the training loop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a transformer on token files.")


@app.callback()
def _group() -> None:
    """Makes `train` a command of this app, which would otherwise be the app itself."""


@app.command()
def replay(
    dump: Annotated[Path, typer.Argument(help="A dump: a folder under a run's diverged/.")],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ..., in place of the run's.")] = None,
) -> None:
    """Compute a step again whose loss or gradient was not finite, and say where it stops being so.

    Exit status: 0 when it is not finite again, 1 when it is, 2 where DUMP is none.
    """
    from .replay import replay as again

    try:
        result = again(dump, device=device)
    except (ValueError, OSError) as error:
        typer.echo(f"rooflight replay: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo("\n".join(result.lines()))
    if not result.reproduced:
        raise typer.Exit(1)


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of training options; its \\[model] table may name a preset.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Model preset, in place of the file's model.")] = None,
    train_data: Annotated[Path | None, typer.Option(help="Token file to train on.")] = None,
    val_data: Annotated[Path | None, typer.Option(help="Token file to validate on.")] = None,
    out_dir: Annotated[Path | None, typer.Option(help="Folder for log and checkpoints.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Micro-batches per step.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="End after so many seconds of training.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="muon or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="AdamW's peak learning rate.")] = None,
    muon_lr: Annotated[float | None, typer.Option(help="Muon's peak learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="trapezoid, cosine or constant.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, triton or eager.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and batches.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on from the latest checkpoint.")
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite", help="Begin anew in a folder that holds something, moved to previous-<n> in it."),
    ] = None,
) -> None:
    """Train a model on token files; options given here override those of the configuration file.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint; --resume goes on from it. Exit status: 0 at the end, and after a
    SIGTERM or SIGHUP; 130 after Ctrl-C; 2 where something given was wrong, 1 where training failed.
    """
    overrides = {k: v for k, v in locals().items() if k not in ("config", "preset") and v is not None}
    # Before torch is imported: OpenMP threads that spin while they wait cost up to 10x on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .config import TrainConfig
    from .loop import train as run
    from .stopping import TrainingFailed

    if preset is not None:
        overrides["model"] = {"preset": preset}
    try:
        options = TrainConfig.from_dict(overrides) if config is None else TrainConfig.from_toml(config, **overrides)
        result = run(options)
    except (ValueError, OSError, TrainingFailed) as error:
        typer.echo(f"rooflight train: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, TrainingFailed) else 2) from None
    loss = ""
    if result.val_loss is not None:
        loss = f"validation loss {result.val_loss:.4f}, {result.val_bits_per_byte:.4f} bits per byte; "
    typer.echo(
        f"{result.step} steps, {result.tokens:,} tokens in {result.seconds:.0f} s ({result.stopped}); {loss}"
        f"{result.tokens_per_second:,.0f} tokens/s, MFU {result.mfu:.1%}; {result.checkpoint}"
    )
    if result.signal == signal.SIGINT:
        raise typer.Exit(130)
