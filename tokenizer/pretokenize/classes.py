"""Classes of characters: arrays of bytes to arrays of classes, a character's class on each of its bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import regex

from .text import SEPARATOR

_UNKNOWN = 0xFF  # no class
_CHARACTER_BYTES = np.repeat([1, 2, 3, 4], [0xC0, 0x20, 0x10, 0x10])  # by the first


class Classes:
    """A class for every character: a number and a regular expression each, the first that matches.

    wide: the classes whose characters of several bytes write() tells of.

    Characters are looked up as `regex` sees them (its Unicode version, not Python's), in blocks of 256 as they are met:
    all at once would take a tenth of a second.
    """

    def __init__(
        self, expressions: Sequence[tuple[int, str]], other: int, separator: int, wide: Collection[int]
    ) -> None:
        self._expressions = [(number, regex.compile(f"(?:{expression})+")) for number, expression in expressions][::-1]
        self._other = other
        self._is_wide = bytes(class_ in wide for class_ in range(256))
        self._of_code_point = np.full((0x110000 >> 8, 256), _UNKNOWN, np.uint8)
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
        found = self._of_code_point.reshape(-1).take(codes)
        if found.max(initial=0) == _UNKNOWN:
            for block in np.unique(codes[found == _UNKNOWN] >> 8).tolist():
                self._of_code_point[block] = self._block(block)
            found = self._of_code_point.reshape(-1).take(codes)
        return found

    def write(self, classes: np.ndarray, text: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Puts the classes of the characters of several bytes that start in text[:n] in their places.

        text: with PADDING behind.
        Returns where such a character of a `wide` class starts, its class, and of how many bytes it is.
        """
        lead = ((text[:n] >= 0xC0) & (text[:n] != SEPARATOR[0])).nonzero()[0]
        # The first four bytes from each on.
        load = np.ndarray(len(text) - 3, "<u4", text, strides=(1,))[lead]
        first = load & 0xFF
        of_two = (load & 0x1F) << 6 | load >> 8 & 0x3F
        of_three = of_two << 6 | load >> 16 & 0x3F
        code = np.where(first < 0xE0, of_two, of_three)
        if len(four := (first >= 0xF0).nonzero()[0]):
            code[four] = (of_three[four] & 0x7FFF) << 6 | load[four] >> 24 & 0x3F
        found = self.of_code_points(code)
        long = (first >= 0xE0).nonzero()[0]
        for k, part in enumerate((slice(None), slice(None), long, four)):
            classes[lead[part] + k] = found[part]
        wide = np.frombuffer(found.tobytes().translate(self._is_wide), bool)
        at = lead[wide]
        return at, found[wide], _CHARACTER_BYTES.take(text.take(at))
