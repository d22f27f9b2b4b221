"""Byte-level BPE: training, encoding, decoding and file formats. Imports nothing else of this package."""

from .bpe import IncrementalDecoder, Tokenizer
from .pretokenize import GPT2_PATTERN

__all__ = ["GPT2_PATTERN", "IncrementalDecoder", "Tokenizer"]
