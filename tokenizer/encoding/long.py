"""Words too long for a matrix's column: cut into windows, encoded apart, and mended at the seams.

A sequence of tokens is the encoding of a word exactly if every two neighbours are the encoding of their own bytes. (The
first merge across a boundary would be of a suffix of one token with a prefix of the next; until then the bytes of the
two have seen the merges that they see alone, so that alone they would be merged too.) Each window's tokens are so by
themselves; a seam between windows is mended by encoding a stretch around it anew, wider until its own ends are right.
The work is linear in the length, unlike that of merging the whole word.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..pretokenize import PADDING
from ..sizes import WINDOW_GROWTH, WORD_WINDOW
from ..tokens import TokenBytes, ranges

# Bytes, the words' starts and lengths in them; ids of the words and how many each has.
MergeWords = Callable[[bytes, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class LongEncoder:
    """Encodes words longer than `longest` bytes; `merge_words` encodes those that are not."""

    def __init__(self, merge_words: MergeWords, tokens: TokenBytes, longest: int) -> None:
        self._merge_words = merge_words
        self._tokens = tokens
        self._longest = longest

    def encode(
        self, data: bytes, starts: np.ndarray, lengths: np.ndarray, window: int = WORD_WINDOW
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) of the words that stand at `starts`, one word after another, and how many each word has.

        data: bytes followed by PADDING.  starts, lengths: (n,) int64, ascending, no word overlaps the next.
        """
        ends = starts + lengths
        cuts, cut_lengths = _windows(data, starts, lengths, window)
        ids, at = self._encode(data, cuts, cut_lengths, window)
        # The bytes where tokens of different windows meet and may have to merge.
        seams = np.setdiff1d(cuts, starts)
        radius = 3 * window // 8
        while len(seams := self._open(seams, ids, at)):
            # Around each seam the tokens from low to high are encoded anew; stretches that overlap are one.
            word = np.searchsorted(starts, seams, side="right") - 1
            low = np.searchsorted(at, np.maximum(seams - radius, starts[word]), side="right") - 1
            high = np.searchsorted(at, np.minimum(seams + radius, ends[word]))
            first = np.flatnonzero(np.append(True, low[1:] >= np.maximum.accumulate(high)[:-1]))
            low, high, word = low[first], np.maximum.reduceat(high, first), word[first]
            stretch_starts = at[low]
            stretch_ends = np.minimum(np.append(at, ends[-1])[high], ends[word])
            new_ids, new_at = self._encode(data, stretch_starts, stretch_ends - stretch_starts, window)

            kept = np.ones(len(ids), bool)
            kept[ranges(low, high - low)] = False
            at = np.append(at[kept], new_at)
            order = np.argsort(at, kind="stable")
            at, ids = at[order], np.append(ids[kept], new_ids)[order]
            seams = np.union1d(stretch_starts[stretch_starts > starts[word]], stretch_ends[stretch_ends < ends[word]])
            radius *= 4
        return ids, np.diff(np.searchsorted(at, np.append(starts, ends[-1])))

    def _open(self, seams: np.ndarray, ids: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Those of the seams whose two tokens are not the encoding of their own bytes."""
        if not len(seams):
            return seams
        token = np.searchsorted(at, seams)
        pairs = np.stack([ids[token - 1], ids[token]], axis=1).astype(np.int64)
        _, first, inverse = np.unique(pairs[:, 0] << 32 | pairs[:, 1], return_index=True, return_inverse=True)
        pairs = pairs[first]
        lengths = self._tokens.sizes.take(pairs).sum(axis=1)
        starts = np.cumsum(lengths) - lengths
        data = self._tokens.join(pairs.reshape(-1)) + PADDING
        encoded, encoded_at = self._encode(data, starts, lengths, window=1 << 62)
        place = np.searchsorted(encoded_at, starts)
        counts = np.diff(np.append(place, len(encoded)))
        apart = (counts == 2) & (encoded.take(place) == pairs[:, 0])
        return seams[~apart[inverse]]

    def _encode(
        self, data: bytes, starts: np.ndarray, lengths: np.ndarray, window: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the spans, and where in `data` each id's bytes start."""
        parts = []
        longer = lengths > max(self._longest, WINDOW_GROWTH * window)
        if longer.any():
            spans = starts[longer], lengths[longer]
            parts.append((spans[0], *self.encode(data, *spans, WINDOW_GROWTH * window)))
        rest = np.flatnonzero(~longer)
        if len(rest):
            parts.append((starts[rest], *self._encode_different(data, starts[rest], lengths[rest])))

        ids = np.concatenate([part[1] for part in parts])
        at = np.concatenate([self._places(*part) for part in parts])
        if len(parts) > 1:
            order = np.argsort(at, kind="stable")
            ids, at = ids[order], at[order]
        return ids, at

    def _encode_different(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the spans and how many each has, of many alike only one encoded."""
        number: dict[bytes, int] = {}
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        numbers = np.array([number.setdefault(data[i:j], len(number)) for i, j in spans])
        lengths = np.fromiter(map(len, number), np.int64, len(number))
        ids, counts = self._merge_words(b"".join(number), np.cumsum(lengths) - lengths, lengths)
        offsets = np.cumsum(counts) - counts
        counts = counts.take(numbers)
        return ids.take(ranges(offsets.take(numbers), counts)), counts

    def _places(self, starts: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Where each token starts: counts[i] tokens follow one another from starts[i] on."""
        sizes = self._tokens.sizes.take(ids)
        before = np.cumsum(sizes) - sizes
        first = np.cumsum(counts) - counts
        return before + np.repeat(starts - before.take(first), counts)


def _windows(data: bytes, starts: np.ndarray, lengths: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The words cut into windows of about `window` bytes, each ending where a character does: starts and lengths."""
    text = np.frombuffer(data, np.uint8)
    # A power of two characters also where these have three bytes.
    steps = np.where(text.take(starts) >> 4 == 0xE, window * 3 // 4, window)
    n = -(-lengths // steps)
    first = np.cumsum(n) - n
    cuts = np.repeat(starts - steps * first, n) + np.repeat(steps, n) * np.arange(n.sum())
    for _ in range(3):
        inside = (text.take(cuts) & 0xC0) == 0x80
        inside[first] = False
        cuts -= inside
    ends = np.append(cuts[1:], 0)
    ends[first + n - 1] = starts + lengths
    return cuts, ends - cuts
