"""Text to pre-tokens: special tokens, patterns, safe cuts."""

from .chunks import Cutter, cut_stream, document_chunks, file_ranges
from .cut import pretokenize
from .patterns import (
    GPT2_PATTERN,
    PATTERNS,
    Pattern,
    compile_pattern,
    find_pretokens,
    for_ascii,
    for_oniguruma,
    is_gpt2,
    is_vectorised,
    resolve,
)
from .specials import Specials
from .text import PADDING, SEPARATOR, Pretokens, repair, utf8

__all__ = [
    "GPT2_PATTERN",
    "PADDING",
    "PATTERNS",
    "SEPARATOR",
    "Cutter",
    "Pattern",
    "Pretokens",
    "Specials",
    "compile_pattern",
    "cut_stream",
    "document_chunks",
    "file_ranges",
    "find_pretokens",
    "for_ascii",
    "for_oniguruma",
    "is_gpt2",
    "is_vectorised",
    "pretokenize",
    "repair",
    "resolve",
    "utf8",
]
