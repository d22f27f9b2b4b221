"""Our own directory, and GPT-2's vocab.json and merges.txt, of which it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..definition import PLAIN, Definition, Options, define
from ..files import as_json, read_json, replace_all
from ..pretokenize import Pattern
from .hugging_face import hf_content
from .printable import parse_merges, parse_vocab, printable_merges, printable_vocab

VOCAB, MERGES, CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
HUGGING_FACE = "tokenizer.json"
# What vocab.json and merges.txt say, as arrays, which takes a tenth of the time to read.
TABLES = "tables.npy"
FILES = (VOCAB, MERGES, CONFIG, HUGGING_FACE, TABLES)
MERGES_FIRST_LINE = "#version: 0.2"


def save(definition: Definition, directory: Path, by_rank: bool, encode: Callable[[str], list[int]]) -> None:
    """See Tokenizer.save. by_rank: Tokenizer.is_by_rank.  encode: Tokenizer.encode."""
    # Another one's is not to be replaced.
    if (directory / CONFIG).exists():
        read_config(directory)
    elif (directory / HUGGING_FACE).exists():
        raise ValueError(f"directory: {directory} holds another tokenizer's {HUGGING_FACE}, expected another folder")
    lines = [MERGES_FIRST_LINE, *printable_merges(definition)]
    tokens = definition.tokens
    tables = BytesIO()
    np.save(tables, np.frombuffer(tokens.join(np.flatnonzero(tokens.sizes)), np.uint8))
    np.save(tables, tokens.sizes.astype(np.int32))
    np.save(tables, definition.pairs)
    contents = {
        VOCAB: as_json(printable_vocab(definition, leave_out=True)),
        MERGES: ("\n".join(lines) + "\n").encode(),
        TABLES: tables.getvalue(),
    }
    config = {
        "format": "rooflight-tokenizer",
        "version": 1,
        "tokenizer_class": "PreTrainedTokenizerFast",  # for AutoTokenizer
        "vocab_size": definition.vocab_size,
        "pattern": definition.pattern,
        "special_tokens": definition.special_tokens,
        "ignore_merges": definition.ignore_merges,
        "hash": definition.hash,
        "by_rank": by_rank,
    }
    if definition.options != PLAIN:
        config["options"] = definition.options._asdict()
    config["checksum"] = _checksum(config, contents.values())
    try:
        hugging_face: bytes | None = as_json(hf_content(definition, encode))
    except ValueError:
        hugging_face = None
    directory.mkdir(parents=True, exist_ok=True)
    replace_all(directory, {HUGGING_FACE: hugging_face, **contents, CONFIG: as_json(config)})


def read_directory(directory: Path) -> tuple[Definition, str, bool | None]:
    """What save() wrote, its hash, and Tokenizer.is_by_rank, if known. Raises ValueError when it is another by now."""
    config = read_config(directory)
    specials = config["special_tokens"]
    pattern: Pattern = config["pattern"] if isinstance(config["pattern"], str) else tuple(config["pattern"])
    ignore_merges, options = config["ignore_merges"], Options(**config.get("options", {}))
    has_tables = (directory / TABLES).exists()
    names = VOCAB, MERGES, *([TABLES] if has_tables else [])
    same = config.get("checksum") == _checksum(config, ((directory / name).read_bytes() for name in names))
    if same and has_tables:
        vocab, pairs = _read_tables(directory / TABLES)
        definition = Definition(vocab, pairs, specials, pattern, ignore_merges, options)
        return definition, config["hash"], config["by_rank"]
    vocab, merges = read_gpt2(directory / VOCAB, directory / MERGES, specials)
    vocab |= {i: text.encode() for text, i in specials.items()}
    definition = define(vocab, merges, specials, pattern, ignore_merges, options, all_bytes=False)
    # The files are those that were written, or they mean the same.
    if not same and definition.hash != config["hash"]:
        raise ValueError(f"directory: the files of {directory} were changed after saving: their hash differs")
    return definition, config["hash"], config.get("by_rank") if same else None


def _read_tables(path: Path) -> tuple[dict[int, bytes], np.ndarray]:
    with path.open("rb") as file:
        data, sizes, pairs = BytesIO(np.load(file)), np.load(file), np.load(file)
    vocab = dict(enumerate(map(data.read, sizes.tolist())))
    for i in np.flatnonzero(sizes == 0).tolist():
        del vocab[i]
    return vocab, pairs


def _checksum(config: dict[str, Any], contents: Iterable[bytes]) -> str:
    """sha256 (hex) of all files. It takes a hundredth of the time of the tokenizer's own hash."""
    content = [config[name] for name in ("pattern", "special_tokens", "ignore_merges", "hash")]
    content += [config[name] for name in ("options", "by_rank") if name in config]
    checksum = hashlib.sha256(json.dumps(content).encode())
    for file in contents:
        checksum.update(hashlib.sha256(file).digest())
    return checksum.hexdigest()


def is_ours(directory: Path) -> bool:
    """Whether save() wrote the folder's tokenizer_config.json; Hugging Face's has that name too."""
    path = directory / CONFIG
    config = read_json(path) if path.exists() else None
    return isinstance(config, dict) and config.get("format") == "rooflight-tokenizer"


def read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("format") != "rooflight-tokenizer" or config.get("version") != 1:
        raise ValueError(f"directory: {directory / CONFIG} is no tokenizer of version 1")
    if lacking := [name for name in ("pattern", "special_tokens", "ignore_merges", "hash") if name not in config]:
        raise ValueError(f"directory: {directory / CONFIG} has no {lacking[0]!r}, expected what save() wrote")
    return config


def read_gpt2(
    vocab_path: Path, merges_path: Path, special_tokens: Mapping[str, int | None]
) -> tuple[dict[int, bytes], Callable[[Definition], np.ndarray]]:
    """Vocabulary and merges, as define() takes them, of GPT-2's files; special tokens in vocab.json are plain text."""
    written = read_json(vocab_path)
    vocab = parse_vocab(written, special_tokens, f"vocab_path: {vocab_path}")
    merges = merges_path.read_text(encoding="utf-8")
    if merges.startswith("#version"):
        merges = merges.partition("\n")[2]
    return vocab, lambda definition: parse_merges(merges, written, definition, f"merges_path: {merges_path}")
