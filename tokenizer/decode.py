"""Token ids back to bytes and text."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .bpe import Tokenizer

# Ids decoded at a time, so that the arrays stay in the second-level cache.
_BLOCK = 1 << 16
# Ids below which joining Python objects costs less than starting up the arrays.
_SHORT = 1 << 9


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """arange(starts[0], starts[0] + counts[0]), arange(starts[1], ...), ... in one array."""
    source = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    source += np.arange(len(source))
    return source


class TokenBytes:
    """The bytes of every token, for look-ups of whole arrays.

    sizes: (vocab_size,) int64, each token's bytes; 0 where the vocabulary has no such id.
    """

    def __init__(self, vocab: Mapping[int, bytes]) -> None:
        self._vocab = vocab
        self.sizes = np.zeros(max(vocab) + 1, np.int64)
        self.sizes[list(vocab)] = [len(token) for token in vocab.values()]
        self._offsets = np.cumsum(self.sizes) - self.sizes
        self._bytes = np.frombuffer(b"".join(vocab[i] for i in sorted(vocab)), np.uint8)

    def join(self, ids: Iterable[int]) -> bytes:
        """The tokens' bytes, one after another. Raises ValueError on an id that is not in the vocabulary."""
        if not isinstance(ids, np.ndarray):
            ids = list(ids)
            if len(ids) < _SHORT:
                try:
                    return b"".join(map(self._vocab.__getitem__, ids))
                except KeyError as error:
                    raise self._not_in_vocabulary(error.args[0]) from None
            try:
                ids = np.frombuffer(array("q", ids), np.int64)
            except (TypeError, OverflowError) as error:
                raise ValueError(f"ids: {error}, expected 0 <= id < {len(self.sizes)}") from None
        self._check(ids)
        parts = []
        for i in range(0, len(ids), _BLOCK):
            block = ids[i : i + _BLOCK]
            sizes = self.sizes.take(block)
            parts.append(self._bytes.take(ranges(self._offsets.take(block), sizes)).tobytes())
        return b"".join(parts)

    def _check(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        if ids.dtype.kind not in "iu":
            raise ValueError(f"ids: got {ids.dtype}, expected integers")
        bad = (ids < 0) | (ids >= len(self.sizes))
        if not bad.any():
            bad = self.sizes.take(ids) == 0
        if bad.any():
            raise self._not_in_vocabulary(ids[bad.argmax()])

    def _not_in_vocabulary(self, i: int) -> ValueError:
        return ValueError(f"ids: {i} is not in the vocabulary, expected 0 <= id < {len(self.sizes)}")


class IncrementalDecoder:
    """Decodes a stream of ids, holding back bytes until they complete a character.

    "".join(decoder.push(i) for i in ids) + decoder.finish() == tokenizer.decode(ids)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """The characters that `ids` complete; may be empty. Raises ValueError on an id out of the vocabulary."""
        some = [ids] if isinstance(ids, (int, np.integer)) else ids
        return self._utf8.decode(self._tokenizer.decode_bytes(some))

    def finish(self) -> str:
        """What is left of a character that was never completed, as U+FFFD. The decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
