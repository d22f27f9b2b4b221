"""`rooflight tokenizer train|count|encode|decode|header|inspect` and `rooflight data`: the tokenizer's command line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from .tokenizer import Tokenizer

app = typer.Typer(help="Train, apply and look into byte-level BPE tokenizers.", no_args_is_help=True)

END_OF_TEXT = "<|endoftext|>"

TokenizerPath = Annotated[
    Path, typer.Option("--tokenizer", "-t", help="A folder that `train` wrote, or a Hugging Face tokenizer.json.")
]
SpecialTokens = Annotated[list[str], typer.Option(help="Bounds documents; may be given several times.")]


def _pattern(given: str) -> str:
    """`given`, unless it is a name that no pattern has: as an expression it would match that word alone."""
    from .pretokenize.patterns import PATTERNS

    if not given or (given not in PATTERNS and given.isidentifier()):
        names = ", ".join(PATTERNS)
        raise ValueError(f"pattern: got {given!r}, expected one of {names}, or a regular expression")
    return given


PatternOption = Annotated[
    str, typer.Option(help="gpt2, cl100k, o200k, llama3, ... or a regular expression.", callback=_pattern)
]
Field = Annotated[str, typer.Option(help="Of each line of .jsonl, and the column of .parquet.")]
Shard = Annotated[str, typer.Option(metavar="I/N", help="Of N jobs that share the work, the one numbered I, from 0.")]
Workers = Annotated[int | None, typer.Option(help="Processes; default, one for each CPU core.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder to write the tokenizer to.")],
    text: Annotated[
        list[Path] | None, typer.Argument(help="Text, .jsonl or .parquet; .gz and .zst; folders of them.")
    ] = None,
    counts: Annotated[
        list[Path] | None, typer.Option(help="Instead, files that `count` wrote; may be given several times.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Ids in all: special tokens, 256 bytes, merges.")] = 10_000,
    special_token: SpecialTokens = [END_OF_TEXT],  # noqa: B006
    pattern: PatternOption = "gpt2",
    field: Field = "text",
    max_words: Annotated[int | None, typer.Option(help="Merge only so many of the most frequent words.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tokenizer that OUT holds.")] = False,
    num_workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer on text, or on word counts."""
    import time

    from . import Tokenizer, train_bpe, train_bpe_from_counts
    from .corpus.parts import find_files
    from .files import check_folder, refuse_same_file
    from .formats.directory import FILES

    if bool(text) == bool(counts):
        raise ValueError(f"text: got {'both text and' if text else 'neither text nor'} --counts, expected one of them")
    # (A pipe is read too.)
    files = [file for path in text or [] for file in (find_files([path])[0] if path.is_dir() else [path])]
    check_folder("out", out)
    for name in FILES:
        refuse_same_file("out", out / name, *files, *(counts or []))
        if (out / name).exists() and not overwrite:
            raise ValueError(f"out: {out} holds {name} already, expected another folder or --overwrite")
    start = time.perf_counter()
    options: dict[str, Any] = {"pattern": pattern, "progress": not quiet, "max_words": max_words}
    if counts:
        vocab, merges = train_bpe_from_counts(counts, vocab_size, special_token, **options)
    else:
        vocab, merges = train_bpe(files, vocab_size, special_token, num_workers=num_workers, field=field, **options)
    tokenizer = Tokenizer(vocab, merges, special_token, pattern=pattern)
    tokenizer.save(out)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in counts or files)
    what = f"{len(counts)} files of counts" if counts else f"{size / 1e6:,.1f} MB"
    print(f"{out}: {tokenizer.vocab_size:,} tokens from {what} in {seconds:.1f} s")
    print(f"longest token: {_longest(tokenizer)[0]!r}")


