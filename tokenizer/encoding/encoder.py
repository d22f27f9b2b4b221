"""Whole texts to token ids: special tokens, then pre-tokens, then words. Short texts go word by word through a
dictionary, long ones through the arrays of bulk.py; the ids are the same."""

from __future__ import annotations

import re
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
from ..sizes import COMPILED_TEXT, MAX_SHORT_TEXT_WORDS, MAX_WORD_CHARACTERS, SHORT_TEXT, STREAM_PIECE
from ..tokens import TokenBytes
from .bulk import BulkEncoder, check
from .core import Core, disputed
from .words import WordEncoder


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
        self.bulk = BulkEncoder(words, pattern, tokens.missing(), options)
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

    def warm_up(self, core: Core | None) -> None:
        """Gives short texts and single words to compiled code, if there is any, and makes what is made at first use."""
        self.short = SHORT_TEXT
        if core is not None:
            self._word_encoder.compiled = core.encode_word
            if core.encode_text is not None:
                self._encode_text, self._disputed, self.short = core.encode_text, disputed(), COMPILED_TEXT
        self._word_encoder.warm_up()
        # So that a stream takes next to no memory (see STREAM_PIECE); the allocator too then has room for its arrays.
        self.bulk.warm_up((" é" * (STREAM_PIECE // 3)).encode())

    def encode_short(self, text: str, allowed: Specials) -> list[int]:
        """Ids of a text below self.short."""
        if allowed.beginning not in text and not self.bulk.prepares:
            return self._encode_part(text)
        parts = allowed.split(text)
        if self.bulk.prepares:
            parts[::2] = map(self.bulk.prepare, parts[::2])
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

    def encode_to_list(self, pieces: Iterable[bytes], allowed: Specials) -> list[int]:
        """Ids of UTF-8 text, in pieces as cut_stream makes them."""
        ids: list[int] = []
        for piece in pieces:
            # "clip": without a look at each, which takes a fifth longer.
            ids += self._ints.take(self.bulk.encode_piece(piece, allowed), mode="clip").tolist()
        return ids

    def encode_with_offsets(self, text: str, allowed: Specials) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the (start, end) of each one's characters in `text`."""
        sizes = self._sizes.tolist()
        data = utf8(text)
        masked, special_ids = allowed.mask_ids(data)
        if self._options.flags or any(self.bulk.prepare(part) != part for part in allowed.split(text)[::2]):
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
