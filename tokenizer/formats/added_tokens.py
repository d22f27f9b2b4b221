"""The added tokens of Hugging Face's tokenizer.json, and which of them `tokenizers` finds otherwise than we do.

There those that are not `normalized` are found first, and the others in what these and the normalizer left; ids are
given anew. Here all are found at once, leftmost first, and have the ids of the file. The same comes of both unless two
tokens can overlap or the normalizer can change one: that is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

FLAGS = ("single_word", "lstrip", "rstrip")


def read_added(
    written: Sequence[dict[str, Any]], vocab: Mapping[str, int], nfc: bool, where: str
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The tokens with their ids, and the flags of those that have any. vocab: the model's. Raises ValueError."""
    ids: dict[str, int] = {}
    following = len(vocab)
    for token in written:
        content = token["content"]
        expected = vocab.get(content, ids.get(content, following))
        if token["id"] != expected:
            raise ValueError(
                f"{where} gives the added token {content!r} the id {token['id']}, where tokenizers gives {expected}"
            )
        ids[content] = expected
        following = max(following, expected + 1)
        if nfc and token.get("normalized") and not _survives_nfc(content):
            raise ValueError(f"{where} has the added token {content!r}, which is normalized and NFC could change")
    late, early = (
        [token["content"] for token in written if bool(token.get("normalized")) == is_late] for is_late in (1, 0)
    )
    for first, second in product(late, early):
        if _can_hide(first, second):
            raise ValueError(
                f"{where} has the added tokens {second!r} and, normalized, {first!r}: they can overlap, and tokenizers "
                "finds the former first"
            )
    flags = {token["content"]: [flag for flag in FLAGS if token.get(flag)] for token in written}
    takers = [content for content, found in flags.items() if {"lstrip", "rstrip"} & {*found}]
    for content in ids if takers else ():
        if any(character.isspace() for character in content):
            raise ValueError(
                f"{where} has the added token {content!r}, of which {takers[0]!r}, with lstrip or rstrip, could take "
                "white space"
            )
    return ids, {content: found for content, found in flags.items() if found}


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
