"""The added tokens of Hugging Face's tokenizer.json: their ids, and which of them are found when.

`tokenizers` finds those that are not `normalized` first, and the others in what these left, normalized. We find all at
once, leftmost first, where the same comes of it; where it need not, as when two of them can overlap, the flag
"normalized" makes us find these in a second pass too. What neither finds alike is refused.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def read_added(
    written: Sequence[dict[str, Any]], vocab: Mapping[str, int], nfc: bool, where: str
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The tokens with their ids, and the flags of those that have any. vocab: the model's. Raises ValueError."""
    tokens = {token["content"]: token for token in written if token["content"]}
    ids = _read_ids(tokens, vocab, where)
    flags = {content: [flag for flag in FLAGS if token.get(flag)] for content, token in tokens.items()}
    late = [content for content, found in flags.items() if "normalized" in found]
    early = [content for content, found in flags.items() if "normalized" not in found]
    for content in late if nfc else ():
        if not unicodedata.is_normalized("NFC", content):
            raise ValueError(f"{where} has the added token {content!r}, which is normalized and not in normal form C")
    for together in late, early:
        _check_neighbours(together, flags, where)
    takers, blank = _takers(tokens, flags), [content for content in tokens if content != content.strip()]
    if not (
        any(_can_hide(first, second) for first, second in product(late, early))
        or (takers and blank)
        or (late and early and any("single_word" in found for found in flags.values()))
        or (nfc and not all(map(_survives_nfc, late)))
    ):
        flags |= {content: [flag for flag in flags[content] if flag != "normalized"] for content in late}
    return ids, {content: found for content, found in flags.items() if found}


def _read_ids(tokens: Mapping[str, dict[str, Any]], vocab: Mapping[str, int], where: str) -> dict[str, int]:
    """The ids that `tokenizers` gives: the model's, and to tokens that it lacks those after its size, in turn."""
    ids: dict[str, int] = {}
    following = len(vocab)
    for content in tokens:
        ids[content] = vocab.get(content, following)
        following += content not in vocab
    token_of = {i: content for content, i in ids.items()}
    for content, i in ids.items():
        if token_of[i] != content:
            raise ValueError(
                f"{where} has the added tokens {content!r} and {token_of[i]!r}, and tokenizers gives both {i}"
            )
    if others := [content for content, token in tokens.items() if token["id"] != ids[content]]:
        first = others[0]
        warnings.warn(
            f"{where} gives the added token {first!r} the id {tokens[first]['id']}, and tokenizers {ids[first]}, as is "
            f"done here too; so it is with {len(others)} of {len(tokens)} added tokens",
            stacklevel=5,
        )
    return ids


def _takers(tokens: Sequence[str] | Mapping[str, Any], flags: Mapping[str, list[str]]) -> list[str]:
    return [content for content in tokens if {"lstrip", "rstrip"} & {*flags[content]}]


def _check_neighbours(together: Sequence[str], flags: Mapping[str, list[str]], where: str) -> None:
    """Raise ValueError where flags decide between tokens that are found in one pass."""
    takers = _takers(together, flags)
    for content in together if takers else ():
        if content[0].isspace() or ("single_word" in flags[content] and content[-1].isspace()):
            raise ValueError(
                f"{where} has the added token {content!r}, of which {takers[0]!r}, with lstrip or rstrip, could take "
                "white space"
            )


def _can_hide(first: str, second: str) -> bool:
    """Whether there are texts with `second` in which it is not found if `first` is, being further left."""
    return second in first or any(second.startswith(first[i:]) for i in range(1, len(first)))


def _survives_nfc(token: str) -> bool:
    """Whether the token is in a text's normal form C where it is in the text, and nowhere else."""
    inside, at_end = _changed_by_nfc()
    return token[-1:] not in at_end and not any(c in inside or unicodedata.combining(c) for c in token)


@cache
def _changed_by_nfc() -> tuple[set[str], set[str]]:
    """Characters that composition makes or takes in, or that stand for others; and those that others are joined to."""
    inside, joined_to = set(map(chr, [*range(0x1100, 0x1200), *range(0xAC00, 0xD7B0)])), set()
    for character in map(chr, range(0x30000)):
        written = unicodedata.decomposition(character)
        if written and written[0] != "<":  # such are compatible, not the same
            first, *second = [chr(int(code, 16)) for code in written.split()]
            inside |= {character, *second} if second else {character, first}
            if second:
                joined_to.add(first)
    return inside, joined_to
