"""tiktoken's compiled core as an engine for short texts and single words, where `tiktoken` is installed.

Never needed, and the ids are the same: it is used only for vocabularies whose merges list says what tiktoken's ranks
say, for patterns known by name, and for characters of whose classes every version of Unicode says the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import regex

from ..definition import Definition
from ..pretokenize import is_vectorised
from .long import MergeWords

# Classes that patterns tell apart, and Unicode's categories of them.
_CLASSES: list[tuple[str, tuple[str, ...]]] = [*((name, (name,)) for name in ("Lu", "Ll", "Lt", "Lm", "Lo"))]
_CLASSES += [("M", ("Mn", "Mc", "Me")), ("N", ("Nd", "Nl", "No")), ("Z", ("Zs", "Zl", "Zp"))]
_CLASSES += [("Cc", ("Cc",)), ("Cf", ("Cf",))]
_OTHER = ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So")

_POSSESSIVE = re.compile(r"([+*?]|\{\d,\d\})\+")


class Core(NamedTuple):
    """encode_word: ids of one word's bytes.  encode_text: of a text; None where the pattern is known by no name."""

    encode_word: Callable[[bytes], list[int]]
    encode_text: Callable[[str], list[int]] | None


def compiled_core(definition: Definition) -> Core | None:
    """The engine for a definition that is_by_rank(); None without tiktoken."""
    try:
        from tiktoken import _tiktoken  # type: ignore[attr-defined]  # compiled, without types
    except ImportError:
        return None
    named = definition.pattern if is_vectorised(definition.pattern) else None
    # Possessive quantifiers change nothing in patterns with a name, and take its engine longer. Of any other pattern
    # only words are asked for.
    whole = isinstance(named, str)
    pattern = _POSSESSIVE.sub(r"\1", named) if isinstance(named, str) else "a"
    core = _tiktoken.CoreBPE(definition.ordinary, {}, pattern)
    return Core(core.encode_single_piece, core.encode_ordinary if whole else None)


def is_by_rank(definition: Definition, merge_words: MergeWords) -> bool:
    """Whether the merges list means what ranks do: any two neighbours that make a token, the smallest id first.

    It does if every merge makes a larger id than those before it, and no token's own bytes end as two tokens. For,
    think of the first step at which the two differ: two neighbours make a token, and the list does not name the pair.
    The token's bytes have by then seen the merges that they see alone, so alone they end as these two.
    Without ignore_merges every token must come about, since tiktoken looks a whole word up before it merges.
    """
    ordinary = definition.ordinary
    made = definition.pairs[:, 2]
    if (made[1:] <= made[:-1]).any() or any(bytes([byte]) not in ordinary for byte in range(256)):
        return False
    if np.isin(made, list(definition.special_tokens.values())).any():  # these are not among the ranks
        return False
    lengths = np.fromiter(map(len, ordinary), np.int64, len(ordinary))
    _, counts = merge_words(b"".join(ordinary), np.cumsum(lengths) - lengths, lengths)
    return bool((counts != 2).all() if definition.ignore_merges else (counts == 1).all())


@cache
def disputed() -> re.Pattern:
    """A character of which two libraries may not say the same, having other versions of Unicode.

    Others are: ASCII; what Unicode 3.2 (2002) knew, which Python still has, if its class is the same today; emoji.
    """
    old = unicodedata.ucd_3_2_0
    members: dict[str, list[str]] = {}
    for character in map(chr, [*range(0x80, 0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000)]):
        members.setdefault(old.category(character), []).append(character)
    found = []
    for class_, categories in [*_CLASSES, ("P}\\p{S", _OTHER)]:
        then = "".join("".join(members.get(category, "")) for category in categories)
        found += regex.findall(rf"[\p{{{class_}}}]+", then)
    codes = np.sort(np.frombuffer("".join(found).encode("utf-32-le"), np.uint32))
    starts = codes[np.diff(codes, prepend=0) != 1]
    ends = codes[np.diff(codes, append=0) != 1]
    same = "".join(f"{chr(i)}-{chr(j)}" for i, j in zip(starts.tolist(), ends.tolist(), strict=True))
    same += "\u3400-\u4db5\u4e00-\u9fa5\uac00-\ud7a3"  # CJK and Hangul
    same += "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5\U0001f900-\U0001f9ff"
    return re.compile(f"[^\x00-\x7f{same}]")
