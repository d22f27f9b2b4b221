"""Commands on a trained model, ours or a Hugging Face folder: `rooflight generate`, `eval`, `import-hf`, `export-hf`.

Only typer and the standard library are imported here; what a command needs, it imports when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import Device

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

Model = Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")]
TokenizerFolder = Annotated[
    Path | None, typer.Option("--tokenizer", "-t", help="The tokenizer's folder; by default the model's own.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]

OWN_TOKENIZER = "tokenizer"  # the folder beside a checkpoint's model
END_OF_TEXT = "<|endoftext|>"


def find_tokenizer(model: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of `given`, or else of the model's folder. Raises FileNotFoundError where there is none."""
    from ..tokenizer import Tokenizer

    for folder in (given,) if given is not None else (model / OWN_TOKENIZER, model):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_hf(folder / "tokenizer.json")
        if (folder / "merges.txt").is_file():
            return Tokenizer.load(folder)
    place = model if given is None else given
    raise FileNotFoundError(f"{place}: no tokenizer there; name its folder with --tokenizer")


def generate(
    model: Model,
    tokenizer: TokenizerFolder = None,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total mass.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "auto",
) -> None:
    """Print text sampled from a trained model, as it is drawn."""
    import codecs

    import torch

    from ..model import stream
    from ..training.loop import resolve_device
    from ..training.pretrained import open_model

    place = resolve_device(device)
    words = find_tokenizer(model, tokenizer)
    tokens = torch.tensor([words.encode(prompt)], device=place, dtype=torch.int64)
    loaded = open_model(model, device=place)
    # a vocabulary padded for speed, or with a hole, has ids that stand for no text
    allowed = torch.zeros(loaded.config.vocab_size, dtype=torch.bool)
    allowed[[i for i in words.vocab if i < len(allowed)]] = True
    drawn = stream(
        loaded, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, allowed=allowed,
        generator=torch.Generator(place).manual_seed(seed),
    )  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character's bytes may be several tokens
    print(decoder.decode(words.decode_bytes(tokens[0].tolist())), end="", flush=True)
    for token in drawn:
        print(decoder.decode(words.decode_bytes(token[0].tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


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
    ids = words.encode(file.read_text(encoding="utf-8"))
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
    save_checkpoint(out, load_hf(path), [], step=0)
    if not (path / "tokenizer.json").is_file():
        typer.echo(f"{out}: the model; {path} has no tokenizer.json", err=True)
        return
    try:
        Tokenizer.from_hf(path / "tokenizer.json").save(out / OWN_TOKENIZER)
    except ValueError as error:
        typer.echo(f"{out}: the model, without its tokenizer: {error}", err=True)
        return
    typer.echo(f"{out}: the model and its tokenizer")


def export_hf(
    checkpoint: Model,
    out: Out,
    tokenizer: TokenizerFolder = None,
) -> None:
    """Write a checkpoint and its tokenizer for transformers: AutoModelForCausalLM and AutoTokenizer open the folder."""
    from ..model import save_hf
    from ..model.hf.weights import write_json
    from ..training.pretrained import open_model

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
