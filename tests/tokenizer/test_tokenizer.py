"""Tokenizer: encoding against a slow reference, specials, decoding, streams, and what it refuses."""

from __future__ import annotations

import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rooflight.tokenizer import GPT2_PATTERN, PATTERNS, Tokenizer
from rooflight.tokenizer import tokens as token_bytes
from rooflight.tokenizer.encoding import encoder as encode
from rooflight.tokenizer.pretokenize import Specials, for_ascii
from rooflight.tokenizer.pretokenize.chunks import Cutter, cut_stream
from rooflight.tokenizer.tokens import TokenBytes
from support import bpe_reference

END = "<|endoftext|>"
CORPUS = (
    "the cat sat on the mat; the cat's hat wasn't there. They'll see that the theatre's lit: 1234 5678 12\n\n"
    "naïve café, 日本語日本語, привет приветы \U0001f600\U0001f600  aaaaaaaa  \t\n"
) * 3
VOCAB, MERGES = bpe_reference.train(CORPUS, 80)

# Text that meets the merges often: pieces of the corpus, specials and parts of them, and anything else.
pieces = st.one_of(
    st.sampled_from([CORPUS[i : i + 7] for i in range(0, len(CORPUS) // 3, 5)]),
    st.sampled_from([END, END + END, "<|endof", "|>", " ", "\n", "\x00", "'s", "'ll", "\u3000", "a" * 90]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCAB, MERGES, [END, END + END])


@given(text=texts)
@example(text="")
@settings(max_examples=300, deadline=None)
def test_encode_equals_the_reference_and_decodes_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == bpe_reference.encode(text, tokenizer.vocab, MERGES, (END, END + END))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("name", [name for name, pattern in PATTERNS.items() if isinstance(pattern, str)])
def test_short_ascii_is_split_as_the_pattern_says(name: str) -> None:
    atoms = [*map(chr, range(128)), "'s", "'LL", "'re", "  ", "\r\n", "ab", "AB", "Ab", "1234", "\n\n", "//"]
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choices(rng.sample(atoms, 12), k=20))
        assert for_ascii(PATTERNS[name]).findall(text) == regex.findall(PATTERNS[name], text)


def test_short_texts_above_the_first_plane(tokenizer: Tokenizer) -> None:
    text = "a\U00010400b \U0001f600\U0001f601 \U0001d7d81 \U000323afx"  # letters, symbols and a digit up there
    assert tokenizer.encode(text) == bpe_reference.encode(text, tokenizer.vocab, MERGES)


@given(text=texts, cuts=st.lists(st.integers(0, 100), max_size=8))
@settings(max_examples=200, deadline=None)
def test_encode_iterable_equals_encode_wherever_pieces_end(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[i:j] for i, j in itertools.pairwise(bounds)]
    assert list(tokenizer.encode_iterable(parts)) == tokenizer.encode(text)


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_offsets_are_the_characters_of_each_token(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode(text, offsets=True)
    assert ids == tokenizer.encode(text)
    for i, (start, end) in zip(ids, offsets, strict=True):
        assert tokenizer.vocab[i] in text[start:end].encode()
        # no character more than the token touches
        assert tokenizer.vocab[i] not in text[start + 1 : end].encode() or end - start == 1
    assert "".join(text[start:end] for start, end in sorted(set(offsets))) == text


@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_incremental_decoding_never_splits_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.decoder()
    parts = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert "".join(parts) + decoder.finish() == text


def test_incremental_decoding_of_broken_characters_equals_decode(tokenizer: Tokenizer) -> None:
    ids = [VOCAB_ID[b] for b in (b"\xe6", b"\x97", b"a", b"\xf0", b"\x9f")]
    decoder = tokenizer.decoder()
    assert [decoder.push(i) for i in ids] == ["", "", "\ufffda", "", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ids[2:3]) == "a"
    assert tokenizer.decode(ids) == "\ufffda\ufffd"


VOCAB_ID = {token: i for i, token in VOCAB.items()}


@given(text=texts, piece=st.integers(1, 40), block=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_text_cut_into_pieces_encodes_as_the_whole(tokenizer: Tokenizer, text: str, piece: int, block: int) -> None:
    data = text.encode()
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    cut = list(cut_stream(blocks, Cutter(Specials([END, END + END])), piece))
    assert b"".join(cut) == data
    assert [i for part in cut for i in tokenizer.encode_bytes(part).tolist()] == tokenizer.encode(text)


def test_long_text_is_cut_into_pieces_of_the_wanted_size() -> None:
    text = (CORPUS.replace(" 12", "   ") + END).encode() * 100
    for pattern, most in ((GPT2_PATTERN, 2000), (r"\S+|\s+", 2500)):
        sizes = [len(piece) for piece in cut_stream([text], Cutter(Specials([END]), pattern), 1000)]
        assert max(sizes) < most
        blocks = [text[i : i + 100] for i in range(0, len(text), 100)]
        sizes = [len(piece) for piece in cut_stream(blocks, Cutter(Specials([END]), pattern), 1000)]
        assert max(sizes) < most


def test_the_longest_special_token_wins(tokenizer: Tokenizer) -> None:
    one, two = tokenizer.special_tokens[END], tokenizer.special_tokens[END + END]
    assert tokenizer.encode(END * 3) == [two, one]


def test_allowed_special(tokenizer: Tokenizer) -> None:
    text = f"the{END}"
    plain = bpe_reference.encode(text, VOCAB, MERGES)
    end = tokenizer.special_tokens[END]
    assert tokenizer.encode(text, allowed_special="none") == plain
    assert tokenizer.encode(text, allowed_special={END + END}) == plain
    assert tokenizer.encode(text, allowed_special={END})[-1] == end
    assert tokenizer.encode(END + END, allowed_special={END}) == [end, end]
    with pytest.raises(ValueError, match="none_raise"):
        tokenizer.encode(text, allowed_special="none_raise")
    assert tokenizer.encode("the", allowed_special="none_raise") == tokenizer.encode("the")
    with pytest.raises(ValueError, match="none_raise"):
        list(tokenizer.encode_iterable(["the<|endof", "text|>"], allowed_special="none_raise"))
    with pytest.raises(ValueError, match="allowed_special: got 'some'"):
        tokenizer.encode(text, allowed_special="some")
    with pytest.raises(ValueError, match="not special tokens"):
        tokenizer.encode(text, allowed_special={"<|other|>"})


def test_a_special_token_of_the_vocabulary_keeps_its_id_and_a_new_one_is_appended() -> None:
    vocab = {0: END.encode(), **{i + 1: token for i, token in VOCAB.items()}}
    tokenizer = Tokenizer(vocab, MERGES, [END, "<|pad|>"])
    assert tokenizer.special_tokens == {END: 0, "<|pad|>": len(vocab)}
    assert tokenizer.vocab_size == len(vocab) + 1


def test_the_lowest_rank_is_merged_first_even_when_a_merge_makes_a_lower_one() -> None:
    # b'ab' is listed after the pair (b'ab', b'c') that needs it: after each merge the lowest rank is looked for again.
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abc", 258: b"ca"}
    merges = [(b"ab", b"c"), (b"a", b"b"), (b"c", b"a")]
    for text in ("abcabc", "abcab" * 40):
        assert Tokenizer(vocab, merges).encode(text) == bpe_reference.encode(text, vocab, merges)


# b"abc" is a token, but no text has it: of "abc" b"bc" is merged first.
UNREACHED = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"d", b"abc"), (b"c", b"d")]
WORDS = st.text("abcd é日", min_size=1, max_size=12)


def unreached(**keywords) -> Tokenizer:
    tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in UNREACHED] + [b"\xc3\xa9", b"\xa9a"]
    return Tokenizer(dict(enumerate(tokens)), UNREACHED, **keywords)


@given(words=st.lists(WORDS, max_size=8))
@example(words=["abc", "dabc", "bc", "ab", "cd", "é", "éa"])
@settings(max_examples=200, deadline=None)
def test_tokens_that_are_not_the_encoding_of_their_own_text(words: list[str]) -> None:
    tokenizer = unreached()
    for word in [*words, *words]:
        assert tokenizer.encode(word) == bpe_reference.encode(word, tokenizer.vocab, UNREACHED)


def test_tokens_that_no_merges_lead_to_are_words_of_their_own_with_ignore_merges() -> None:
    plain, ignoring, special = unreached(), unreached(ignore_merges=True), unreached(special_tokens=["abc", "bc"])
    assert ignoring.encode("abc") == [258]
    assert special.encode("abc") == [258]
    assert special.encode("abc", allowed_special="none") == plain.encode("abc") == [97, 256]
    assert special.encode("bc", allowed_special="none") == special.encode("bc") == [256]


def test_short_texts_remember_a_bounded_number_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_SHORT_TEXT_WORDS", 20)
    tokenizer = unreached()
    words = tokenizer._encoder._words
    for i in range(100):
        word = f"abc{i}x{i}"
        assert tokenizer.encode(word) == bpe_reference.encode(word, tokenizer.vocab, UNREACHED)
        assert tokenizer.encode("cd") == [260]
        assert len(words) + len(words._old) <= 20
        assert "cd" in words or "cd" in words._old  # what is asked for again and again is not forgotten


def test_special_tokens_are_found_whatever_they_have_in_common() -> None:
    for specials in ([], ["<a>"], ["<a>", "<ab>", "<a"], ["<a>", "[b]"]):
        tokenizer = Tokenizer(VOCAB, MERGES, specials)
        for text in ("", "the cat<a>the<ab> <a[b]", "<a>", "[b]", "<", "the cat"):
            assert tokenizer.encode(text) == bpe_reference.encode(text, tokenizer.vocab, MERGES, tuple(specials))
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode("a\ud800")


def test_a_long_text_is_a_list_of_ints() -> None:
    tokenizer = Tokenizer(VOCAB, MERGES)
    ids = tokenizer.encode(CORPUS * 20)
    assert {type(i) for i in ids} == {int}
    assert ids == tokenizer.encode_bytes((CORPUS * 20).encode()).tolist()


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        list(tokenizer.encode_iterable([text]))


@pytest.mark.parametrize("ids", [[-1], [-338], [3, -676], [-677], [338], [10_000], [0, 1 << 40], np.array([5, 9999])])
def test_decode_refuses_ids_out_of_range(tokenizer: Tokenizer, ids) -> None:
    with pytest.raises(ValueError, match="not in the vocabulary, expected 0 <= id < 338"):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match="not in the vocabulary, expected 0 <= id < 338"):
        tokenizer.decode([*[0] * 2000, *ids])


@pytest.mark.parametrize(
    "ids", [[1.5], [1.0, 2], [1.5] * 2000, np.ones(3), ["a"], ["a"] * 2000, [None, 1], [[1], 2], [1 << 70] * 2000]
)
def test_decode_refuses_what_is_no_integer(tokenizer: Tokenizer, ids) -> None:
    with pytest.raises(ValueError, match=r"ids: .*expected"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("n", [1, 2, 100, 799, 800, 3000])
@pytest.mark.parametrize("gap", [0, 1000])
def test_decoding_joins_tokens_of_any_length(n: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tokens of 1 to 60 bytes: none, one or several of eight bytes beyond the first, in every order.
    rng = np.random.default_rng(n)
    monkeypatch.setattr(token_bytes, "_BLOCK", 700)
    long = [bytes(rng.integers(0, 256, 1 + i % 60, np.uint8)) + bytes([i]) for i in range(1, 256)]
    vocab = {i: bytes([i]) for i in range(256)} | {256 + gap + i: token for i, token in enumerate(long)}
    tokens = TokenBytes(vocab)
    ids = rng.choice(list(vocab), n)
    expected = b"".join(vocab[i] for i in ids)
    assert tokens.join(ids.tolist()) == tokens.join(ids) == tokens.join(ids.astype(np.uint16)) == expected
    assert tokens.join(iter(ids)) == tokens.join(tuple(ids)) == tokens.join(ids.astype(np.uint64)) == expected


def test_decode_takes_arrays(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(CORPUS)
    for dtype in (np.uint16, np.int32, np.int64):
        assert tokenizer.decode(np.array(ids, dtype)) == CORPUS
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([], np.uint16)) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: v.pop(300), "id 300 is missing"),
        (lambda v, m: v.pop(65), "single byte b'A' is missing"),
        (lambda v, m: v.update({336: v[300]}), "ids 300 and 336 are both"),
        (lambda v, m: v.update({336: b""}), "non-empty bytes"),
        (lambda v, m: v.update({336: "text"}), "non-empty bytes"),
        (lambda v, m: v.update({-1: b"xyz"}), "id >= 0"),
        (lambda v, m: m.append((b"zz", b"q")), "merges: b'zz' of merge 80"),
        (lambda v, m: m.append((b"z", b"q")), "merges: b'zq' of merge 80"),
        (lambda v, m: m.append(m[0]), "listed more than once"),
    ],
)
def test_bad_vocabularies_are_refused(change, message: str) -> None:
    vocab, merges = dict(VOCAB), list(MERGES)
    change(vocab, merges)
    with pytest.raises(ValueError, match=message):
        Tokenizer(vocab, merges)


