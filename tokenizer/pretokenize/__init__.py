"""Text to pre-tokens: special tokens, patterns, safe cuts."""

from .chunks import Cutter, document_chunks, file_ranges, read_chunks, stream_chunks
from .cut import pretokenize
from .patterns import GPT2_PATTERN, compile_pattern, for_oniguruma, is_vectorised
from .specials import Specials
from .text import PADDING, SEPARATOR, Pretokens, repair, utf8

__all__ = [
    "GPT2_PATTERN",
    "PADDING",
    "SEPARATOR",
    "Cutter",
    "Pretokens",
    "Specials",
    "compile_pattern",
    "document_chunks",
    "file_ranges",
    "for_oniguruma",
    "is_vectorised",
    "pretokenize",
    "read_chunks",
    "repair",
    "stream_chunks",
    "utf8",
]
