"""The two large parts of a tokenizer.json, read without a JSON parser, for which they are most of a load.

Of what is in strings only two escapes are known, a backslash's and a mark's, for which control characters stand here,
since JSON has none in strings. All other quotation marks then begin and end strings in turn, as the parser reads them;
and what is between strings must be what is between the first two, or numbers. Anything else is left to the parser.

The tests compare the two; what is refused is refused by the parser's reading, which says why (hugging_face.read_hf).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

_SPACES = b" \t\n\r"
# Tokens looked up by a search of all names: what a dictionary of them takes.
_FEW = 8


def _compile(pattern: bytes) -> re.Pattern[bytes]:
    """`_` is white space, `S` a string."""
    return re.compile(pattern.replace(b"_", rb"[ \t\n\r]*").replace(b"S", rb'"(?:[^"\\]|\\.)*"'), re.DOTALL)


_VOCAB = _compile(rb'"vocab"_:_\{')
_MERGES = _compile(rb'"merges"_:_\[')
# "left right", ", and ["left", "right"], ["
_LINES = _compile(rb'S(?P<next>_,_)"')
_PAIRS = _compile(rb'\[_S(?P<comma>_,_)S(?P<close>_\])(?P<next>_,_\[_)"')


class WrittenVocab(Mapping[str, int]):
    """names: of all tokens, each between line ends.  ids: theirs.  A dictionary is made when many are asked for."""

    def __init__(self, names: str, ids: list[int]) -> None:
        self.names, self.ids = names, ids
        self._asked = 0

    @cached_property
    def _id_of(self) -> dict[str, int]:
        id_of = dict(zip(self.names[1:-1].split("\n"), self.ids, strict=True))
        if len(id_of) < len(self.ids):
            raise ValueError("a token is named twice")  # the parser takes the last
        return id_of

    def __getitem__(self, name: str) -> int:
        self._asked += 1
        if self._asked > _FEW:
            return self._id_of[name]
        at = self.names.find(f"\n{name}\n")
        if at < 0 or "\n" in name:
            raise KeyError(name)
        if at != self.names.rfind(f"\n{name}\n"):
            raise ValueError(f"{name!r} is named twice")
        return self.ids[self.names.count("\n", 0, at)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._id_of)

    def __len__(self) -> int:
        return len(self.ids)


def read_apart(data: bytes) -> Any | None:
    """The JSON; its model's vocabulary is a WrittenVocab, its merges are one text, a line each.

    None where they are not written as is usual, one after the other at the end.
    """
    at, closes = max(data.find(b'"merges": ['), 0), data.rfind(b"]")
    opens, key = _VOCAB.search(data, max(data.find(b'"vocab"'), 0)), _MERGES.search(data, at)
    if b"\0" in data or b"\1" in data or not opens or not key or not opens.end() < key.start() < closes:
        return None
    before = data[opens.end() : key.start()].rstrip(_SPACES)
    inside = before[:-1].rstrip(_SPACES)
    closed = before.endswith(b",") and inside.endswith(b"}")
    vocab = _vocab(_unescaped(inside[:-1])) if closed else None
    merges = _merges(data[key.end() : closes].strip(_SPACES))
    if vocab is None or merges is None:
        return None
    found: list[str] = []  # stands for both

    def stand_in(name: str) -> list[str]:
        found.append(name)
        return found

    with suppress(ValueError, LookupError, TypeError):
        parts = data[: opens.end() - 1], b"NaN,", key[0][:-1], b"NaN", data[closes + 1 :]
        content = json.loads(b"".join(parts).decode(), parse_constant=stand_in)
        model = content["model"]
        if len(found) == 2 and model["vocab"] is found and model["merges"] is found:
            model |= {"vocab": vocab, "merges": merges}
            return content
    return None


def _unescaped(written: bytes) -> bytes:
    """With 0 for an escaped backslash, 1 for an escaped mark; a backslash is left if there is another escape."""
    return written.replace(rb"\\", b"\0").replace(rb"\"", b"\1") if b"\\" in written else written


def _text(names: bytes) -> str | None:
    """The strings between line ends, of which these and no other control characters are left."""
    controls = np.frombuffer(names, np.uint8)
    controls = controls[controls < ord(" ")]
    if ((controls > 1) & (controls != ord("\n"))).any() or b"\\" in names or b'"' in names:
        return None
    with suppress(UnicodeDecodeError):
        return names.replace(b"\0", b"\\").replace(b"\1", b'"').decode()
    return None


def _vocab(written: bytes) -> WrittenVocab | None:
    """Of `"a": 0, "b": 1`, unescaped."""
    characters = np.frombuffer(written, np.uint8)
    marks = np.flatnonzero(characters == ord('"'))
    n = len(marks) // 2
    if not n or len(marks) % 2:
        return None
    inside = np.zeros(len(characters), np.int8)
    inside[marks[::2]], inside[marks[1::2]] = 1, -1
    is_name = np.cumsum(inside, dtype=np.int8).view(bool)  # the mark before it as well, but not the one behind
    names = characters[is_name].tobytes()
    between = characters[~is_name].tobytes()
    rest = between.translate(None, _SPACES)
    if (
        b"\n" in names
        or not rest.startswith(b'":')
        or rest.count(b',":') != n - 1
        or len(rest.translate(None, b"0123456789")) != 3 * n - 1
        or (text := _text(names.replace(b'"', b"\n") + b"\n")) is None
    ):
        return None
    with suppress(ValueError):
        return WrittenVocab(text, json.loads(b"[" + between.translate(None, b'":') + b"]"))
    return None


def _merges(written: bytes) -> str | None:
    """Of `"a b", "c d"`, or `["a", "b"], ["c", "d"]`: separators, which begin and end with marks, become line ends.

    If no mark is left that is not escaped, and no backslash before a separator, each was replaced where it is one.
    """
    if first := _LINES.match(written):
        close, comma = b'"', None
    elif first := _PAIRS.match(written):
        close, comma = b'"' + first["close"], b'"' + first["comma"] + b'"'
    if not first or not written.endswith(close):
        return None
    text = written[written.index(b'"') + 1 : -len(close)]
    separator = close + first["next"] + b'"'
    lines = text.replace(separator, b"\n")
    n_replaced = (len(text) - len(lines)) // (len(separator) - 1)
    if comma:
        lines = lines.replace(comma, b" ")
    # More line ends than that are in a string.
    return _text(_unescaped(lines)) if lines.count(b"\n") == n_replaced else None
