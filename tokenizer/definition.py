"""What defines a tokenizer: all that decides which ids a text gets. A leaf: it imports nothing of this package."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple


class Definition(NamedTuple):
    """vocab: id to bytes, special tokens among them.  merges: pairs of tokens, the first one merged first.
    special_tokens: text to id.  pattern: the regular expressions of the pre-tokens.  ignore_merges: see Tokenizer.
    """

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]
    pattern: str | tuple[str, ...]
    ignore_merges: bool = False

    @property
    def vocab_size(self) -> int:
        return max(self.vocab) + 1

    @property
    def hash(self) -> str:
        """sha256 (hex) of everything above."""
        content = [
            self.pattern,
            [[i, token.hex()] for i, token in self.vocab.items()],
            [[left.hex(), right.hex()] for left, right in self.merges],
            sorted(self.special_tokens.items()),
            self.ignore_merges,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
