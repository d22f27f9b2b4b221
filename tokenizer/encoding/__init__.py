"""Texts to token ids: whole texts (encoder.py), long ones and many (bulk.py), words of those (text.py), merges in words
(words.py, long.py); short texts by compiled code where there is some (core.py)."""

from .bulk import BulkEncoder
from .core import Core, compiled_core, is_by_rank
from .encoder import Encoder, cutter_of
from .words import WordEncoder

__all__ = ["BulkEncoder", "Core", "Encoder", "WordEncoder", "compiled_core", "cutter_of", "is_by_rank"]
