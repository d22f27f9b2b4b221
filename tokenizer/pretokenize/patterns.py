"""The regular expressions whose matches are the pre-tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from typing import cast

import regex

from .neighbours import CL100K, DEEPSEEK, LLAMA3, O200K, QWEN2, Neighbours

# One regular expression, or several: each splits what those before it left, and what none matches is a pre-token too.
Pattern = str | tuple[str, ...]

# Radford et al. 2019, as spelt in Stanford CS336; GPT-2's own encoder.py spells the contractions out.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By the name of the model or encoding that it is of, as its authors spell it.
PATTERNS: dict[str, Pattern] = {
    "gpt2": GPT2_PATTERN,
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    "o200k": _O200K,
    "llama3": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "deepseek": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


_SPELLINGS = (
    ("(?>\\p{N}{1,3})", "\\p{N}{1,3}"),
    ("++", "+"),
    ("?+", "?"),
    ("*+", "*"),
    ("}+|", "}|"),
    ("'(?i:[sdmt]|ll|ve|re)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    ("'s|'t|'re|'ve|'m|'ll|'d|", "'(?:[sdmt]|ll|ve|re)|"),
    (r"|\s*[\r\n]+|", r"|\s*[\r\n]|"),
    (r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"),
)


def _plain(pattern: Pattern) -> Pattern:
    """One spelling of these patterns for all that there are: without possessive quantifiers, which change nothing."""
    parts = [pattern] if isinstance(pattern, str) else pattern
    plain = tuple(reduce(lambda part, spelling: part.replace(*spelling), _SPELLINGS, part) for part in parts)
    return plain[0] if isinstance(pattern, str) else plain


def _plain_text(pattern: str) -> str:
    return cast(str, _plain(pattern))


# GPT-2's, and as tiktoken has it: an expression for the end of a text takes nothing that the next one would not.
_GPT2 = {_plain(GPT2_PATTERN), _plain_text(GPT2_PATTERN).replace(r"|\s+(?!\S)", r"|\s+$|\s+(?!\S)")}
_RULES = {
    _plain(PATTERNS["cl100k"]): CL100K,
    _plain(_LLAMA3): LLAMA3,
    _plain_text(_LLAMA3).replace("{1,3}", "{1,2}"): LLAMA3._replace(max_digits=2),  # nanochat's
    _plain(PATTERNS["qwen2"]): QWEN2,
    _plain(_O200K): O200K,
    _plain(PATTERNS["deepseek"]): DEEPSEEK,
}

# Escapes, sets, quantifiers and all single characters else.
_REGEX_PARTS = re.compile(
    r"\\[pPNx]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|(?P<possessive>\{\d*,?\d*\}\+)|(?P<quantifier>\{\d*,?\d*\}\??|[*+?][+?]?)|.",
    re.DOTALL,
)


def resolve(pattern: str | Sequence[str]) -> Pattern:
    """The pattern of that name, or `pattern` itself. Raises ValueError, with the reason, when it does not compile."""
    pattern = PATTERNS.get(pattern, pattern) if isinstance(pattern, str) else tuple(pattern)
    compile_pattern(pattern)
    return pattern


@cache
def is_gpt2(pattern: Pattern) -> bool:
    return _plain(pattern) in _GPT2


def is_vectorised(pattern: Pattern) -> bool:
    """Whether `pattern` needs no regular-expression engine, so that texts may be cut inside documents."""
    return is_gpt2(pattern) or _plain(pattern) in _RULES


@cache
def by_neighbours(pattern: Pattern) -> Neighbours | None:
    rules = _RULES.get(_plain(pattern))
    return None if rules is None else Neighbours(rules, compile_pattern(pattern)[0])


@cache
def compile_pattern(pattern: Pattern) -> tuple[regex.Pattern, ...]:
    """`pattern` compiled by `regex`. Raises ValueError, with the reason, when it does not compile."""
    parts = (pattern,) if isinstance(pattern, str) else pattern
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"pattern: got {pattern!r}, expected a regular expression, several, or one of {[*PATTERNS]}")
    try:
        return tuple(map(regex.compile, parts))
    except regex.error as error:
        raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from None


def find_pretokens(text: str, pattern: Pattern) -> list[tuple[int, int]]:
    """Start and end of each pre-token, found by the regular-expression engine."""
    first, *others = compile_pattern(pattern)
    if isinstance(pattern, str):
        return [match.span() for match in first.finditer(text) if match[0]]
    spans = [(0, len(text))] if text else []
    for compiled in (first, *others):
        # The piece is all that the expression sees, behind and ahead.
        spans = [(a + i, a + j) for a, b in spans for i, j in _split_at_matches(text[a:b], compiled)]
    return spans


def _split_at_matches(text: str, compiled: regex.Pattern) -> Iterator[tuple[int, int]]:
    done = 0
    for match in compiled.finditer(text):
        start, end = match.span()
        if start < end:
            if done < start:
                yield done, start
            yield start, end
            done = end
    if done < len(text):
        yield done, len(text)


@cache
def for_ascii(pattern: Pattern) -> re.Pattern | None:
    """A pattern known by name for text in ASCII and Python's own engine, which takes half the time of `regex`."""
    if isinstance(pattern, tuple) or not is_vectorised(pattern):
        return None
    space = re.escape("".join(regex.findall(r"\s", bytes(range(128)).decode())))
    for old, new in (
        (r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", "A-Z"),
        (r"\p{Ll}\p{Lm}\p{Lo}\p{M}", "a-z"),
        (r"[^\s\p{L}\p{N}]", f"[^{space}A-Za-z0-9]"),
        (r"[^\r\n\p{L}\p{N}]", r"[^\r\nA-Za-z0-9]"),
        (r"\p{L}", "[A-Za-z]"),
        (r"\p{N}", "[0-9]"),
        (r"\s", f"[{space}]"),
        (r"\S", f"[^{space}]"),
    ):
        pattern = pattern.replace(old, new)
    return re.compile(pattern)


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
