"""A tokenizer.json's merges read without a JSON parser, which takes three times the time and memory for them.

They are strings with one separator throughout, that of the first two, which is replaced by a line end; a string holds
none as such. That is right if then no quotation mark is left that is not escaped, and no backslash before a separator:
each separator begins and ends with a mark, and so each mark was one of those that end and begin strings, in their
order. Anything else is left to the parser.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import numpy as np

_SPACES = b" \t\n\r"


def _compile(pattern: bytes) -> re.Pattern[bytes]:
    """`_` is white space, `S` a string."""
    return re.compile(pattern.replace(b"_", rb"[ \t\n\r]*").replace(b"S", rb'"(?:[^"\\]|\\.)*"'), re.DOTALL)


_KEY = _compile(rb'"merges"_:_\[')
# "left right", ", and ["left", "right"], ["
_LINES = _compile(rb'S(?P<next>_,_)"')
_PAIRS = _compile(rb'\[_S(?P<comma>_,_)S(?P<close>_\])(?P<next>_,_\[_)"')


def read_apart(data: bytes) -> Any | None:
    """The JSON, but its model's merges are one text, a line each. None where they are not written as is usual."""
    key, closes = _KEY.search(data, max(data.find(b'"merges": ['), 0)), data.rfind(b"]")
    merges = _merges(data[key.end() : closes].strip(_SPACES)) if key else None
    if key is None or merges is None:
        return None
    found: list[str] = []  # stands for them

    def stand_in(name: str) -> list[str]:
        found.append(name)
        return found

    with suppress(ValueError, LookupError, TypeError):
        text = (data[: key.end() - 1] + b"NaN" + data[closes + 1 :]).decode()
        content = json.loads(text, parse_constant=stand_in)
        if content["model"]["merges"] is found and len(found) == 1:
            content["model"]["merges"] = merges
            return content
    return None


def _merges(written: bytes) -> str | None:
    """Of `"a b", "c d"`, or `["a", "b"], ["c", "d"]`."""
    if first := _LINES.match(written):
        close = b'"'
        text = written[1:].replace(close + first["next"] + b'"', b"\n")
    elif first := _PAIRS.match(written):
        close = b'"' + first["close"]
        text = written[written.index(b'"') + 1 :].replace(close + first["next"] + b'"', b"\n")
        text = text.replace(b'"' + first["comma"] + b'"', b" ")
    else:
        return None
    if not text.endswith(close):
        return None
    text = text[: -len(close)]
    if np.count_nonzero(np.frombuffer(text, np.uint8) < ord(" ")) != text.count(b"\n"):
        return None  # the parser refuses control characters, line ends among them
    text = text.replace(rb"\\", b"\0").replace(rb"\"", b"\1")
    if b"\\" in text or b'"' in text:
        return None
    with suppress(UnicodeDecodeError):
        return text.replace(b"\0", b"\\").replace(b"\1", b'"').decode()
    return None
