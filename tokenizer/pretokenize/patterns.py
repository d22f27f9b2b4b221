"""The regular expressions whose matches are the pre-tokens."""

from __future__ import annotations

from functools import cache

import regex

# Radford et al. 2019, as spelt in Stanford CS336; GPT-2's own encoder.py spells the contractions out.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_VECTORISED = {
    GPT2_PATTERN,
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
}


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
