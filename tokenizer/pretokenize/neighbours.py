r"""cl100k's pattern and its descendants without a regular-expression engine.

All of these patterns say nearly the same: words take one character that is no letter before them, numbers are cut after
three digits or one, punctuation takes a space before it and line ends after it, and of white space the part up to the
last line end is one pre-token, and the last character of the rest goes to what follows. So whether a pre-token starts
between two characters depends on the two's classes, and that is one look-up for each pair of neighbouring bytes. The
same look-up marks the few places that need more than two neighbours:

    JOIN      punctuation before a letter: if it is one character, and took no space, it starts the word: `(word`
    CASE      o200k, a capital after a letter without case: the end of a word in small letters, or not
    EMPTY     white space before a line end: with a line end before it too, it is inside a pre-token
    SLASH     o200k, punctuation after a line end: `[\r\n/]*` takes slashes to the punctuation before
    DIGITS    a digit after a digit
    HARD      o200k, a combining mark after punctuation: the expression itself decides, on a stretch around the place

The result equals that of `regex` on every text; the tests compare them on random strings of every class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import regex

from .classes import Classes
from .text import PADDING, SEPARATOR, Pretokens

LOWER, UPPER, UNCASED, MARK, UNMATCHED, OTHER, NUMBER, BLANK, SPACE, NEWLINE, SEP = range(11)
CJK, CJK_OTHER, CJK_UNMATCHED = range(11, 14)
_LETTERS = (LOWER, UPPER, UNCASED, MARK)
_WHITE = (BLANK, SPACE)
START, BEFORE, JOIN, CASE, EMPTY, SLASH, DIGITS, HARD = (1 << i for i in range(8))


class Rules(NamedTuple):
    """How one pattern differs from the others."""

    classes: tuple[tuple[int, str], ...]  # of characters; what none matches is OTHER
    max_digits: int = 3
    # 's and the like: "apart" are pre-tokens, "joined" belong to the word before.
    contractions: str = "apart"
    # o200k: a capital after a small letter starts a word; slashes go with line ends after punctuation.
    cases: bool = False
    # White space at the end of a text is one pre-token, line ends or not.
    whole_end: bool = False
    # DeepSeek: numbers, and runs of CJK, end a text as far as white space before them is concerned; before words in
    # ASCII goes punctuation in ASCII, before others none; and some characters no expression matches.
    ascii_words: bool = False


_WHITE_CLASSES = ((BLANK, " "), (NEWLINE, r"[\r\n]"), (SPACE, r"\s"))
_CL100K = ((LOWER, r"\p{L}"), (NUMBER, r"\p{N}"), *_WHITE_CLASSES)
CL100K = Rules(_CL100K, whole_end=True)
LLAMA3 = Rules(_CL100K)
QWEN2 = Rules(_CL100K, max_digits=1)
O200K = Rules(
    (
        (LOWER, r"\p{Ll}"),
        (UPPER, r"[\p{Lu}\p{Lt}]"),
        (UNCASED, r"[\p{Lm}\p{Lo}]"),
        (MARK, r"\p{M}"),
        (NUMBER, r"\p{N}"),
        *_WHITE_CLASSES,
    ),
    contractions="joined",
    cases=True,
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]"
DEEPSEEK = Rules(
    (
        (NUMBER, r"\p{N}"),
        (CJK, rf"(?=[\p{{L}}\p{{M}}]){_CJK}"),
        (CJK_OTHER, rf"(?=[\p{{P}}\p{{S}}]){_CJK}"),
        (CJK_UNMATCHED, _CJK),
        (LOWER, "[A-Za-z]"),
        (UNCASED, r"[\p{L}\p{M}]"),
        *_WHITE_CLASSES,
        (UNMATCHED, r"[^\p{P}\p{S}]"),
    ),
    contractions="",
    ascii_words=True,
)


class Neighbours:
    """Pre-tokens by the rules of one pattern. expression: the pattern itself, for the hard places."""

    def __init__(self, rules: Rules, expression: regex.Pattern | None = None) -> None:
        self._rules = rules
        self._expression = expression
        self._classes = Classes(rules.classes, OTHER, SEP)
        self._flags = bytes(_flags(pair >> 4, pair & 15, rules) for pair in range(256))

    def cut(self, data: bytes) -> Pretokens:
        n = len(data)
        padded = data + PADDING
        text = np.frombuffer(padded, np.uint8)
        # One place further on than in the text, so that its first character has a neighbour too.
        framed = (SEPARATOR + padded).translate(self._classes.of_byte)
        classes = np.frombuffer(framed, np.uint8)
        lead = size = found = np.empty(0, np.int64)
        if not data.isascii():
            lead = np.flatnonzero(text[:n] >= 0xC0)
            lead = lead[text[lead] != SEPARATOR[0]]
            if len(lead):
                classes = classes.copy()
                found, size = self._classes.write(classes[1:], text, lead)
        # Eight classes at a time: numpy shifts single bytes one by one.
        pairs = np.left_shift(classes[: len(classes) & -8].view(np.uint64), 4).view(np.uint8)[: n + 1]
        pairs |= classes[1 : n + 2]
        flags = np.frombuffer(pairs.tobytes().translate(self._flags), np.uint8)
        is_start = (flags & np.uint8(START)).view(bool)
        is_start[:n] |= (flags[1:] & np.uint8(BEFORE)) != 0
        wide = np.flatnonzero((found == SPACE) | (found == UNMATCHED) | (found == CJK_UNMATCHED))
        if len(wide):  # the last character of white space, not its last byte
            at, sizes = lead[wide], size[wide]
            for k in (1, 2, 3):
                is_start[(at + k)[sizes > k]] = False
            is_start[at[(flags[at + sizes] & BEFORE) > 0]] = True
        wide = np.flatnonzero(found == OTHER)
        self._mend(text, classes[1:], is_start, flags, lead[wide], size[wide])
        bounds = np.flatnonzero(is_start)
        return Pretokens(padded, bounds[:-1], np.diff(bounds))

    def _mend(
        self,
        text: np.ndarray,
        classes: np.ndarray,
        is_start: np.ndarray,
        flags: np.ndarray,
        wide: np.ndarray,
        size: np.ndarray,
    ) -> None:
        """Decides the marked places. is_start is so far what pairs of neighbours say.

        wide, size: where punctuation of several bytes is, and of how many.
        """
        rules = self._rules
        marked = np.flatnonzero(flags >= CASE)
        marks = flags.take(marked)

        def places(flag: int) -> np.ndarray:
            return marked[(marks & flag) > 0]

        hard = [places(HARD)]
        if len(empty := places(EMPTY)):
            _inside_white(classes, is_start, empty)
        if len(slashes := places(SLASH)):
            _take_slashes(text, classes, is_start, slashes[text.take(slashes) == ord("/")])
        # At most places by far there is no mark but this, and punctuation of one byte.
        joined = (flags[1:] & np.uint8(JOIN)) != 0
        joined &= is_start[:-1]
        is_start[1:] ^= joined
        if not rules.ascii_words:
            single = is_start.take(wide) & ((flags.take(wide + size) & JOIN) > 0)
            is_start[(wide + size)[single]] = False
        if rules.contractions:
            joined &= text[: len(joined)] == ord("'")
            hard.append(_contractions(text, classes, is_start, np.flatnonzero(joined) + 1, rules))
        if len(case := places(CASE)):
            if rules.cases:
                is_start[case[_ends_word(classes, is_start, case)]] = True
            else:  # a word that began with punctuation ends with its letters of ASCII
                first = _run_start(classes, case - 1, _ONLY[LOWER])
                is_start[case[~is_start.take(first) & (classes.take(first - 1) == OTHER)]] = True
        if len(digits := places(DIGITS)):
            _cut_digits(text, is_start, digits, rules.max_digits)
        if len(at := np.concatenate(hard)):
            self._by_expression(text, classes, is_start, np.sort(at))

    def _by_expression(self, text: np.ndarray, classes: np.ndarray, is_start: np.ndarray, hard: np.ndarray) -> None:
        """The expression's own pre-tokens on stretches around the hard places."""
        assert self._expression is not None
        n = len(is_start) - 1
        # Where pre-tokens end whatever is before, and the expression does not look behind: mostly before blanks.
        ends = _INK.take(classes[: n - 1]) & _ONLY[BLANK].take(classes[1:n])
        ends |= (classes[: n - 1] == SEP) | (classes[1:n] == SEP)
        safe = np.concatenate([[0], np.flatnonzero(ends) + 1, [n]])
        stretch = np.searchsorted(safe, hard, side="right")
        for k in stretch[np.append(True, np.diff(stretch) > 0)].tolist():
            start, stop = int(safe[k - 1]), int(safe[k])
            is_start[start + 1 : stop] = False
            for match in self._expression.finditer(text[start:stop].tobytes().decode()):
                is_start[start] = True
                start += len(match[0].encode())


