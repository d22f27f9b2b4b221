"""Commands on a trained model, ours or a Hugging Face folder: `rooflight generate`, `eval`, `plot`,
`import-hf`, `export-hf`.

Only typer and the standard library are imported here; what a command needs, it imports when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import Device
from .text import END_OF_TEXT, pieces

if TYPE_CHECKING:
    from ..model import Transformer
    from ..tokenizer import Tokenizer

Model = Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", "-t", help="The tokenizer's folder, or a tokenizer.json; by default the model's own."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]

OWN_TOKENIZER = "tokenizer"  # the folder beside a checkpoint's model


def find_tokenizer(model: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of `given`, or else of the model's folder.

    Raises FileNotFoundError where there is none, ValueError where the checkpoint was trained on another's tokens.
    """
    from ..model.hf import is_hf
    from ..tokenizer import Tokenizer
    from ..training.checkpoint import check_tokenizer

    for folder in (given,) if given is not None else (model / OWN_TOKENIZER, model):
        names = ("merges.txt", "tokenizer.json", "")  # or a tokenizer.json by itself
        if not any((folder / name).is_file() for name in names):
            continue
        found = Tokenizer.load(folder)
        if not is_hf(model):
            check_tokenizer(model, found.hash, folder)
        return found
    place = model if given is None else given
    raise FileNotFoundError(f"{place}: no tokenizer there; name its folder with --tokenizer")


