"""Our own directory, and GPT-2's vocab.json and merges.txt, of which it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..definition import PLAIN, Definition, Options, define
from ..files import atomic, read_json, write_json
from .printable import parse_merges, parse_vocab, printable_merges, printable_vocab

VOCAB, MERGES, CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
HUGGING_FACE = "tokenizer.json"
FILES = (VOCAB, MERGES, CONFIG, HUGGING_FACE)
MERGES_FIRST_LINE = "#version: 0.2"


def save(definition: Definition, directory: Path) -> None:
    """See Tokenizer.save."""
    # Another one's is not to be replaced.
    if (directory / CONFIG).exists():
        read_config(directory)
    elif (directory / HUGGING_FACE).exists():
        raise ValueError(f"directory: {directory} holds another tokenizer's {HUGGING_FACE}, expected another folder")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / VOCAB, printable_vocab(definition, leave_out=True))
    lines = [MERGES_FIRST_LINE, *printable_merges(definition)]
    with atomic(directory / MERGES) as file:
        file.write(("\n".join(lines) + "\n").encode())
    config = {
        "format": "rooflight-tokenizer",
        "version": 1,
        "tokenizer_class": "PreTrainedTokenizerFast",  # for AutoTokenizer
        "vocab_size": definition.vocab_size,
        "pattern": definition.pattern,
        "special_tokens": definition.special_tokens,
        "ignore_merges": definition.ignore_merges,
        "hash": definition.hash,
    }
    if definition.options != PLAIN:
        config["options"] = definition.options._asdict()
    write_json(directory / CONFIG, config | {"checksum": _checksum(directory, config)})


def read_directory(directory: Path) -> tuple[Definition, str]:
    """What save() wrote, and its hash. Raises ValueError when it is another by now."""
    config = read_config(directory)
    specials = config["special_tokens"]
    vocab, pairs = read_gpt2(directory / VOCAB, directory / MERGES, specials)
    vocab |= {i: text.encode() for text, i in specials.items()}
    pattern = config["pattern"] if isinstance(config["pattern"], str) else tuple(config["pattern"])
    options = Options(**config.get("options", {}))
    definition = define(vocab, pairs, specials, pattern, config["ignore_merges"], options, all_bytes=False)
    # The files are those that were written, or they mean the same.
    if config.get("checksum") != _checksum(directory, config) and definition.hash != config["hash"]:
        raise ValueError(f"directory: the files of {directory} were changed after saving: their hash differs")
    return definition, config["hash"]


def _checksum(directory: Path, config: dict[str, Any]) -> str:
    """sha256 (hex) of all files. It takes a hundredth of the time of the tokenizer's own hash."""
    content = [config[name] for name in ("pattern", "special_tokens", "ignore_merges", "hash")]
    content += [config["options"]] if "options" in config else []
    checksum = hashlib.sha256(json.dumps(content).encode())
    for name in (VOCAB, MERGES):
        checksum.update(hashlib.sha256((directory / name).read_bytes()).digest())
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
    return config


def read_gpt2(
    vocab_path: Path, merges_path: Path, special_tokens: Mapping[str, int | None]
) -> tuple[dict[int, bytes], np.ndarray]:
    """Vocabulary and pairs of GPT-2's two files; entries of vocab.json that are special tokens are plain text."""
    written = read_json(vocab_path)
    vocab = parse_vocab(written, special_tokens, f"vocab_path: {vocab_path}")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    lines = lines[lines[0].startswith("#version") :]
    return vocab, parse_merges(lines, written, f"merges_path: {merges_path}")
