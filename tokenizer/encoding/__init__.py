"""Texts to token ids: whole texts (encoder.py), words of long texts (text.py), merges in words (words.py, long.py);
short texts by compiled code where there is some (core.py)."""

from .core import Core, compiled_core, is_by_rank
from .encoder import STREAM_PIECE, Encoder, SpecialIds, cut_stream
from .words import WordEncoder

__all__ = [
    "STREAM_PIECE",
    "Core",
    "Encoder",
    "SpecialIds",
    "WordEncoder",
    "compiled_core",
    "cut_stream",
    "is_by_rank",
]
