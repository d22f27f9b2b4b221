"""Hugging Face's tokenizer.json."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..definition import Definition, Options, define
from ..files import read_json, write_json
from ..pretokenize import GPT2_PATTERN, PATTERNS, Pattern, for_oniguruma, is_gpt2, is_vectorised, pretokenize
from .added_tokens import FLAGS, read_added
from .large_json import WrittenVocab, read_apart
from .printable import check_vocab, parse_merges, parse_vocab, printable_merges, printable_vocab

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
    write_json(path, hf_content(definition, encode))
    config = path.with_name("tokenizer_config.json")
    if path.with_name("config.json").exists() and path.name == "tokenizer.json" and not config.exists():
        # beside a model, by whose type alone transformers may choose a tokenizer with a pattern of its own
        write_json(config, {"tokenizer_class": "PreTrainedTokenizerFast"})


def hf_content(definition: Definition, encode: Callable[[str], list[int]]) -> dict[str, Any]:
    """The JSON of a tokenizer.json, tried. Raises ValueError as Tokenizer.export_hf does."""
    options = definition.options
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": options.prefix_space,
        "trim_offsets": False,
        "use_regex": True,
    }
    pre_tokenizer: dict[str, Any] = byte_level
    if not is_gpt2(definition.pattern):  # ByteLevel's own expression is GPT-2's
        parts = (definition.pattern,) if isinstance(definition.pattern, str) else definition.pattern
        # What a single expression of no known pattern leaves over belongs to no pre-token.
        removes = isinstance(definition.pattern, str) and not is_vectorised(definition.pattern)
        how = {"behavior": "Removed", "invert": True} if removes else {"behavior": "Isolated", "invert": False}
        splits = [{"type": "Split", "pattern": {"Regex": for_oniguruma(part)}} | how for part in parts]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*splits, byte_level | {"use_regex": False}]}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True}
            | {flag: flag in options.flags.get(token, ()) for flag in FLAGS}
            for token, i in sorted(definition.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "NFC"} if options.nfc else None,
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
    return content


def _try(content: dict[str, Any], definition: Definition, encode: Callable[[str], list[int]]) -> None:
    """Compares the ids on texts of many kinds, where `tokenizers` is installed."""
    with suppress(ImportError):
        from tokenizers import Tokenizer

        peer = Tokenizer.from_str(json.dumps(content))
        missing = definition.tokens.missing()
        for text in SAMPLES:
            if missing and missing.search(text.encode()):
                continue  # tokenizers leaves such bytes out
            if definition.options.prefix_space or definition.options.nfc:
                text = f" {unicodedata.normalize('NFC', text)}"
            ours = pretokenize(text.encode(), definition.pattern).lengths
            # A character of theirs is a byte.
            theirs = [len(word) for word, _ in peer.pre_tokenizer.pre_tokenize_str(text)]
            if theirs != ours.tolist():
                raise ValueError(f"pattern: tokenizers' regular expressions split {text!r} otherwise")
            for end in "", *definition.special_tokens:
                if (ids := peer.encode(text + end).ids) != encode(text + end):
                    raise ValueError(f"pattern: tokenizers gives {text + end!r} other ids, {ids}")


def read_hf(path: Path) -> Definition:
    """See Tokenizer.from_hf."""
    with suppress(ValueError):  # which is then raised of what the parser reads
        if content := read_apart(path.read_bytes()):
            return _definition(content, path)
    return _definition(read_json(path), path)


def _definition(content: Any, path: Path) -> Definition:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"path: {path} holds no BPE model")
    if not isinstance(model["merges"], str if isinstance(model.get("vocab"), WrittenVocab) else list):
        raise ValueError(f"path: {path} has merges={model['merges']!r:.80}, expected a list")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"path: {path} has {name}={model[name]!r}, which byte-level BPE has not")
    nfc = _read_normalizer(content.get("normalizer"), path)
    pattern, prefix_space = _read_pre_tokenizer(content.get("pre_tokenizer"), path)
    check_vocab(model.get("vocab"), f"path: {path}")
    added, flags = read_added(content.get("added_tokens") or (), model["vocab"], nfc, f"path: {path}")
    vocab = parse_vocab(model["vocab"], added, f"path: {path}")
    vocab |= {i: token.encode() for token, i in added.items()}
    options = Options(nfc, prefix_space, flags)

    def pairs(definition: Definition) -> np.ndarray:
        return parse_merges(model.pop("merges"), model["vocab"], definition, f"path: {path}")

    return define(vocab, pairs, added, pattern, bool(model.get("ignore_merges")), options, all_bytes=False)


def _read_normalizer(written: Any, path: Path) -> bool:
    """Whether it is NFC."""
    match written:
        case None | {"type": "Sequence", "normalizers": []}:
            return False
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return True
    raise ValueError(f"path: {path} has the normalizer {written!r}, expected NFC or none")


def _read_pre_tokenizer(written: Any, path: Path) -> tuple[Pattern, bool]:
    """The pattern, and whether a space goes before a text."""
    match written:
        case {"type": "Sequence", "pretokenizers": [*splits, {"type": "ByteLevel"} as byte_level]}:
            pass
        case {"type": "ByteLevel"} as byte_level:
            splits = []
        case _:
            splits, byte_level = [None], {}
    parts = [_read_split(split) for split in splits]
    if byte_level.get("use_regex", True):
        parts.append(GPT2_PATTERN)
    prefix_space = bool(byte_level.get("add_prefix_space", True))
    # (A prefix space would go before each part.)
    if not parts or None in parts or (prefix_space and splits):
        raise ValueError(
            f"path: {path} has the pre_tokenizer {written!r}, expected ByteLevel, alone or after Splits by expressions"
        )
    patterns = tuple(part for part in parts if part is not None)
    # One that matches all there is leaves nothing over; else what it leaves is a pre-token as well, unless removed.
    removed = any(split.get("behavior") == "Removed" for split in splits)
    if len(patterns) == 1 and (removed or is_vectorised(patterns[0])):
        return patterns[0], prefix_space
    if removed:
        raise ValueError(f"path: {path} has the pre_tokenizer {written!r}, expected Splits that remove nothing")
    return patterns, prefix_space


def _read_split(written: Any) -> str | None:
    """A regular expression that splits as it does; None where there is none."""
    match written:
        case {"type": "Digits"}:
            return r"\p{N}" if written.get("individual_digits") else r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": found}} | {"type": "Split", "pattern": {"String": found}}:
            expression = found if "Regex" in written["pattern"] else re.escape(found)
            behavior, invert = written.get("behavior"), written.get("invert", False)
            if behavior == "Isolated" or (behavior == "Removed" and invert and "Regex" in written["pattern"]):
                ours = (part for part in PATTERNS.values() if isinstance(part, str))
                return next((part for part in ours if for_oniguruma(part) == expression), expression)
    return None
