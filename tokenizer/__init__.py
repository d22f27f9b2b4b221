"""Byte-level BPE: training, encoding, decoding and file formats. Imports nothing else of this package."""

from .decode import IncrementalDecoder
from .pretokenize import GPT2_PATTERN, PATTERNS
from .tokenizer import Tokenizer
from .training import count_words, train_bpe, train_bpe_from_counts, train_bpe_from_iterator

__all__ = [
    "GPT2_PATTERN",
    "PATTERNS",
    "IncrementalDecoder",
    "Tokenizer",
    "count_words",
    "train_bpe",
    "train_bpe_from_counts",
    "train_bpe_from_iterator",
]