_ONLY = np.eye(16, dtype=bool)
_INK = ~(_ONLY[BLANK] | _ONLY[SPACE] | _ONLY[NEWLINE] | _ONLY[SEP])
_CASELESS = _ONLY[UNCASED] | _ONLY[MARK]
# Runs are followed character by character, up to so many.
_STEPS = 16


def _flags(before: int, here: int, rules: Rules) -> int:
    """Of a place between characters of two classes: whether a pre-token starts there, or at the last character before.

    (Whatever else the classes' numbers could be, above SEP, never occurs.)
    """
    flags = START if before != here or before == SEP else 0
    if before in _LETTERS and here in _LETTERS:
        flags = START if rules.cases and (before, here) == (LOWER, UPPER) else 0
    if (
        (here in _LETTERS and before in (BLANK, SPACE, UNMATCHED))
        or (here == OTHER and before == BLANK)
        or (here == NEWLINE and before in (BLANK, SPACE, OTHER))
        or (here in _WHITE and before in _WHITE)
    ):
        flags = 0
    words = (*_LETTERS, UNMATCHED, OTHER) if rules.ascii_words else (*_LETTERS, OTHER, NUMBER)
    if (before, here) == (CJK_UNMATCHED, CJK):
        flags = 0
    if (
        (before in _WHITE and here in words)
        or (before == UNMATCHED and here in _LETTERS)
        or (before, here) == (CJK_UNMATCHED, CJK)
    ):
        flags |= BEFORE
    if before == OTHER and here in _LETTERS and (here == LOWER or not rules.ascii_words):
        flags |= HARD if rules.cases and here == MARK else JOIN
    if before in _WHITE and (here == NEWLINE or (here == SEP and rules.whole_end)):
        flags |= EMPTY
    if before == here == NUMBER:
        flags |= DIGITS
    if rules.cases and before in (UNCASED, MARK) and here == UPPER:
        flags |= CASE
    if rules.ascii_words and before == LOWER and here == UNCASED:
        flags |= CASE
    if rules.cases and before == NEWLINE and here == OTHER:
        flags |= SLASH
    return flags


