"""Hugging Face's tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..definition import Definition
from ..files import read_json, write_json
from ..pretokenize import GPT2_PATTERN, is_vectorised
from .printable import parse_merges, parse_vocab, printable_merges, printable_vocab


def export_hf(definition: Definition, path: Path) -> None:
    """See Tokenizer.export_hf."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    pre_tokenizer: dict[str, Any] = byte_level
    if not is_vectorised(definition.pattern):  # ByteLevel's own expression is GPT-2's
        split = {"type": "Split", "pattern": {"Regex": definition.pattern}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token} | flags
            for token, i in sorted(definition.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": definition.ignore_merges,
            "vocab": printable_vocab(definition),
            "merges": printable_merges(definition),
        },
    }
    write_json(path, content)


def read_hf(path: Path) -> Definition:
    """See Tokenizer.from_hf."""
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"path: {path} holds no BPE model")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"path: {path} has {name}={model[name]!r}, which byte-level BPE has not")
    if content.get("normalizer"):
        raise ValueError(f"path: {path} has the normalizer {content['normalizer']['type']}, expected none")
    for token in content.get("added_tokens") or ():
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"path: {path} has an added token {token['content']!r} with {flag}, expected none")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    vocab = parse_vocab(model["vocab"], set(added), f"path: {path}")
    vocab |= {i: token.encode() for token, i in added.items()}
    pattern = _read_pre_tokenizer(content.get("pre_tokenizer"), path)
    merges = parse_merges(model["merges"], f"path: {path}")
    return Definition(vocab, merges, added, pattern, bool(model.get("ignore_merges")))


def _read_pre_tokenizer(written: Any, path: Path) -> str:
    match written:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            if written.get("use_regex", True):
                return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as split,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            if not split.get("invert"):
                return pattern
    raise ValueError(
        f"path: {path} has the pre_tokenizer {written!r}, "
        "expected ByteLevel without prefix space, alone or after a Split by an expression"
    )
