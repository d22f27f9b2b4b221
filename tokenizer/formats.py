"""Files: our own directory, GPT-2's vocab.json and merges.txt, Hugging Face's tokenizer.json, tiktoken's ranks."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .encode_file import atomic, read_json, write_json
from .pretokenize import GPT2_PATTERN, is_vectorised

if TYPE_CHECKING:
    from .bpe import Tokenizer

VOCAB, MERGES, CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
MERGES_FIRST_LINE = "#version: 0.2"


@cache
def byte_to_unicode() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next character from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


@cache
def _unicode_to_byte() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_to_unicode())}


def printable(token: bytes) -> str:
    """`token` with GPT-2's stand-ins, as vocab.json and merges.txt have it."""
    table = byte_to_unicode()
    return "".join([table[byte] for byte in token])


def from_printable(text: str) -> bytes:
    """The inverse of printable(). Raises ValueError on a character that stands for no byte."""
    table = _unicode_to_byte()
    try:
        return bytes([table[character] for character in text])
    except KeyError as error:
        raise ValueError(f"token {text!r}: {error.args[0]!r} is none of GPT-2's 256 stand-ins for bytes") from None


class Parts(NamedTuple):
    """What a file says of a tokenizer: the arguments of Tokenizer()."""

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    special_tokens: list[str]
    pattern: str = GPT2_PATTERN
    ignore_merges: bool = False


# ---------------------------------------------------------------------------------------------- our own, and GPT-2's


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """See Tokenizer.save."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / VOCAB, _printable_vocab(tokenizer))
    lines = [MERGES_FIRST_LINE, *_printable_merges(tokenizer)]
    with atomic(directory / MERGES) as file:
        file.write(("\n".join(lines) + "\n").encode())
    write_json(
        directory / CONFIG,
        {
            "format": "rooflight-tokenizer",
            "version": 1,
            "vocab_size": tokenizer.vocab_size,
            "pattern": tokenizer.pattern,
            "special_tokens": tokenizer.special_tokens,
            "ignore_merges": tokenizer.ignore_merges,
            "hash": tokenizer.hash,
        },
    )


def read_directory(directory: Path) -> tuple[Parts, str]:
    """What save() wrote, and the hash that the tokenizer must have."""
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("format") != "rooflight-tokenizer" or config.get("version") != 1:
        raise ValueError(f"directory: {directory / CONFIG} is no tokenizer of version 1")
    specials = list(config["special_tokens"])
    vocab, merges = read_gpt2(directory / VOCAB, directory / MERGES, specials)
    return Parts(vocab, merges, specials, config["pattern"], config["ignore_merges"]), config["hash"]


def read_gpt2(
    vocab_path: Path, merges_path: Path, special_tokens: Sequence[str]
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """vocab and merges of GPT-2's two files; entries of vocab.json that are special tokens are plain text."""
    vocab = _read_vocab(read_json(vocab_path), set(special_tokens), f"vocab_path: {vocab_path}")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    lines = lines[lines[0].startswith("#version") :]
    return vocab, _read_merges(lines, f"merges_path: {merges_path}")


def _printable_vocab(tokenizer: Tokenizer) -> dict[str, int]:
    special_ids = set(tokenizer.special_tokens.values())
    vocab = {token.decode() if i in special_ids else printable(token): i for i, token in tokenizer.vocab.items()}
    if len(vocab) < len(tokenizer.vocab):
        raise ValueError("special_tokens: one is written as another token is by GPT-2's stand-ins for bytes")
    return vocab


def _printable_merges(tokenizer: Tokenizer) -> list[str]:
    return [f"{printable(left)} {printable(right)}" for left, right in tokenizer.merges]


def _read_vocab(written: Any, specials: set[str], where: str) -> dict[int, bytes]:
    if not isinstance(written, dict) or not all(type(i) is int for i in written.values()):
        raise ValueError(f"{where} holds no JSON object of tokens and ids")
    if len(set(written.values())) < len(written):
        raise ValueError(f"{where} gives one id to two tokens")
    return {i: token.encode() if token in specials else from_printable(token) for token, i in written.items()}