def generate(
    model: Model,
    tokenizer: TokenizerFolder = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to go on from; - reads standard input. Without one, a terminal asks for it."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens, as far as the model's context goes.")] = 200,
    stop: Annotated[str | None, typer.Option(help="End at this token, which is not printed: <|endoftext|>.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total mass.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Print text sampled from a trained model, as it is drawn."""
    import sys
    from functools import partial

    import torch

    from ..training.loop import resolve_device
    from ..training.pretrained import open_model

    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 .. 2^64 - 1, got {seed}")
    place = resolve_device(device)
    words = find_tokenizer(model, tokenizer)
    end = None if stop is None else token_named(words, stop)
    sample = partial(
        print_sample, open_model(model, device=place), words, max_new_tokens=max_new_tokens, stop_token=end,
        temperature=temperature, top_k=top_k, top_p=top_p, generator=torch.Generator(place).manual_seed(seed),
    )  # fmt: skip
    if prompt is None and sys.stdin.isatty():
        _ask(sample)
    else:
        sample(sys.stdin.read() if prompt == "-" else "\n" if prompt is None else prompt)


def _ask(sample: Callable[[str], None]) -> None:
    """Prompts from the terminal, one after another, each for itself."""
    with suppress(ImportError):
        importlib.import_module("readline")  # input() then edits lines and remembers them

    typer.echo("A prompt, then Enter; Ctrl-C ends a sample, Ctrl-D all.", err=True)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if text:
            try:
                sample(text)
            except KeyboardInterrupt:
                print()


def token_named(words: Tokenizer, name: str) -> int:
    """The id of a token by its text. Raises ValueError where that is no token, or several."""
    ids = words.encode(name)
    if len(ids) != 1:
        special = ", ".join(words.special_tokens) or "none"
        raise ValueError(f"stop: expected the text of one token (special: {special}), got {name!r}, of {len(ids)}")
    return ids[0]


def print_sample(
    model: Transformer,
    words: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop_token: int | None = None,
    **sampling: Any,
) -> None:
    """Print the prompt and what the model goes on with, as it is drawn, up to the context's end.

    A note on standard error says what the context has no room for: tokens to draw, or the beginning of a prompt that
    fills it, of which the last half of a context is then kept.
    """
    import torch

    from ..model import stream

    ids, limit = words.encode(prompt), model.config.context_length
    if not ids:
        raise ValueError("prompt: expected a text of one token at least, got an empty one")
    given = ids
    if len(ids) >= limit:
        given = ids[-max(1, limit // 2) :]
        typer.echo(f"{len(ids)} tokens of prompt fill the context of {limit}; its last {len(given)} count.", err=True)
    room = limit - len(given)
    if room < max_new_tokens:
        typer.echo(f"{room} new tokens, not {max_new_tokens}: the context of {limit} has no room for more.", err=True)
    tokens = torch.tensor([given], device=model.embedding.weight.device)
    # a vocabulary padded for speed, or with a hole, has ids that stand for no text
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[[i for i in words.vocab if i < len(allowed)]] = True
    drawn = stream(model, tokens, min(room, max_new_tokens), stop_token=stop_token, allowed=allowed, **sampling)
    for piece in pieces(words, ids, drawn, stop_token):
        print(piece, end="", flush=True)
    print()


def evaluate(
    model: Model,
    file: Annotated[Path, typer.Argument(help="Text, UTF-8.")],
    tokenizer: TokenizerFolder = None,
    context_length: Annotated[int | None, typer.Option(min=1, help="Tokens in a window; the model's own.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens a window moves on by; a whole window.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a line.")] = False,
) -> None:
    """Perplexity and bits per byte of a text."""
    import json
    import math

    import torch

    from ..model.evaluate import negative_log_likelihood
    from ..training.loop import resolve_device
    from ..training.pretrained import open_model

    place = resolve_device(device)
    words = find_tokenizer(model, tokenizer)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8: {error}") from None
    ids = words.encode(text)
    if len(ids) < 2:
        raise ValueError(f"{file}: expected two tokens at least, got {len(ids)}")
    loaded = open_model(model, device=place)
    if max(ids) >= loaded.config.vocab_size:
        raise ValueError(f"tokenizer: expected ids below the model's {loaded.config.vocab_size}, got {max(ids)}")
    tokens = torch.tensor(ids, device=place)
    nats = negative_log_likelihood(loaded, tokens, context_length=context_length, stride=stride)
    n_byte = len(words.decode_bytes(ids[1:]))  # the first token is given, not predicted
    result = {
        "tokens": len(ids) - 1,
        "bytes": n_byte,
        "loss": nats / (len(ids) - 1),
        "perplexity": math.exp(nats / (len(ids) - 1)),
        "bits_per_byte": nats / math.log(2) / n_byte,
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(
            f"perplexity {result['perplexity']:.4f}, {result['bits_per_byte']:.4f} bits per byte, loss "
            f"{result['loss']:.4f} nats a token; {result['tokens']:,} tokens, {n_byte:,} bytes"
        )


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Runs: folders with a log.jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure: .png, .svg or .pdf.")] = Path("loss.png"),
    against: Annotated[str, typer.Option(help="step, tokens or time.")] = "step",
) -> None:
    """Draw the loss of runs, in training and in validation, against steps, tokens or time."""
    from .reports.runs import plot_runs

    plot_runs(runs, out, against=against)
    print(f"{out}: written")


def _refuse_held(out: Path, *, but: str = "") -> None:
    """ValueError where the folder holds anything: a run's, a checkpoint's or a model's files are not written over."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if held:
        some = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise ValueError(f"out: {out} holds {some}: expected a new folder, or an empty one{but}")


def import_hf(
    path: Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json, safetensors, tokenizer.json.")],
    out: Out,
) -> None:
    """Make a checkpoint of a Hugging Face folder, with its tokenizer, to generate, evaluate and train from."""
    from ..model import load_hf
    from ..tokenizer import Tokenizer
    from ..training.checkpoint import save_checkpoint

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected a Hugging Face folder, with a config.json")
    _refuse_held(out)
    words, without = None, f"; {path} has no tokenizer.json"
    if (path / "tokenizer.json").is_file():
        try:
            words = Tokenizer.from_hf(path / "tokenizer.json")
        except ValueError as error:
            without = f", without its tokenizer: {error}"
    save_checkpoint(out, load_hf(path), [], step=0, tokenizer_hash=None if words is None else words.hash)
    if words is None:
        typer.echo(f"{out}: the model{without}", err=True)
        return
    words.save(out / OWN_TOKENIZER)
    typer.echo(f"{out}: the model and its tokenizer")


def export_hf(
    checkpoint: Model,
    out: Out,
    tokenizer: TokenizerFolder = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the Hugging Face model that OUT holds.")
    ] = False,
) -> None:
    """Write a checkpoint and its tokenizer for transformers: AutoModelForCausalLM and AutoTokenizer open the folder."""
    from ..model import save_hf
    from ..model.hf import is_hf
    from ..model.hf.weights import write_json
    from ..training.pretrained import open_model

    if not is_hf(out):
        _refuse_held(out)
    elif not overwrite or out.samefile(checkpoint):
        _refuse_held(out, but="" if out.samefile(checkpoint) else ", or --overwrite")
    words = find_tokenizer(checkpoint, tokenizer)
    model = open_model(checkpoint)
    if words.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} tokens, got {words.vocab_size}"
        )
    end = words.special_tokens.get(END_OF_TEXT)
    save_hf(model, out, eos_token=end)
    words.export_hf(out / "tokenizer.json")
    # by the model's type alone, transformers would give a Qwen3 its own pattern
    named = {} if end is None else {"eos_token": END_OF_TEXT}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    typer.echo(f"{out}: the model and its tokenizer")
