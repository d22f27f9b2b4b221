"""Hugging Face's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..definition import Definition, define
from ..files import read_json, write_json
from ..pretokenize import GPT2_PATTERN, Pattern, for_oniguruma, is_gpt2, pretokenize
from .printable import parse_merges, parse_vocab, printable_merges, printable_vocab

# Texts in which regular expressions and their engines are known to differ: contractions in capitals and with a long s,
# long numbers, digits and fractions of other scripts, runs of white space and line ends of every kind, punctuation
# before words and line ends, words of several cases and scripts, combining marks, joiners, controls.
SAMPLES = (
    "They'll see I'M here, DON'T you'VE 'tis '\u017f O'Reilly's l'été ''s",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 x2y22z222 a1b ٣٤٥٦٧ १२३४ ½²³ Ⅻ",
    "a  b   c\t\td \t e\n\nf\r\n\r\n  g\n \n\n h\u00a0i\u3000\u3000j\x85k\u2028l\x0b\x0cm   ",
    "end of line;\n\n// comment\n\t/* more */ !!\n\n...\r\n?!x (y) [z] {w} <tag/> --a -b ''c\n",
    "camelCase HTMLParser XMLHttpRequest ABCdef fooBAR snake_case ǅungla ªº 日本語ABC 日本Def абвГД 한국어x",
    "日本語のテキスト、中文文本。カタカナ・ひらがな ภาษาไทย हिन्दी में क्\u200dष العَرَبِيَّة עִבְרִית",
    "e\u0301a \u0301x !\u0301y ❤\ufe0f 👩\u200d💻👍🏽 🇩🇪 a\u200bb \ufeffc \x00\x01d\x7f \ue000 \U0001d4b3\U0001d4ce",
    "",
    " ",
    "\n",
    "  \n",
    "x \n  ",
)


def export_hf(definition: Definition, path: Path, encode: Callable[[str], list[int]]) -> None:
    """See Tokenizer.export_hf. `encode` gives the ids that the file must give too."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    pre_tokenizer: dict[str, Any] = byte_level
    if not is_gpt2(definition.pattern):  # ByteLevel's own expression is GPT-2's
        parts = (definition.pattern,) if isinstance(definition.pattern, str) else definition.pattern
        splits = [
            {"type": "Split", "pattern": {"Regex": for_oniguruma(part)}, "behavior": "Isolated", "invert": False}
            for part in parts
        ]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*splits, byte_level | {"use_regex": False}]}
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
    _try(content, definition, encode)
    write_json(path, content)


def _try(content: dict[str, Any], definition: Definition, encode: Callable[[str], list[int]]) -> None:
    """Compares the ids on texts of many kinds, where `tokenizers` is installed."""
    with suppress(ImportError):
        from tokenizers import Tokenizer

        peer = Tokenizer.from_str(json.dumps(content))
        for text in SAMPLES:
            ours = pretokenize(text.encode(), definition.pattern).lengths
            if ours.sum() < len(text.encode()):
                continue  # what a custom pattern leaves out is a pre-token there
            # A character of theirs is a byte.
            theirs = [len(word) for word, _ in peer.pre_tokenizer.pre_tokenize_str(text)]
            if theirs != ours.tolist():
                raise ValueError(f"pattern: tokenizers' regular expressions split {text!r} otherwise")
            for end in "", *definition.special_tokens:
                if (ids := peer.encode(text + end).ids) != encode(text + end):
                    raise ValueError(f"pattern: tokenizers gives {text + end!r} other ids, {ids}")


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
    vocab = parse_vocab(model["vocab"], added, f"path: {path}")
    vocab |= {i: token.encode() for token, i in added.items()}
    pattern = _read_pre_tokenizer(content.get("pre_tokenizer"), path)
    merges = parse_merges(model["merges"], model["vocab"], f"path: {path}")
    return define(vocab, merges, added, pattern, bool(model.get("ignore_merges")))


def _read_pre_tokenizer(written: Any, path: Path) -> Pattern:
    match written:
        case {"type": "ByteLevel", "add_prefix_space": False} if written.get("use_regex", True):
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
        } if splits:
            patterns = tuple(pattern for pattern in map(_read_split, splits) if pattern is not None)
            if len(patterns) == len(splits):
                return patterns[0] if len(patterns) == 1 else patterns
    raise ValueError(
        f"path: {path} has the pre_tokenizer {written!r}, "
        "expected ByteLevel without prefix space, alone or after Splits by expressions"
    )


def _read_split(written: Any) -> str | None:
    match written:
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} if not written.get("invert"):
            return pattern
    return None
