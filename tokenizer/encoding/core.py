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
from .words import PairTable, WordEncoder

# Classes that patterns tell apart, and Unicode's categories of them.
_CLASSES = {
    **{name: (name,) for name in ("Lu", "Ll", "Lt", "Lm", "Lo", "Cc", "Cf")},
    "M": ("Mn", "Mc", "Me"),
    "N": ("Nd", "Nl", "No"),
    "Z": ("Zs", "Zl", "Zp"),
    "P}\\p{S": ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So"),
}
_POSSESSIVE = re.compile(r"([+*?]|\{\d,\d\})\+")


class Core(NamedTuple):
    """encode_word: ids of one word's bytes.  encode_text: of a text; None where the pattern is known by no name."""

    encode_word: Callable[[bytes], list[int]]
    encode_text: Callable[[str], list[int]] | None


def compiled_core(definition: Definition) -> Core | None:
    """The engine for a definition that is_by_rank(); None without tiktoken."""
    try:
        from tiktoken._tiktoken import CoreBPE  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    if not isinstance(definition.pattern, str) or not is_vectorised(definition.pattern):
        # Only words are asked for.
        core, encode_text = CoreBPE(definition.ordinary, {}, "a"), None
    else:
        # Possessive quantifiers change nothing in patterns with a name, and take its engine longer.
        core = CoreBPE(definition.ordinary, {}, _POSSESSIVE.sub(r"\1", definition.pattern))
        encode_text = core.encode_ordinary
    if not definition.ignore_merges:
        definition.forget()
    return Core(core.encode_single_piece, encode_text)


def is_by_rank(definition: Definition) -> bool:
    """Whether the merges list means what ranks do: any two neighbours that make a token, the smallest id first.

    It does if every merge makes a larger id than those before it, and no token's own bytes end as two tokens. For,
    think of the first step at which the two differ: two neighbours make a token, and the list does not name the pair.
    The token's bytes have by then seen the merges that they see alone, so alone they end as these two.
    Without ignore_merges every token must come about, since tiktoken looks a whole word up before it merges.
    """
    tokens, made = definition.tokens, definition.pairs[:, 2]
    is_rank = np.append(tokens.sizes > 0, False)
    is_rank[list(definition.special_tokens.values())] = False
    if (made[1:] <= made[:-1]).any() or not is_rank[definition.byte_ids].all() or not is_rank[made].all():
        return False
    rest = np.flatnonzero(is_rank[:-1] & ~_come_about(definition))
    if not len(rest):
        return True
    lengths = tokens.sizes.take(rest)
    words = WordEncoder(definition, tokens)
    _, counts = words.merge_words(tokens.join(rest), np.cumsum(lengths) - lengths, lengths)
    return bool((counts != 2).all() if definition.ignore_merges else (counts == 1).all())


def _come_about(definition: Definition) -> np.ndarray:
    """Which ids are certainly what the merges make of their own bytes, (vocab_size,) bool.

    Such are bytes; and a merge's token whose two parts are such and were made before, if no other merge is across the
    boundary of the two in time. Which tokens stand there is found backwards: of the two, that which was made last is
    taken apart (of equal ones the right one), and what then stands there must not have been merged before that.
    """
    left, right, made = definition.pairs.T
    ranks = np.arange(len(made), dtype=np.int32)
    table = PairTable(definition.byte_ids, made, definition.tokens)
    table.add(ranks, left, right)
    rank = np.full(definition.vocab_size + 1, -1, np.int32)
    rank[made] = ranks
    first, last = np.zeros((2, len(rank)), np.int32)  # a token's parts
    first[made], last[made] = left, right
    stands = np.maximum(rank.take(left), rank.take(right)) < rank.take(made)
    at = np.flatnonzero(stands)
    x, y = left.take(at), right.take(at)
    while True:
        rank_x, rank_y = rank.take(x), rank.take(y)
        going = np.flatnonzero(np.maximum(rank_x, rank_y) >= 0)  # not two bytes
        if not len(going):
            break
        at, x, y, rank_x, rank_y = (array.take(going) for array in (at, x, y, rank_x, rank_y))
        is_left = rank_x > rank_y
        before = np.where(is_left, rank_x, rank_y + 1)  # the same pair further left is merged earlier
        x, y = np.where(is_left, last.take(x), x), np.where(is_left, y, first.take(y))
        merged = table.ranks(x, y) < before
        stands[at[merged]] = False
        at, x, y = at[~merged], x[~merged], y[~merged]
    certain = np.zeros(len(rank), bool)
    certain[definition.byte_ids] = True
    certain[made[stands]] = True
    while (wrong := made[certain.take(made) & ~(certain.take(left) & certain.take(right))]).size:
        certain[wrong] = False
    return certain[:-1]


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
    for class_, categories in _CLASSES.items():
        then = "".join("".join(members.get(category, "")) for category in categories)
        found += regex.findall(rf"[\p{{{class_}}}]+", then)
    codes = np.sort(np.frombuffer("".join(found).encode("utf-32-le"), np.uint32))
    starts = codes[np.diff(codes, prepend=0) != 1]
    ends = codes[np.diff(codes, append=0) != 1]
    same = "".join(f"{chr(i)}-{chr(j)}" for i, j in zip(starts.tolist(), ends.tolist(), strict=True))
    same += "\u3400-\u4db5\u4e00-\u9fa5\uac00-\ud7a3"  # CJK and Hangul
    same += "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5\U0001f900-\U0001f9ff"
    return re.compile(f"[^\x00-\x7f{same}]")