@pytest.mark.parametrize("specials", [[""], [END, END], "text", ["\ud800"]])
def test_bad_special_tokens_are_refused(specials) -> None:
    with pytest.raises(ValueError, match=r"special_tokens|lone surrogate"):
        Tokenizer(VOCAB, MERGES, specials)


def test_special_tokens_may_leave_gaps_above_the_vocabulary() -> None:
    tokenizer = Tokenizer(VOCAB | {500: END.encode()}, MERGES, [END])
    assert tokenizer.vocab_size == 501
    assert tokenizer.encode(END) == [500]
    with pytest.raises(ValueError, match="450 is not in the vocabulary"):
        tokenizer.decode([450])


def test_the_hash_changes_with_all_that_changes_ids() -> None:
    swapped = MERGES[:-2] + MERGES[:-3:-1]
    tokenizers = [
        Tokenizer(VOCAB, MERGES),
        Tokenizer(VOCAB, MERGES, [END]),
        Tokenizer(VOCAB, swapped),
        Tokenizer(VOCAB, MERGES, pattern=r"\S+|\s+"),
    ]
    hashes = {tokenizer.hash for tokenizer in tokenizers}
    assert len(hashes) == 4
    assert all(len(h) == 64 for h in hashes)
    assert Tokenizer(dict(reversed(VOCAB.items())), MERGES).hash == tokenizers[0].hash