def _run_start(classes: np.ndarray, at: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Where the run of these classes starts that each place is in."""
    for _ in range(_STEPS):
        inside = members.take(classes.take(at - 1))  # at the text's start that is its padding's end
        if not inside.any():
            return at
        at = at - inside
    member = members.take(classes)
    runs = np.flatnonzero(np.append(member[0], member[1:] & ~member[:-1]))
    return runs[np.searchsorted(runs, at, side="right") - 1]


def _run_end(classes: np.ndarray, at: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The first place that is no longer of these classes."""
    for _ in range(_STEPS):
        inside = members.take(classes.take(at))
        if not inside.any():
            return at
        at = at + inside
    others = np.flatnonzero(~members.take(classes))
    return others[np.searchsorted(others, at)]


def _taken(classes: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Whether the line ends that end at each place belong to the punctuation before them."""
    return classes.take(_run_start(classes, after - 1, _ONLY[NEWLINE]) - 1) == OTHER


def _inside_white(classes: np.ndarray, is_start: np.ndarray, at: np.ndarray) -> None:
    """Blanks between two line ends, and at the end of a text, start no pre-token. `at` is where they end.

    They do if the line end before them belongs to punctuation.
    """
    start = _run_start(classes, at - 1, _ONLY[BLANK] | _ONLY[SPACE])
    start = start[classes.take(start - 1) == NEWLINE]
    is_start[start[~_taken(classes, start)]] = False


def _take_slashes(text: np.ndarray, classes: np.ndarray, is_start: np.ndarray, at: np.ndarray) -> None:
    """Slashes after line ends that belong to punctuation belong there too."""
    at = at[_taken(classes, at)]
    is_start[at] = False
    end = _run_end(text, at, np.arange(256) == ord("/"))
    is_start[end] = classes.take(end) != NEWLINE


def _ends_word(classes: np.ndarray, is_start: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whether the capitals at `at`, after letters without case, start a word.

    [capitals and letters without case]*[small and without case]+ ends there if the former is over, that is if a small
    letter came before; or if no letter follows the capitals, since then it must end before them.
    """
    first = _run_start(classes, at - 1, _CASELESS)
    after_small = (classes.take(first - 1) == LOWER) & ~is_start.take(first)  # which may be a contraction's
    following = classes.take(_run_end(classes, at, _ONLY[UPPER]))
    return after_small | ~np.isin(following, (LOWER, UNCASED, MARK))


def _contractions(
    text: np.ndarray, classes: np.ndarray, is_start: np.ndarray, at: np.ndarray, rules: Rules
) -> np.ndarray:
    """'s, 't, 'm, 'd, 'll, 've, 're in either case; `at` is after the apostrophe. Returns hard places."""
    x, y = text.take(at) | 0x20, text.take(at + 1) | 0x20
    long_s = (text.take(at) == 0xC5) & (text.take(at + 1) == 0xBF)  # which is an s to (?i)
    one = ((x == ord("s")) | (x == ord("t")) | (x == ord("m")) | (x == ord("d"))) & (text.take(at) < 0x80)
    two = (x == ord("l")) & (y == ord("l")) | (x == ord("v")) & (y == ord("e")) | (x == ord("r")) & (y == ord("e"))
    two = long_s | (two & (text.take(at) < 0x80) & (text.take(at + 1) < 0x80))
    length = one + 2 * two
    at, length = at[length > 0], length[length > 0]
    hard = at[:0]
    if rules.contractions == "joined":
        letter = (at > 1) & np.isin(classes.take(at - 2), _LETTERS)
        at, length = at[letter], length[letter]
        is_start[at - 1] = False
        # An apostrophe where a contraction ends is that of a word: x'll'll.
        hard = at[np.isin(at - 1, at + length)]
        is_start[at[length > 1] + 1] = False
    is_start[at + length] = True
    return hard


def _cut_digits(text: np.ndarray, is_start: np.ndarray, at: np.ndarray, most: int) -> None:
    """A start after each `most` characters of a number. `at` is all of its bytes but the first."""
    is_first = (text.take(at) & 0xC0) != 0x80
    n = np.cumsum(is_first)
    before = np.where(np.diff(at, prepend=-1) > 1, n - is_first, 0)  # characters that are another number's
    n -= np.maximum.accumulate(before)
    is_start[at[is_first & (n % most == 0)]] = True
