"""The vectorised pre-tokeniser against the regular-expression engine that it stands in for."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from rooflight.tokenizer.pretokenize import (
    GPT2_PATTERN,
    PADDING,
    SEPARATOR,
    Specials,
    pretokenize,
    repair,
    utf8,
)

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s"
)

# White space of one, two and three bytes, and what looks like it.
SPACES = [*" \n\t\x0b\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000\u200b\ufeff", "  ", "\r\n"]
# Letters, marks, numbers, punctuation, emoji, controls, and every contraction with its near misses.
WORDS = regex.findall(
    r"\S+",
    "a B é ß 日本 한 क \u093e \u0301 ǅ \U00020000 1 23 ٣ Ⅷ ² ½ . !! _ - « 😀 👩\u200d👧 \x00 \x07 \x7f \ufffd \uffff "
    "' '' \u2019s 'S 's 't 'd 'm 'l 'll 've 'v 're 'sx s ll e",
)
ATOMS = [*SPACES, *WORDS]
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(ATOMS), max_size=14).map("".join))


def by_regex(documents: list[str], pattern: str) -> list[bytes]:
    """The pre-tokens of each document, with a separator between documents."""
    found = []
    for document in documents:
        found += [SEPARATOR, *(match[0].encode() for match in regex.finditer(pattern, document) if match[0])]
    return found[1:]


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_any_text(documents):
    data = SEPARATOR.join(map(utf8, documents))
    assert pretokenize(data).tolist() == by_regex(documents, GPT2_PATTERN)


@given(st.lists(TEXT, min_size=1, max_size=3), st.sampled_from([CL100K, r"\w+", r"(\w)(\d)|\s*", r".{1,3}"]))
def test_any_text_by_another_pattern(documents, pattern):
    data = SEPARATOR.join(map(utf8, documents))
    assert pretokenize(data, pattern).tolist() == by_regex(documents, pattern)


# After a letter, after a space and before a letter; and among punctuation, digits and the ends of lines.
@pytest.mark.parametrize("context", ["a%s %sa", pytest.param("|%s.'%s1\n%s%s x", marks=pytest.mark.slow)])
def test_every_code_point(context):
    code_points = [*range(0xD800), *range(0xE000, 0x110000)]
    text = "".join(context.replace("%s", chr(code_point)) for code_point in code_points)
    data = text.encode()
    pretokens = pretokenize(data)
    spans = np.array([match.span() for match in regex.finditer(GPT2_PATTERN, text)])
    byte_of = np.append(np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80), len(data))
    np.testing.assert_array_equal(pretokens.starts, byte_of[spans[:, 0]])
    np.testing.assert_array_equal(pretokens.starts + pretokens.lengths, byte_of[spans[:, 1]])


def test_real_text():
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / name).read_text("utf-8") for name in ("typing.py", "inspect.py", "html/entities.py"))
    assert pretokenize(text.encode()).tolist() == by_regex([text], GPT2_PATTERN)


def test_both_spellings_of_the_pattern_agree():
    spelt_out = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    data = b"we'll say 'it's' they've  gone, I'd 12"
    assert pretokenize(data, spelt_out).tolist() == pretokenize(data).tolist() == by_regex([data.decode()], spelt_out)


def test_offsets_point_into_the_padded_text():
    data, starts, lengths = pretokenize("naïve  text".encode())
    assert data == "naïve  text".encode() + PADDING
    assert starts.tolist() == [0, 6, 7]
    assert lengths.tolist() == [6, 1, 5]


@given(st.binary(max_size=40))
def test_invalid_bytes_become_replacement_characters(data):
    assert repair(data) == data.decode("utf-8", errors="replace").encode()


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match=r"'\\udc80' at position 2 is a lone surrogate"):
        utf8("ab\udc80")


def test_a_pattern_that_does_not_compile_is_refused():
    with pytest.raises(ValueError, match=r"pattern: '\(' is no regular expression"):
        pretokenize(b"text", "(")


def test_specials_longest_first():
    specials = Specials({"<a>": 7, "<a><b>": 8, "é": 9})
    data = "x<a><b><a>y<b>é".encode()
    masked, ids = specials.mask_ids(data)
    assert masked == specials.mask(data) == b"x\xff\xffy<b>\xff"
    assert ids.tolist() == [8, 7, 9]
    assert specials.split(data.decode()) == ["x", "<a><b>", "", "<a>", "y<b>", "é", ""]
    assert Specials([]).mask(data) == data
    assert Specials([]).mask_ids(data)[1].tolist() == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([""], "got '', expected non-empty strings"),
        (["<a>", "<b>", "<a>"], "'<a>' is given more than once"),
        (["\ufffd"], "without U\\+FFFD"),
        (["\ud800"], "lone surrogate"),
        ("<a>", "expected a list of strings"),
        ([b"<a>"], "expected non-empty strings"),
    ],
)
def test_bad_specials_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        Specials(tokens)
