"""Classes of characters: arrays of bytes to arrays of classes, a character's class on each of its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

from .text import SEPARATOR


class Classes:
    """A class for every character: a number and a regular expression each, the first that matches.

    Characters are looked up as `regex` sees them (its Unicode version, not Python's), in blocks of 256 as they are met:
    all at once would take a tenth of a second.
    """

    def __init__(self, expressions: Sequence[tuple[int, str]], other: int, separator: int) -> None:
        self._expressions = [(number, regex.compile(f"(?:{expression})+")) for number, expression in expressions][::-1]
        self._other = other
        self._of_code_point = np.zeros((0x110000 >> 8, 256), np.uint8)
        self._known = np.zeros(0x110000 >> 8, bool)
        table = bytearray(self._block(0)[:128]) + bytes([other]) * 128
        table[SEPARATOR[0]] = separator
        # By ASCII byte; any other byte is to be looked up as a character.
        self.of_byte = bytes(table)

    def _block(self, number: int) -> np.ndarray:
        classes = np.full(256, self._other, np.uint8)
        if not 0xD8 <= number < 0xE0:  # surrogates are no characters
            text = "".join(map(chr, range(number << 8, (number + 1) << 8)))
            for class_, expression in self._expressions:
                for match in expression.finditer(text):
                    classes[match.start() : match.end()] = class_
        return classes

    def of_code_points(self, codes: np.ndarray) -> np.ndarray:
        blocks = codes >> 8
        if not self._known.take(blocks).all():
            for block in np.unique(blocks).tolist():
                if not self._known[block]:
                    self._of_code_point[block] = self._block(block)
                    self._known[block] = True
        return self._of_code_point.reshape(-1).take(codes)

    def write(self, classes: np.ndarray, text: np.ndarray, lead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Puts the classes of the characters of several bytes, which start at `lead`, in their places.

        Returns the class of each, and of how many bytes it is.
        """
        first = text[lead]
        size = 2 + (first >= 0xE0).astype(np.int64) + (first >= 0xF0)
        code = (first & (0x7F >> size)).astype(np.int64)
        for k in (1, 2, 3):
            more = size > k
            code = np.where(more, code << 6 | (text[lead + k] & 0x3F), code)
        found = self.of_code_points(code)
        for k in range(4):
            more = size > k
            classes[lead[more] + k] = found[more]
        return found, size
