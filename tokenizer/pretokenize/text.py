"""Text as bytes, and the pre-tokens of it: what all that cut, count and encode share. A leaf.

    utf8(text) -> bytes         str to UTF-8; a lone surrogate is a ValueError
    repair(data) -> bytes       bytes.decode("utf-8", errors="replace"), as UTF-8 again

Bytes 0xFF never occur in UTF-8, so one stands for a special token: a SEPARATOR ends the text before it as the end of
the text would, and is a pre-token of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SEPARATOR = b"\xff"
# So that loads of 8 bytes at a pre-token's start, and up to 24 further on, stay inside the buffer.
PADDING = 40 * SEPARATOR


class Pretokens(NamedTuple):
    """The pre-tokens of one text, separators included.

    data: the text's bytes, followed by PADDING.
    starts, lengths: (n,) int64, byte offsets into data and lengths in bytes, in the order of the text.
    """

    data: bytes
    starts: np.ndarray
    lengths: np.ndarray

    def tolist(self) -> list[bytes]:
        ends = self.starts + self.lengths
        return [self.data[i:j] for i, j in zip(self.starts.tolist(), ends.tolist(), strict=True)]


def utf8(text: str) -> bytes:
    """UTF-8 of `text`. Raises ValueError on a lone surrogate, which has none, and on what is no str."""
    if not isinstance(text, str):
        raise ValueError(f"text: got {type(text).__name__}, expected str")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: {text[error.start]!r} at position {error.start} is a lone surrogate, expected Unicode text"
        ) from None


def repair(data: bytes) -> bytes:
    """`data` as valid UTF-8: each invalid sequence becomes U+FFFD, as in bytes.decode("utf-8", errors="replace")."""
    if data.isascii():
        return data
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace").encode()
    return data
