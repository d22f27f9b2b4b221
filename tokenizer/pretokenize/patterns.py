"""The regular expressions whose matches are the pre-tokens."""

from __future__ import annotations

import re
from functools import cache

import regex

# Radford et al. 2019, as spelt in Stanford CS336; GPT-2's own encoder.py spells the contractions out.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_VECTORISED = {
    GPT2_PATTERN,
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
}

# Escapes, sets, quantifiers and all single characters else.
_REGEX_PARTS = re.compile(
    r"\\[pPNx]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|(?P<possessive>\{\d*,?\d*\}\+)|(?P<quantifier>\{\d*,?\d*\}\??|[*+?][+?]?)|.",
    re.DOTALL,
)


def is_vectorised(pattern: str) -> bool:
    """Whether `pattern` is GPT-2's, so that texts may be cut inside documents and no regular expression is run."""
    return pattern in _VECTORISED


@cache
def compile_pattern(pattern: str) -> regex.Pattern:
    """`pattern` compiled by `regex`. Raises ValueError, with the reason, when it does not compile."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from None


def for_oniguruma(pattern: str) -> str:
    """`pattern` as Oniguruma, the engine of Hugging Face's tokenizers, reads it.

    There x{1,3}+ repeats the repetition, where others make it possessive; (?>x{1,3}) says the latter to both.
    """
    written = ""
    groups: list[int] = []  # where in `written` the open groups start
    atom = 0  # ... and the last atom, to which a quantifier belongs
    for match in _REGEX_PARTS.finditer(pattern):
        part = match[0]
        if part == ")" and groups:
            atom = groups.pop()
        elif match.lastgroup == "possessive":
            written = f"{written[:atom]}(?>{written[atom:]}{part[:-1]})"
            continue
        elif match.lastgroup != "quantifier":
            atom = len(written)
            if part == "(":
                groups.append(atom)
        written += part
    return written
