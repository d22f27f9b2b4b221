"""The `rooflight` command: every room's commands under one name.

Here because bench is the top of the import arrow, the one place where all rooms meet. Nothing heavy is imported before
a command runs, so that `rooflight --help` and the tokenizer's commands never wait for torch.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version

# Before torch is imported: busy OpenMP threads that spin-wait cost up to 10x on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from ..tokenizer.commands import app as tokenizer
from ..training.commands import replay, train
from .bench_commands import bench
from .commands import bench_tokenizer, demo, estimate, generate

app = typer.Typer(
    help="Triton kernels for training transformer language models, and everything around them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer.command("bench")(bench_tokenizer)  # here, as the tokenizer imports no other room
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(bench, name="bench")
for command in (train, replay, generate, estimate, demo):
    app.command()(command)


def _version(show: bool) -> None:
    if show:
        print(f"rooflight {installed_version('rooflight')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options that stand before a command."""


def main() -> None:
    """Run the command line; bad input ends in one sentence and status 2, not in a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"rooflight: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