def test_pickling_keeps_everything(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.encode(CORPUS + END) == tokenizer.encode(CORPUS + END)


def test_a_custom_pattern_is_used(tokenizer: Tokenizer) -> None:
    pattern = r"[^\n]+|\n"
    tokenizer = Tokenizer(VOCAB, MERGES, [END], pattern=pattern)
    text = CORPUS + END + CORPUS
    ids = bpe_reference.encode(text, tokenizer.vocab, MERGES, (END,), pattern)
    assert tokenizer.encode(text) == ids
    assert list(tokenizer.encode_iterable([text[:50], text[50:]])) == ids
    with pytest.raises(ValueError, match="pattern"):
        Tokenizer(VOCAB, MERGES, pattern="(")


@given(st.lists(texts, max_size=6))
@settings(max_examples=100, deadline=None)
def test_encode_batch_equals_encode(tokenizer: Tokenizer, batch: list[str]) -> None:
    assert tokenizer.encode_batch(batch, num_workers=1) == [tokenizer.encode(text) for text in batch]
    for allowed in ("none", {END}):
        expected = [tokenizer.encode(text, allowed_special=allowed) for text in batch]
        assert tokenizer.encode_batch(batch, num_workers=1, allowed_special=allowed) == expected


def test_encode_batch_refuses_what_encode_refuses(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="none_raise"):
        tokenizer.encode_batch(["a", END], allowed_special="none_raise")
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode_batch(["\ud800"])
    with pytest.raises(ValueError, match="texts: got int"):
        tokenizer.encode_batch([1])


def test_threads_share_the_words_of_short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_SHORT_TEXT_WORDS", 20)  # forgotten again and again
    texts = [CORPUS[i : i + 60] for i in range(300)]
    expected = [Tokenizer(VOCAB, MERGES).encode(text) for text in texts[::30]]
    shared = Tokenizer(VOCAB, MERGES)
    shared._encoder._encode_text = None  # word by word, not by compiled code
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shared.encode, texts))[::30] == expected
    copy = pickle.loads(pickle.dumps(shared))
    assert [copy.encode(text) for text in texts[::30]] == expected


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [(CORPUS[i:] + CORPUS) * 20 for i in range(40)]
    expected = [tokenizer.encode(text) for text in texts]
    shared = Tokenizer(VOCAB, MERGES, [END, END + END])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shared.encode, texts)) == expected
