"""Commands: `rooflight estimate`, `demo` and `tokenizer bench`; others in model_commands.py and bench_commands.py.

Only typer and the standard library are imported here; what a command needs, it imports when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU when there is one.")]


def demo(
    text: Annotated[Path | None, typer.Option(help="A file or folder of text; the plays when left out.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for everything the demo makes.")] = Path("runs/demo"),
    seconds: Annotated[
        float | None, typer.Option(help="Seconds of training, over all resumed runs; 180, on a GPU 120.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps at most.")] = 20_000,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 1024,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; an earlier run moves to OUT.previous.")] = False,
) -> None:
    """Train a tokenizer and a model on real text, print a sample, and compare predictions with measurements."""
    from rich.console import Console

    from .demo import DemoConfig, run_demo

    config = DemoConfig(
        text=text, out_dir=out, seconds=seconds, steps=steps, vocab_size=vocab_size, device=device, fresh=fresh
    )
    raise typer.Exit(run_demo(config, Console()))


def estimate(
    config: Annotated[str, typer.Argument(help="A preset's name, or a TOML file with a \\[model] table.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 1,
    context_length: Annotated[int | None, typer.Option(help="Tokens per sequence; the model's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and products.")] = "bfloat16",
    causal: Annotated[str, typer.Option(help="exact: visible pairs only; full: T^2, the usual convention.")] = "exact",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations per block.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that share a step, each with a batch of its own.")] = 1,
    parallel: Annotated[
        str, typer.Option(help="fsdp: parameters and optimizer are sharded; ddp: each has all.")
    ] = "fsdp",
    reshard: Annotated[bool, typer.Option(help="fsdp frees a block's weights between its passes.")] = True,
    link: Annotated[
        float | None, typer.Option(help="GB/s that a device can send: is the link or compute the bound?")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the blocks' matrices.")] = "adamw",
    fp8: Annotated[bool, typer.Option("--fp8", help="The blocks' products in fp8, as a run with fp8 = true.")] = False,
    ops: Annotated[
        str | None,
        typer.Option(help="Whose memory: triton (on a GPU), cpu or eager; by default as the ceilings were measured."),
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="One row a line, however wide.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw where the FLOPs go, small to XL and by length.")] = None,
) -> None:
    """Parameters, FLOPs, bytes and memory per component, in closed form; times too, once `bench ceilings` has run."""
    import json

    from rich.console import Console

    from ..model import estimate as closed_form
    from ..training.loop import resolve_device
    from .predict.validate import read_model
    from .rates.ceilings import load_ceilings
    from .rates.kernel_rates import ops_on
    from .ready import require
    from .reports.terminal import show

    require(figure=plot)
    if link is not None and not (0 < link < float("inf") and gpus > 1):
        raise ValueError(f"--link: expected GB/s > 0, between 2 --gpus or more, got {link:g} and --gpus {gpus}")
    name, model = read_model(config)
    place = resolve_device("auto")
    measured = load_ceilings(place)
    if measured and dtype not in measured.gemm_flops:
        measured = None  # of other dtypes alone: the table says how to measure this one
    result = closed_form(
        model,
        batch_size=batch_size,
        context_length=context_length,
        dtype=dtype,
        causal=causal,
        checkpointing=checkpointing,
        gpus=gpus,
        parallel=parallel,
        reshard=reshard,
        link=None if link is None else link * 1e9,
        ceilings=measured,
        ops=ops or (ops_on(place)[0] if measured else "triton"),
        optimizer=optimizer,
        fp8=fp8,
    )
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        show(Console(), result.table(), wide=wide)
    if plot:
        from .reports.plots import plot_shares

        plot_shares(name, model, plot)


def bench_tokenizer(
    file: Annotated[Path, typer.Argument(help="Text file, UTF-8, its documents separated by <|endoftext|>.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", "-t", help="Encode with this one, and train none.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens to train, on the whole of FILE.")] = 10_000,
    megabytes: Annotated[float, typer.Option(help="Of FILE, so much from its beginning is encoded.")] = 20.0,
    repeats: Annotated[int, typer.Option(help="Runs of each, in turns, of which the fastest counts.")] = 3,
    peer: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes; default, one for each CPU core.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Results file to write.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line for each run.")] = False,
) -> None:
    """Training, encoding and decoding beside whichever peers are installed, side by side in one table.

    Trainers: tokenizers, gigabpe, gigatoken, rustbpe, bpeasy, sentencepiece. Encoders: tiktoken, tokenizers, gigatoken;
    their ids must be ours, or no speed is shown.
    """
    import json

    from rich.console import Console

    from ..tokenizer.commands import load
    from ..tokenizer.files import atomic
    from ..tokenizer.workers import check_num_workers
    from .cases.tokenizer import compare, results, table
    from .cases.tokenizer_peers import END_OF_TEXT, coders, trainers
    from .ready import require
    from .reports.terminal import show

    require(files=[json_path])
    workers = check_num_workers(num_workers)
    with file.open("rb"):
        pass
    known = sorted({*trainers(), *coders()})
    if wrong := [name for name in peer or [] if name not in known]:
        raise ValueError(f"peer: expected one of {', '.join(known)}, got {wrong[0]!r}")
    if not 0 < megabytes < float("inf"):
        raise ValueError(f"megabytes: expected a finite number > 0, got {megabytes}")
    if repeats < 1:
        raise ValueError(f"repeats: expected a whole number >= 1, got {repeats}")
    loaded = None if tokenizer is None else load(tokenizer)
    if loaded is None and vocab_size < 257:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least 257: 256 bytes and {END_OF_TEXT}")
    vocab_size = vocab_size if loaded is None else loaded.vocab_size
    rows = compare(
        file,
        vocab_size=vocab_size,
        tokenizer=loaded,
        encode_bytes=int(megabytes * 1e6),
        num_workers=workers,
        repeats=repeats,
        only=peer or None,
        told=lambda line: None if quiet else typer.echo(line, err=True),
    )
    title = f"{file}, {file.stat().st_size / 1e6:,.1f} MB, {vocab_size:,} tokens, {workers} processes"
    show(Console(), table(rows, title))
    if json_path is not None:
        content = results(rows, file, vocab_size=vocab_size, encode_bytes=int(megabytes * 1e6), num_workers=workers)
        with atomic(json_path) as written:
            written.write(json.dumps(content, indent=1).encode() + b"\n")
