"""The patterns known by name, by arrays, against `regex`, `tokenizers` and `tiktoken`."""

from __future__ import annotations

import random
import re

import pytest
import regex
import tiktoken.load
import tokenizers
from tokenizers import pre_tokenizers

from rooflight.tokenizer import Tokenizer, train_bpe, train_bpe_from_iterator
from rooflight.tokenizer.pretokenize import PATTERNS, Cutter, Specials, for_oniguruma, pretokenize
from rooflight.tokenizer.pretokenize.cut import by_expression
from rooflight.tokenizer.pretokenize.patterns import is_gpt2, is_vectorised

NAMES = [*PATTERNS]
# Each class of characters that a pattern tells apart, in one byte and in several; contractions in each case; a
# separator; characters without a class.
ATOMS = [
    *(" ", "  ", "\n", "\r", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028", "\x0b"),
    *("a", "B", "x", "é", "É", "ж", "Ж", "日", "本", "ア", "ー", "・", "゛", "\u3040", "ǅ", "ª", "ʰ", "한"),
    *("\u0301", "\u0308", "\ufe0f", "\u093f", "1", "23", "4567", "٣", "½", "²", "Ⅻ"),
    *("'", "’", "'s", "'S", "'ll", "'lL", "'Ve", "'re", "'\u017f", "\u017f"),  # noqa: RUF001
    *("!", "!!", "/", "//", "(", "—", "。", "❤", "😀", "$", "+", "_", '"', "abc", "ABC", "Abc", "aBC"),
    *("\x00", "\u200d", "\u200b", "\ue000", "\U000e0001", "\U0001d4b3", "\xff"),
]


def random_texts(seed: int, n: int, more: tuple[str, ...] = ()) -> list[bytes]:
    """Strings of few kinds of atoms and of all, and `more`; a separator for the atom 0xFF."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        atoms = rng.sample(ATOMS, rng.choice((3, 5, 8, len(ATOMS))))
        parts = rng.choices([*atoms, *more], k=rng.choice((2, 3, 4, 5, 8, 12, 30, 60)))
        found.append(b"".join(b"\xff" if part == "\xff" else part.encode() for part in parts))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_random_strings_are_split_as_the_expression_says(name: str) -> None:
    for data in random_texts(0, 600):
        assert pretokenize(data, PATTERNS[name]).tolist() == by_expression(data, PATTERNS[name]).tolist(), data


@pytest.mark.parametrize("name", NAMES)
def test_characters_of_every_block_in_many_contexts(name: str) -> None:
    # The first of every run of characters that a class tells apart.
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    kinds = regex.finditer(
        r"\p{Lu}+|\p{Ll}+|\p{Lt}+|\p{Lm}+|\p{Lo}+|\p{M}+|\p{N}+|\p{P}+|\p{S}+|\s+|\p{C}+", everything
    )
    text = "".join(
        f"a{c}B {c}{c}b!{c}1\n{c}\n'{c} {c}" for match in kinds for c in {match[0][0], match[0][-1]} if c < "\U00020000"
    )
    data = text.encode()
    assert pretokenize(data, PATTERNS[name]).tolist() == by_expression(data, PATTERNS[name]).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [" ", "\n", "/", "A", "日", "\u0301", "!", "1", "a", "\u3000"])
def test_long_runs(name: str, run: str) -> None:
    """Longer than the steps that a run is followed character by character."""
    for before in ("", "!\n", "x", "ア", "a\n", "'"):
        for after in ("", "\n", "x", "B", " ", "/"):
            data = f"{before}{run * 50}{after}".encode()
            assert pretokenize(data, PATTERNS[name]).tolist() == by_expression(data, PATTERNS[name]).tolist(), data


@pytest.mark.parametrize("name", NAMES)
def test_cuts_are_safe(name: str) -> None:
    cutter = Cutter(Specials(()), PATTERNS[name])
    n_cuts = 0
    for data in random_texts(1, 150, ("a ", "1\n", "B  ")):
        data = b"".join(data.split(b"\xff"))
        whole = pretokenize(data, PATTERNS[name]).tolist()
        at = 0
        while (at := cutter.find(data, at + 1)) >= 0:
            n_cuts += 1
            pieces = [pretokenize(piece, PATTERNS[name]).tolist() for piece in (data[:at], data[at:])]
            assert [*pieces[0], *pieces[1]] == whole, (data, at)
    assert n_cuts > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_that_of_tokenizers(name: str) -> None:
    parts = [PATTERNS[name]] if isinstance(PATTERNS[name], str) else PATTERNS[name]
    splits = [pre_tokenizers.Split(tokenizers.Regex(for_oniguruma(part)), "isolated") for part in parts]
    peer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    for data in random_texts(2, 500):
        # (Oniguruma's Unicode gives the private use and the unassigned other classes in places.)
        text = data.replace(b"\xff", b"").decode()
        theirs = [len(word) for word, _ in peer.pre_tokenize_str(text)]
        assert pretokenize(text.encode(), PATTERNS[name]).lengths.tolist() == theirs, text


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [data.translate(None, b"\xff\x00").decode() for data in random_texts(3, 700)]


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(PATTERNS[name], str)])
def test_ids_are_those_of_tiktoken(name: str, corpus: list[str], tmp_path) -> None:
    tokenizer = Tokenizer(*train_bpe_from_iterator(corpus, 1500, [], pattern=name, num_workers=1), pattern=name)
    tokenizer.export_tiktoken(tmp_path / "x.tiktoken")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "x.tiktoken"))
    peer = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    assert [tokenizer.encode(text) for text in corpus] == peer.encode_ordinary_batch(corpus)
    together = "\n".join(corpus)
    assert tokenizer.encode(together) == peer.encode_ordinary(together)


def test_names_stand_for_patterns_everywhere(corpus: list[str], tmp_path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(corpus), encoding="utf-8", newline="")
    for name in NAMES:
        trained = train_bpe(tmp_path / "x.txt", 400, [], pattern=name, num_workers=1)
        assert trained == train_bpe(tmp_path / "x.txt", 400, [], pattern=PATTERNS[name], num_workers=1)
        tokenizer = Tokenizer(*trained, pattern=name)
        assert tokenizer.pattern == PATTERNS[name]
        tokenizer.save(tmp_path / name)
        loaded = Tokenizer.load(tmp_path / name)
        assert (loaded.hash, loaded.pattern) == (tokenizer.hash, tokenizer.pattern)
        tokenizer.export_hf(tmp_path / f"{name}.json")
        assert Tokenizer.from_hf(tmp_path / f"{name}.json").hash == tokenizer.hash


@pytest.mark.parametrize(
    "pattern",
    [
        # tiktoken's r50k; cl100k as js-tiktoken has it, as tiktoken 0.4 had it; nanochat; as tokenizer.json has them.
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        *(
            rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,{n}}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+"
            for n in (3, 2)
        ),
        for_oniguruma(PATTERNS["cl100k"]),
    ],
)
def test_other_spellings_are_as_fast_and_exact(pattern: str) -> None:
    assert is_vectorised(pattern)
    for data in random_texts(4, 200):
        assert pretokenize(data, pattern).tolist() == by_expression(data, pattern).tolist()


def test_other_patterns_are_told_apart() -> None:
    for pattern in PATTERNS.values():
        if isinstance(pattern, str):
            assert not is_vectorised(pattern.replace(r"\p{N}", r"\d"))
            assert not is_vectorised(f"{pattern}|x")
    assert is_gpt2(PATTERNS["gpt2"])
    with pytest.raises(ValueError, match=re.escape("expected a regular expression, several, or one of ['gpt2', ")):
        Tokenizer({i: bytes([i]) for i in range(256)}, [], pattern=())
    with pytest.raises(ValueError, match="is no regular expression"):
        Tokenizer({i: bytes([i]) for i in range(256)}, [], pattern=["a", "["])
