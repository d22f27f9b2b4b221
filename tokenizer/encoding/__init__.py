"""Texts to token ids: whole texts (encoder.py), words of long texts (text.py), merges in words (words.py, long.py)."""

from .encoder import SHORT_TEXT, STREAM_PIECE, Encoder, SpecialIds, cut_stream
from .words import WordEncoder

__all__ = ["SHORT_TEXT", "STREAM_PIECE", "Encoder", "SpecialIds", "WordEncoder", "cut_stream"]
