"""The `rooflight` command: every room's commands under one name.

Here because bench is the top of the import arrow, the one place where all rooms meet. Nothing heavy is imported before
a command runs, so that `rooflight --help` and the tokenizer's commands never wait for torch.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

# Before torch is imported: busy OpenMP threads that spin-wait cost up to 10x on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from typer.core import TyperCommand

from .. import __version__
from ..tokenizer.commands import app as tokenizer
from ..tokenizer.commands import data
from ..training.commands import replay, train
from .bench_commands import bench
from .commands import bench_tokenizer, demo, estimate
from .model_commands import evaluate, export_hf, generate, import_hf, plot

app = typer.Typer(
    help="Triton kernels for training transformer language models, and everything around them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer.command("bench")(bench_tokenizer)  # here, as the tokenizer imports no other room
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(bench, name="bench")
for command in (data, train, replay, generate, plot, import_hf, export_hf, estimate, demo):
    app.command()(command)
app.command("eval")(evaluate)


class _Command(TyperCommand):
    """Refuses an empty path, an unset variable of the shell's say, which pathlib takes for the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            values, texts = ([x] if not isinstance(x, list | tuple) else x for x in (value, given.get(name)))
            if "" in texts and any(isinstance(one, Path) for one in values):
                raise ValueError(f"{name}: expected a path, got ''")
        return rest


class _Ended(_Command):
    """SIGTERM and SIGHUP end it as Ctrl-C does: no temporary file stays, nor a process of its own."""

    def invoke(self, ctx: Any) -> Any:
        def end(number: int, frame: Any) -> None:
            raise SystemExit(128 + number)  # a shell's status of a command that the signal has ended

        ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
        for number in ending:
            signal.signal(number, end)
        try:
            return super().invoke(ctx)
        finally:
            for number in ending:
                signal.signal(number, signal.SIG_DFL)


for group in (app, tokenizer, bench):
    for registered in group.registered_commands:
        # train has handlers of its own; before they stand, processes that wait for one another die of the signal
        registered.cls = _Command if registered.callback is train else _Ended


def _version(show: bool) -> None:
    if show:
        print(f"rooflight {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    traceback: bool = typer.Option(False, "--traceback", help="On an error, Python's traceback; works anywhere."),
) -> None:
    """Options that stand before a command."""


# What the machine refuses in the middle of the work: another disk, a smaller batch, not another argument.
_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM)


def _status(error: Exception) -> int:
    """1 where the work failed, 2 where what it was asked for is wrong."""
    failed = isinstance(error, RuntimeError | MemoryError) and not isinstance(error, NotImplementedError)
    return 1 if failed or (isinstance(error, OSError) and error.errno in _FAILED) else 2


def _sentence(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        return f"{text}; a smaller batch_size, or more gradient_accumulation, takes less memory"
    if isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("rooflight."):
        return text
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def main() -> None:
    """Run the command line; an error ends in one sentence and a status (_status), not in a traceback."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    shown = "--traceback" in arguments[:end]
    try:
        app([argument for argument in arguments[:end] if argument != "--traceback"] + arguments[end:])
    except Exception as error:
        if shown:
            raise
        print(f"rooflight: {_sentence(error)}", file=sys.stderr)
        sys.exit(_status(error))
    except KeyboardInterrupt:
        sys.exit(130)