def _read_merges(written: Sequence[str | list[str]], where: str) -> list[tuple[bytes, bytes]]:
    merges = []
    for number, line in enumerate(written):
        parts = line.split(" ") if isinstance(line, str) else line
        if parts == [""]:
            continue
        if len(parts) != 2:
            raise ValueError(f"{where}: merge {number} is {line!r}, expected two tokens")
        merges.append((from_printable(parts[0]), from_printable(parts[1])))
    return merges


# --------------------------------------------------------------------------------------------- Hugging Face tokenizers


def export_hf(tokenizer: Tokenizer, path: Path) -> None:
    """See Tokenizer.export_hf."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    pre_tokenizer: dict[str, Any] = byte_level
    if not is_vectorised(tokenizer.pattern):  # ByteLevel's own expression is GPT-2's
        split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token} | flags
            for token, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
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
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": _printable_vocab(tokenizer),
            "merges": _printable_merges(tokenizer),
        },
    }
    write_json(path, content)


def read_hf(path: Path) -> Parts:
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
    vocab = _read_vocab(model["vocab"], set(added), f"path: {path}")
    vocab |= {i: token.encode() for token, i in added.items()}
    pattern = _read_pre_tokenizer(content.get("pre_tokenizer"), path)
    merges = _read_merges(model["merges"], f"path: {path}")
    return Parts(vocab, merges, list(added), pattern, bool(model.get("ignore_merges")))


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


# ------------------------------------------------------------------------------------------------------------ tiktoken


def export_tiktoken(tokenizer: Tokenizer, path: Path) -> None:
    """See Tokenizer.export_tiktoken."""
    special_ids = set(tokenizer.special_tokens.values())
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in special_ids}
    merges, whole = merges_of_ranks(ranks)
    for rank, (ours, theirs) in enumerate(zip_longest(tokenizer.merges, merges)):
        if ours != theirs:
            raise ValueError(
                f"merges: merge {rank} is {ours!r}, but tiktoken, which goes by the ids of the results, has {theirs!r}"
            )
    if whole and not tokenizer.ignore_merges:
        raise ValueError(
            f"vocab: no merges lead to {whole[0]!r}, which tiktoken takes for a word that is the whole token"
        )
    with atomic(path) as file:
        file.writelines(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def read_tiktoken(path: Path, special_tokens: Sequence[str] | Mapping[str, int], pattern: str) -> Parts:
    """See Tokenizer.from_tiktoken."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one
            raise ValueError(f"path: line {number + 1} of {path} is {line!r}, expected base64 and a rank") from None
    vocab = {rank: token for token, rank in ranks.items()}
    if len(vocab) < len(ranks) or not ranks:
        raise ValueError(f"path: {path} gives one rank to two tokens, or has none")
    if not isinstance(special_tokens, Mapping):
        special_tokens = {token: max(vocab) + 1 + i for i, token in enumerate(special_tokens)}
    for special, i in special_tokens.items():
        if vocab.setdefault(i, special.encode()) != special.encode():
            raise ValueError(f"special_tokens: {special!r} has the id {i}, which is that of {vocab[i]!r}")
    merges, whole = merges_of_ranks(ranks)
    return Parts(vocab, merges, list(special_tokens), pattern, ignore_merges=bool(whole))


def merges_of_ranks(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The merges list that encodes as `ranks` do, and the tokens that no merges lead to.

    tiktoken merges two neighbours whenever their bytes together are a token, the lowest rank first. The last merge that
    makes a token is the same wherever the token comes about: merges beside it do not touch its bytes, and those inside
    it are the ones that its bytes see alone. So one pair for each token, in the order of the ranks, says all; a token
    that does not come about from its own bytes never does, except that tiktoken looks a whole word up before it merges.
    """
    merges, whole = [], []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 1:
            pairs = [ranks.get(left + right) for left, right in pairwise(parts)]
            found = [rank for rank in pairs if rank is not None]
            if not found:
                break
            i = pairs.index(min(found))
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1:
            whole.append(token)
    return merges, whole