@app.command()
def count(
    inputs: Annotated[list[Path], typer.Argument(help="As of `train`.")],
    out: Annotated[Path, typer.Option(help="File to write the counts to.")],
    special_token: SpecialTokens = [END_OF_TEXT],  # noqa: B006
    pattern: PatternOption = "gpt2",
    field: Field = "text",
    shard: Shard = "0/1",
    num_workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Count the words of a corpus, or of a part of it, for `train --counts`."""
    from . import count_words
    from .files import check_file

    check_file("out", out)
    n_words, n_bytes = count_words(
        inputs,
        out,
        special_token,
        num_workers=num_workers,
        pattern=pattern,
        progress=not quiet,
        field=field,
        shard=_shard(shard),
    )
    print(f"{out}: {n_words:,} different words in {n_bytes / 1e6:,.1f} MB")


def data(
    inputs: Annotated[list[Path], typer.Argument(help="Text, .jsonl or .parquet; .gz and .zst; folders of them.")],
    tokenizer: TokenizerPath,
    out: Annotated[Path, typer.Option(help="Folder to write the token files to; an interrupted run goes on.")],
    eod: Annotated[str, typer.Option(help='Special token behind each document; "" for none.')] = END_OF_TEXT,
    field: Field = "text",
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Special tokens in the text become their ids.")
    ] = False,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a token file, at most.")] = 100_000_000,
    shard: Shard = "0/1",
    num_workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Encode a corpus into token files for `train`, a document's end behind each."""
    import time

    from .corpus.prepare import prepare
    from .files import shown

    began = time.perf_counter()
    prepared = prepare(
        load(tokenizer),
        inputs,
        out,
        eod=eod or None,
        field=field,
        allow_special=allow_special,
        shard_tokens=shard_tokens,
        shard=_shard(shard),
        num_workers=num_workers,
        progress=not quiet,
    )
    total = Counter[str]()
    for header in prepared.headers:
        total.update({name: header[name] for name in ("n_tokens", "n_bytes", "n_documents")})
    print(
        f"{out}: {len(prepared.headers):,} files, {total['n_tokens']:,} tokens of "
        f"{total['n_bytes'] / max(total['n_tokens'], 1):.3f} bytes, {total['n_documents']:,} documents, "
        f"in {time.perf_counter() - began:.1f} s"
    )
    if prepared.n_empty:
        print(f"left out: {prepared.n_empty:,} documents without text")
    if prepared.left_out:
        suffixes = ", ".join(sorted({shown(path.suffix or path.name) for path in prepared.left_out})[:8])
        print(f"left out: {len(prepared.left_out):,} files ({suffixes}); a file that is named is read as text")


def _shard(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal()):
        raise ValueError(f"shard: got {text!r}, expected I/N with 0 <= I < N, as 0/8")
    return int(i), int(n)


@app.command()
def encode(
    tokenizer: TokenizerPath,
    files: Annotated[list[Path] | None, typer.Argument(help="Text files, UTF-8.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Token file to write, of several files their folder; default, FILE with the suffix .bin."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Encode this text instead and print its ids.")] = None,
    offsets: Annotated[bool, typer.Option("--offsets", help="With --text, each id's characters too.")] = False,
    num_workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Encode text files into a token file each (.bin and .bin.json), or --text to the screen."""
    import time

    from .files import check_file, header_path, read_json

    if text is not None and files:
        raise ValueError("file: got both a file and --text, expected one of them")
    loaded = load(tokenizer)
    if text is not None:
        if offsets:
            for i, (start, end) in zip(*loaded.encode(text, offsets=True), strict=True):
                print(f"{i:>7} {start:>5}-{end:<5} {loaded.vocab[i]!r}")
        else:
            print(*loaded.encode(text))
        return
    if not files:
        raise ValueError("file: got neither a file nor --text, expected one of them")
    outs = [out] if out is not None and len(files) == 1 else _beside(files, out)
    for written in outs:
        check_file("out", written)
    for file, written in zip(files, outs, strict=True):
        began = time.perf_counter()
        n = loaded.encode_file(file, written, num_workers=num_workers, progress=not quiet)
        seconds = time.perf_counter() - began
        has_header = header_path(written).exists()  # a pipe has none
        size = read_json(header_path(written))["n_bytes"] if has_header else file.stat().st_size
        print(f"{written}: {n:,} tokens of {size / max(n, 1):.3f} bytes, {size / 1e6 / seconds:.1f} MB/s")


def _beside(files: list[Path], folder: Path | None) -> list[Path]:
    """A token file for each text, in the folder or beside it. All are checked before one is written."""
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out: expected a folder for {len(files)} files, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
    outs = [(file.parent if folder is None else folder) / f"{file.stem}.bin" for file in files]
    for n, (file, out) in enumerate(zip(files, outs, strict=True)):
        if not file.exists():
            raise FileNotFoundError(f"file: there is no {file}")
        if out in outs[:n]:
            raise ValueError(f"out: {out} would be written for {files[outs.index(out)]} and for {file}")
    return outs


@app.command()
def header(
    tokenizer: TokenizerPath,
    files: Annotated[list[Path], typer.Argument(help="Token files without a .bin.json: the ids, little-endian.")],
) -> None:
    """Write the header that a token file of another program lacks (nanoGPT's train.bin): made by this tokenizer.

    The ids are read as uint16, with more than 65,536 tokens as uint32, and each must be one of the tokenizer's.
    """
    import numpy as np

    from .files import FORMAT, VERSION, header_path, token_dtype, write_json

    loaded = load(tokenizer)
    dtype = token_dtype(loaded.vocab_size)
    lengths = np.zeros(1 << 16 if dtype.itemsize == 2 else max(loaded.vocab) + 1, np.int64)
    known = np.zeros(len(lengths), bool)
    for i, token in loaded.vocab.items():
        lengths[i], known[i] = len(token), True
    for file in files:
        if header_path(file).exists():
            raise ValueError(f"file: {header_path(file)} is there already, expected a token file without a header")
        if not (size := file.stat().st_size) or size % dtype.itemsize:
            raise ValueError(f"file: expected ids of {dtype.itemsize} bytes each, got {file} of {size} bytes")
        ids = np.memmap(file, dtype, mode="r")
        n_bytes = 0
        for start in range(0, len(ids), 1 << 20):
            block = ids[start : start + (1 << 20)]
            if block.max() >= len(known) or not known[block].all():
                raise ValueError(f"file: {file} has ids that {tokenizer} has not, expected a file of this tokenizer")
            n_bytes += int(lengths[block].sum())
        content = {"format": FORMAT, "version": VERSION, "dtype": dtype.name, "vocab_size": loaded.vocab_size}
        content |= {"tokenizer_hash": loaded.hash, "n_tokens": len(ids), "n_bytes": n_bytes}
        write_json(header_path(file), content)
        print(f"{header_path(file)}: {len(ids):,} tokens of {n_bytes / len(ids):.3f} bytes")


@app.command()
def decode(
    tokenizer: TokenizerPath,
    file: Annotated[Path | None, typer.Argument(help="Token file (.bin, its .bin.json beside it).")] = None,
    out: Annotated[Path | None, typer.Option(help="Text file to write; default, standard output.")] = None,
    ids: Annotated[str | None, typer.Option(help="Decode these ids instead, as '1 2 3'.")] = None,
) -> None:
    """Decode a token file, or --ids, to text. The bytes are written as they are, valid UTF-8 or not."""
    import sys

    from .files import atomic, header_path, read_token_file, refuse_same_file

    if ids is not None and file is not None:
        raise ValueError("file: got both a file and --ids, expected one of them")
    loaded = load(tokenizer)
    if ids is not None:
        if wrong := [i for i in ids.replace(",", " ").split() if not (i.isdecimal() and int(i) in loaded.vocab)]:
            raise ValueError(f"ids: expected ids of {tokenizer}, as '1 2 3', got {wrong[0]!r}")
        print(loaded.decode([int(i) for i in ids.replace(",", " ").split()]))
        return
    if file is None:
        raise ValueError("file: got neither a file nor --ids, expected one of them")
    if out is not None:
        refuse_same_file("out", out, file, header_path(file))
    tokens, header = read_token_file(file)
    if header["tokenizer_hash"] != loaded.hash:
        raise ValueError(
            f"file: {file} was made by the tokenizer {header['tokenizer_hash'][:12]}, {tokenizer} is {loaded.hash[:12]}"
        )
    blocks = (loaded.decode_bytes(tokens[i : i + (1 << 20)]) for i in range(0, len(tokens), 1 << 20))
    if out is None:
        for block in blocks:
            sys.stdout.buffer.write(block)
    else:
        with atomic(out) as written:
            written.writelines(blocks)


@app.command()
def inspect(
    tokenizer: TokenizerPath,
    file: Annotated[Path | None, typer.Argument(help="A text file to measure the tokenizer on.")] = None,
    text: Annotated[str | None, typer.Option(help="Show how this is split.")] = None,
    longest: Annotated[int, typer.Option(help="So many of the longest tokens.")] = 5,
    megabytes: Annotated[float, typer.Option(help="Of FILE, so much from its beginning.")] = 10.0,
) -> None:
    """Vocabulary, longest tokens, bytes per token on a file, and how a text is split."""
    from rich.console import Console

    loaded = load(tokenizer)
    specials = ", ".join(f"{token} = {i}" for token, i in loaded.special_tokens.items())
    rows = [
        ("vocabulary", f"{loaded.vocab_size:,} tokens, {len(loaded.merges):,} merges"),
        ("special tokens", specials or "none"),
        *(("pattern", part) for part in ([loaded.pattern] if isinstance(loaded.pattern, str) else loaded.pattern)),
        ("hash", loaded.hash),
        *(("longest tokens", f"{len(token)} bytes  {token!r}") for token in _longest(loaded)[:longest]),
    ]
    if file is not None:
        with file.open("rb") as opened:
            data = opened.read(int(megabytes * 1e6))
        n = len(loaded.encode_bytes(data))
        rows.append(("bytes per token", f"{len(data) / max(n, 1):.3f} on {len(data) / 1e6:.1f} MB of {file}"))
    for name, value in rows:
        print(f"{name:<16} {value}")
    if text is not None:
        Console(soft_wrap=True).print(_coloured(loaded, text))


def load(path: Path) -> Tokenizer:
    """Of a folder that `train` wrote, or of a Hugging Face tokenizer.json."""
    from . import Tokenizer

    return Tokenizer.load(path)


def _longest(tokenizer: Tokenizer) -> list[bytes]:
    special_ids = tokenizer.special_tokens.values()
    ordinary = [token for i, token in tokenizer.vocab.items() if i not in special_ids]
    return sorted(ordinary, key=len, reverse=True)


def _coloured(tokenizer: Tokenizer, text: str) -> Text:
    """`text` with each token on a background of its own; a character of several tokens has the first one's."""
    from rich.text import Text

    backgrounds = ("dark_green", "dark_blue", "purple4", "dark_red", "deep_pink4")
    ids, offsets = tokenizer.encode(text, offsets=True)
    coloured = Text()
    shown = 0
    for n, (start, end) in enumerate(offsets):
        coloured.append(text[max(start, shown) : end], style=f"white on {backgrounds[n % len(backgrounds)]}")
        shown = max(shown, end)
    coloured.append(f"\n{len(ids)} tokens: {' '.join(map(str, ids))}")
    return coloured
