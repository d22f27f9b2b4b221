"""Whole texts to token ids: special tokens, then pre-tokens, then words. Short texts go word by word through a
dictionary, long ones through the arrays of text.py; the ids are the same."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import chain

import numpy as np

from ..definition import PLAIN, Definition, Options
from ..pretokenize import (
    SEPARATOR,
    Cutter,
    Pattern,
    Specials,
    compile_pattern,
    find_pretokens,
    for_ascii,
    pretokenize,
    utf8,
)
from ..sizes import COMPILED_TEXT, MAX_SHORT_TEXT_WORDS, MAX_WORD_CHARACTERS, SHORT_TEXT, STREAM_PIECE, TASK
from ..tokens import TokenBytes
from .core import Core, disputed
from .text import TextEncoder
from .words import WordEncoder

# Stands between texts that are encoded together; no vocabulary has such an id.
_END = np.iinfo(np.int32).max


def cutter_of(definition: Definition, allowed: Collection[str]) -> Cutter:
    """The tokenizer's way to cut texts in which the `allowed` special tokens, and they alone, become their ids."""
    ids = {token: i for token, i in definition.special_tokens.items() if token in allowed}
    options = definition.options
    # A piece that begins with a space gets no other one.
    return Cutter(
        Specials(ids, options.flags, nfc=options.nfc), definition.pattern, only_at_spaces=options.prefix_space
    )


