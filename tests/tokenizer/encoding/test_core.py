"""tiktoken's core as an engine: the ids of the engine without it, on every pattern, or it is not used."""

from __future__ import annotations

import pickle
import random
import sys
import unicodedata
from base64 import b64encode
from contextlib import nullcontext
from pathlib import Path

import pytest
import regex
from tiktoken import _tiktoken

from rooflight.tokenizer import PATTERNS, Tokenizer, train_bpe
from rooflight.tokenizer.encoding.core import disputed, is_by_rank
from support import bpe_reference

END, PAD = "<|endoftext|>", "<pad>"
# U+0295 changed its class, U+0558 and U+A7CE came late: letters to some versions of Unicode.
LATE = ["\u0295", "\u0558", "\ua7ce", "\U000323b0"]
ATOMS = [
    *(" ", "  ", "\n", "\r\n", "\t", "\x85", "\xa0", "\u3000", "\u2028", "\x0b", "\x1c", "\x00", "\u200d", "\ufeff"),
    *("a", "B", "the", " cat", "Abc", "aBC", "é", "É", "ß", "ж", "Ж", "日", "本", "ア", "ー", "ǅ", "ª", "ʰ", "한", "ก"),
    *("\u0301", "\ufe0f", "\u093f", "नम", "1", "23", "4567", "٣", "½", "²", "Ⅻ", "'", "'s", "'LL", "'re", "'\u017f"),
    *("!", "!!", "/", "//", "(", "—", "。", "¶", "😀", "👍🏽", "$", "\ue000", "\U0001d4b3", "_", "-", "\ufffd", "<|"),
    *(END, PAD, *LATE),
]