class Encoder:
    """Encodes texts, remembering words."""

    def __init__(self, words: WordEncoder, pattern: Pattern, tokens: TokenBytes, options: Options = PLAIN) -> None:
        self._options = options
        self._prepares = options.nfc or options.prefix_space
        self.pattern = pattern
        self._sizes = tokens.sizes
        self._ascii = for_ascii(pattern)
        self._expression = compile_pattern(pattern)[0]
        self._word_encoder = words
        self._words = _Words(words, tokens.missing())
        # One int for each id. A list of ints made anew would take five times the memory, and mostly page faults' time.
        self._ints = tokens.ints
        # Characters below which a text is short; before warm_up() none is.
        self.short = 0
        self._encode_text: Callable[[str], list[int]] | None = None
        self._disputed = re.compile("")
        # One for each thread: its tables are written to by every call. No lock, which a fork might copy while held.
        self._local = threading.local()
        self._local.text_encoder = TextEncoder(words, pattern)
        self._missing: re.Pattern[bytes] | None = self._words.missing

    def warm_up(self, core: Core | None) -> None:
        """Gives short texts and single words to compiled code, if there is any, and makes what is made at first use."""
        self.short = SHORT_TEXT
        if core is not None:
            self._word_encoder.compiled = core.encode_word
            if core.encode_text is not None:
                self._encode_text, self._disputed, self.short = core.encode_text, disputed(), COMPILED_TEXT
        self._word_encoder.warm_up()
        self._missing = None  # not in that text
        # So that a stream takes next to no memory (see STREAM_PIECE); the allocator too then has room for its arrays.
        self._encode_masked((" é" * (STREAM_PIECE // 3)).encode(), np.empty(0, np.int32))
        self._missing = self._words.missing

    def encode_short(self, text: str, allowed: Specials) -> list[int]:
        """Ids of a text below self.short."""
        if allowed.beginning not in text and not self._prepares:
            return self._encode_part(text)
        parts = allowed.split(text)
        if self._prepares:
            parts[::2] = map(self._prepare, parts[::2])
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(allowed.id_of[part])
            else:
                ids += self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        if self._encode_text is not None and (text.isascii() or not self._disputed.search(text)):
            return self._encode_text(text)
        return list(chain.from_iterable(map(self._words.__getitem__, self._split(text))))

    def encode_long(self, pieces: Iterable[bytes], allowed: Specials) -> np.ndarray:
        """Ids (int32) of UTF-8 text, in pieces as cut_stream makes them."""
        parts = [self._encode_masked(*allowed.mask_ids(piece)) for piece in pieces]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def encode_to_list(self, pieces: Iterable[bytes], allowed: Specials) -> list[int]:
        """encode_long as a list."""
        ids: list[int] = []
        for piece in pieces:
            ids += self._ints.take(self._encode_masked(*allowed.mask_ids(piece))).tolist()
        return ids

    def encode_many(self, texts: list[bytes], allowed: Specials) -> tuple[np.ndarray, list[int]]:
        """Ids (int32) of all texts, and how many each has: texts are encoded together, with separators between."""
        parts, counts = [], []
        together: list[bytes] = []
        special_ids: list[np.ndarray] = []
        size = 0
        for i, text in enumerate(texts):
            masked, ids = allowed.mask_ids(text)
            together.append(masked)
            special_ids += [ids, np.array([_END], np.int32)]
            size += len(masked)
            if size >= TASK or i == len(texts) - 1:
                encoded = self._encode_masked(SEPARATOR.join(together) + SEPARATOR, np.concatenate(special_ids))
                ends = np.flatnonzero(encoded == _END)
                counts += np.diff(ends, prepend=-1).tolist()
                parts.append(np.delete(encoded, ends))
                together, special_ids, size = [], [], 0
        return np.concatenate(parts) if parts else np.empty(0, np.int32), [count - 1 for count in counts]

    def _prepare(self, text: str) -> str:
        """What Options say of a text without special tokens."""
        if self._options.prefix_space and text and text[0] != " ":
            text = f" {text}"
        return unicodedata.normalize("NFC", text) if self._options.nfc else text

    def _encode_masked(self, data: bytes, special_ids: np.ndarray) -> np.ndarray:
        if self._prepares:
            data = SEPARATOR.join(self._prepare(part.decode()).encode() for part in data.split(SEPARATOR))
        if not hasattr(self._local, "text_encoder"):
            self._local.text_encoder = TextEncoder(self._word_encoder, self.pattern)
        check(data, self._missing)  # before any of its words has a number
        return self._local.text_encoder.encode(data, special_ids)

    def encode_with_offsets(self, text: str, allowed: Specials) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the (start, end) of each one's characters in `text`."""
        sizes = self._sizes.tolist()
        data = utf8(text)
        masked, special_ids = allowed.mask_ids(data)
        if self._options.flags or any(self._prepare(part) != part for part in allowed.split(text)[::2]):
            raise ValueError("offsets: expected a text that the tokenizer encodes as it is, without options")
        special_id = iter(special_ids.tolist())
        ids: list[int] = []
        spans: list[tuple[int, int]] = []  # in bytes
        longer = 0  # by so much are the special tokens so far longer than their separators
        padded, starts, lengths = pretokenize(masked, self.pattern)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            word = padded[start : start + length]
            tokens = (next(special_id),) if word == SEPARATOR else self._words[word.decode()]
            start += longer
            for token in tokens:
                ids.append(token)
                spans.append((start, start + sizes[token]))
                start = spans[-1][1]
            if word == SEPARATOR:
                longer += sizes[tokens[0]] - 1
        if not text.isascii():
            # The character that each byte belongs to: as many have started as there are bytes that continue none.
            lead = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
            character = (np.cumsum(lead) - 1).tolist()
            spans = [(character[start], character[end - 1] + 1) for start, end in spans]
        return ids, spans

    def _split(self, text: str) -> list[str]:
        if self._ascii is not None and text.isascii():
            return self._ascii.findall(text)
        if self._ascii is not None:
            return self._expression.findall(text)
        return [text[start:end] for start, end in find_pretokens(text, self.pattern)]


def check(data: bytes, missing: re.Pattern[bytes] | None) -> None:
    """Raise ValueError where a byte of UTF-8 text is one of those that are no token."""
    if missing and (found := missing.search(data)):
        near = data[max(0, found.start() - 20) : found.end() + 20]
        raise ValueError(f"text: the byte {found[0]!r} has no token in this vocabulary, in {near!r}")


class _Words(dict[str, tuple[int, ...]]):
    """Words and their ids, filled as words are asked for. Those not asked for in a long time are forgotten."""

    def __init__(self, encoder: WordEncoder, missing: re.Pattern[bytes] | None) -> None:
        super().__init__()
        self._encoder = encoder
        self.missing = missing
        self._old: dict[str, tuple[int, ...]] = {}  # the generation before
        self._dropped: dict[str, tuple[int, ...]] = {}  # the one before that: freed at once it would take milliseconds

    def __missing__(self, word: str) -> tuple[int, ...]:
        if self._dropped:
            with suppress(KeyError):  # another thread was faster
                self._dropped.popitem()
        ids = self._old.get(word)
        if ids is None:
            check(data := utf8(word), self.missing)
            ids = tuple(self._encoder.encode_word(data))
        if len(word) <= MAX_WORD_CHARACTERS:
            if len(self) >= MAX_SHORT_TEXT_WORDS // 2:
                self._dropped, self._old = self._old, dict(self)
                self.clear()
            self[word] = ids
        return ids