def without(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that has no compiled code."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    copy._encoder.warm_up(None)
    copy._is_warm = True
    return copy


def uses_core(tokenizer: Tokenizer) -> bool:
    return tokenizer._words.compiled is not None


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "x.txt"
    rng = random.Random(0)
    text = "".join(rng.choices(ATOMS, k=20_000)).replace("\0", "").replace("\ufffd", "")
    path.write_text(text + Path(__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    vocab, merges = train_bpe(path, 1200, [END, PAD], pattern=request.param, num_workers=1)
    return Tokenizer(vocab, merges, [END, PAD], pattern=request.param)


def test_the_ids_are_those_without_it(tokenizer: Tokenizer) -> None:
    plain = without(tokenizer)
    assert uses_core(tokenizer)
    assert not uses_core(plain)
    assert (tokenizer._encoder._encode_text is not None) == isinstance(tokenizer.pattern, str)
    rng = random.Random(1)
    for n in range(400):
        atoms = rng.sample(ATOMS, rng.choice((4, 8, len(ATOMS))))
        text = "".join(rng.choices(atoms, k=n % 60 if n % 40 else 4000))
        for allowed in ("all", "none", {PAD}) if n % 4 else ("all",):
            ids = tokenizer.encode(text, allowed_special=allowed)
            assert ids == plain.encode(text, allowed_special=allowed)
        # ... and those of the arrays, which a long text gets
        assert tokenizer.encode(text) == tokenizer.encode_bytes(text.encode()).tolist()


def test_lone_surrogates_are_refused_alike(tokenizer: Tokenizer) -> None:
    for text in ("\ud800", "a cat \udfff", "日本\ud83d" * 3000):
        for each in (tokenizer, without(tokenizer)):
            with pytest.raises(ValueError, match="is a lone surrogate"):
                each.encode(text)


def test_what_is_not_disputed_is_of_one_class() -> None:
    sure = disputed().sub("", "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)])))
    assert len(sure) > 49_000
    assert not any(character in sure for character in LATE)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for class_ in ("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S"):
        theirs = _tiktoken.CoreBPE(ranks, {}, rf"\p{{{class_}}}+")
        assert theirs.decode_bytes(theirs.encode_ordinary(sure)).decode() == "".join(
            regex.findall(rf"\p{{{class_}}}+", sure)
        )
    # Python's own, an older or newer one, agrees too.
    numbers = "".join(c for c in sure if unicodedata.category(c)[0] == "N")
    assert numbers == "".join(regex.findall(r"\p{N}+", sure))


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_it_is_used_only_where_ranks_say_the_same(ignore_merges: bool, tmp_path: Path) -> None:
    seen = set()
    for seed in range(120):
        rng = random.Random(seed)
        tokens, merges = ["a", "b"], []
        for _ in range(rng.randrange(1, 8)):
            pair = (rng.choice(tokens), rng.choice(tokens))
            if len(pair[0] + pair[1]) < 7 and "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append((pair[0].encode(), pair[1].encode()))
        vocab = dict(enumerate([bytes([byte]) for byte in range(256)] + [token.encode() for token in tokens[2:]]))
        if rng.random() < 0.2:
            rng.shuffle(merges)
        tokenizer = Tokenizer(vocab, merges, ignore_merges=ignore_merges)
        assert tokenizer.is_by_rank == uses_core(tokenizer)
        seen.add(tokenizer.is_by_rank)
        # A slower way to tell, which also refuses merges that never happen, as there are with ignore_merges.
        if not (ignore_merges and tokenizer.is_by_rank):
            with nullcontext() if tokenizer.is_by_rank else pytest.raises(ValueError, match="tiktoken"):
                tokenizer.export_tiktoken(tmp_path / "ranks")
        for word in ("".join(rng.choices("ab", k=k)) for k in range(1, 12)):
            if not (ignore_merges and word.encode() in vocab.values()):
                expected = bpe_reference.encode_word(word.encode(), merges)
                assert [vocab[i] for i in tokenizer.encode(word)] == expected
    assert seen == {False, True}


def test_what_is_known_of_ranks_is_what_would_be_found_out(tmp_path: Path) -> None:
    seen = set()
    for seed in range(80):
        rng = random.Random(seed)
        words = {"".join(rng.choices("abc", k=rng.choice((2, 2, 2, 3, 3, 4, 5)))) for _ in range(9)}
        ranks = dict(enumerate([bytes([byte]) for byte in range(256)] + [word.encode() for word in sorted(words)]))
        if rng.random() < 0.7:
            ranks = dict(enumerate([*list(ranks.values())[:256], *sorted(list(ranks.values())[256:], key=len)]))
        path = tmp_path / "ranks"
        path.write_bytes(b"".join(b64encode(token) + b" %d\n" % i for i, token in ranks.items()))
        specials = {"<s>": 300} if seed % 4 else {ranks[256].decode(): 256}
        tokenizer = Tokenizer.from_tiktoken(path, special_tokens=specials)
        assert tokenizer.is_by_rank == is_by_rank(tokenizer.definition) == uses_core(tokenizer)
        seen.add((tokenizer.is_by_rank, tokenizer.ignore_merges))
        peer = _tiktoken.CoreBPE({token: i for i, token in ranks.items()}, {}, tokenizer.pattern)
        for word in ("".join(rng.choices("abc", k=k)) for k in range(1, 40)):
            if seed % 4:
                assert tokenizer.encode_bytes(word.encode()).tolist() == peer.encode_ordinary(word)
    assert len(seen) >= 3


def test_without_the_package_all_works_as_before(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken._tiktoken", None)
    plain = Tokenizer(tokenizer.vocab, tokenizer.merges, [END, PAD], pattern=tokenizer.pattern)
    assert not uses_core(plain)
    assert plain.encode(f"the cat{END}日本") == tokenizer.encode(f"the cat{END}日本")


def test_a_pickled_tokenizer_makes_it_when_it_is_needed(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_bytes(b"the cat").tolist() == tokenizer.encode("the cat")
    assert not uses_core(copy)
    assert copy.encode("the cat") == tokenizer.encode("the cat")
    assert uses_core(copy)


def test_special_tokens_that_merges_make_or_that_are_bytes_are_no_ranks() -> None:
    vocab = {byte: bytes([byte]) for byte in range(256)}
    made = Tokenizer(vocab | {256: b"ab"}, [(b"a", b"b")], ["ab"])
    assert not made.is_by_rank
    assert made.encode("cab", allowed_special="none") == made.encode("cab") == [99, 256]
    tokenizer = Tokenizer(vocab, [], {"a": 97})
    assert not tokenizer.is_by_rank
    assert tokenizer.encode("cab", allowed_special="none") == [99, 97, 98]
