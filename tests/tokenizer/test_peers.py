"""The same ids as `tokenizers` and `tiktoken`, on vocabularies trained here and written for them, and back again."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from rooflight.tokenizer import GPT2_PATTERN, Tokenizer, train_bpe
from rooflight.tokenizer.formats.tiktoken import pairs_of_ranks
from support import bpe_reference

END, PAD = "<|endoftext|>", "<pad>"
# GPT-4's, as a custom pattern. (tiktoken spells it with possessive quantifiers, which `tokenizers` lacks.)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = [
    "The theatre's cat; they'll see that 12345 is 1,234.5!  \n\n\tdef f(x):\n        return x\n",
    "naïve café, Ünïcödé 日本語の文章です。東京 привет мир сегодня \U0001f600\U0001f600\U0001f468‍\U0001f469‍\U0001f467"
    " नमस्ते दुनिया ١٢٣ Ⅷ ²³\n",
    "aaaaaaaaaaaaaaaaaaaaaaaa -------------------------------- ================\n",
    "\x00\x01\x7f\x85\xa0\xad\u3000\u2003 x\u200b\ufeff \x1c\x1f\r\n",
]


@pytest.fixture(scope="module", params=[GPT2_PATTERN, CL100K], ids=["gpt2", "cl100k"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = tmp_path_factory.mktemp("corpus") / "x.txt"
    docs = Path(tiktoken.__file__).with_name("core.py").read_text(encoding="utf-8")
    text.write_text(END.join([*SAMPLE * 3, docs]), encoding="utf-8")
    vocab, merges = train_bpe(text, 700, [END, PAD], pattern=request.param, num_workers=1)
    return Tokenizer(vocab, merges, [END, PAD], pattern=request.param)


@pytest.fixture(scope="module")
def hugging_face(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.export_hf(path)
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def open_ai(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    path = tmp_path_factory.mktemp("tiktoken") / "ranks"
    tokenizer.export_tiktoken(path)
    ranks = load_tiktoken_bpe(str(path))
    return tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )


pieces = st.one_of(
    st.sampled_from([text[i : i + n] for text in SAMPLE for i in range(0, len(text), 3) for n in (2, 9)]),
    st.sampled_from([END, PAD, "<|", "'ll", "'S", "  ", "\n", " \n", "a" * 70, "日本" * 30]),
    # Characters that all three engines class alike, whatever their Unicode version.
    st.text(st.characters(exclude_categories=["Cs", "Cn"], max_codepoint=0x2FFF), max_size=5),
)
texts = st.lists(pieces, max_size=14).map("".join)


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_tiktoken_and_tokenizers_give_the_same_ids(
    tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer, open_ai: tiktoken.Encoding, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.encode_bytes(text.encode()).tolist() == ids
    assert open_ai.encode(text, allowed_special="all") == ids
    assert hugging_face.encode(text).ids == ids
    assert open_ai.encode(text, allowed_special={END}, disallowed_special=()) == tokenizer.encode(
        text, allowed_special={END}
    )
    assert open_ai.encode_ordinary(text) == tokenizer.encode(text, allowed_special="none")
    assert open_ai.decode(ids) == hugging_face.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == text


def test_long_texts_give_the_same_ids(
    tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer, open_ai: tiktoken.Encoding
) -> None:
    rng = random.Random(0)
    documents = [Path(tokenizers.__file__).read_text(encoding="utf-8"), *SAMPLE]
    text = END.join(rng.choices(documents, k=150)) + "".join(rng.choices("abcdetaoin ", [1] * 10 + [0.1], k=20_000))
    ids = tokenizer.encode(text)
    assert open_ai.encode(text, allowed_special="all") == ids
    assert hugging_face.encode(text).ids == ids


@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_offsets_are_those_of_tokenizers(tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, offsets=True)[1] == hugging_face.encode(text).offsets


def test_what_was_written_is_read_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.export_hf(tmp_path / "tokenizer.json")
    assert Tokenizer.from_hf(tmp_path / "tokenizer.json").hash == tokenizer.hash
    tokenizer.export_tiktoken(tmp_path / "ranks")
    copy = Tokenizer.from_tiktoken(tmp_path / "ranks", tokenizer.pattern, tokenizer.special_tokens)
    assert copy.hash == tokenizer.hash


def test_a_tokenizer_trained_by_tokenizers_is_read(tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(SAMPLE * 5, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_hf(tmp_path / "tokenizer.json")
    for text in [*SAMPLE, END.join(SAMPLE), "something else altogether"]:
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "no BPE model"),
        (lambda c: c["model"].update(unk_token="?"), "unk_token='[?]'"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "the normalizer .*NFKC.*, expected NFC or none"),
        (lambda c: c["model"].update(byte_fallback=True), "byte_fallback=True"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
        (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer None"),
        (lambda c: c["model"].update(merges=[["a"]]), "merge 0 is"),
    ],
)
def test_other_kinds_of_tokenizer_json_are_refused(change, message: str, tmp_path: Path) -> None:
    vocab, merges = bpe_reference.train(SAMPLE[0], 20)
    Tokenizer(vocab, merges, [END]).export_hf(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_hf(tmp_path / "tokenizer.json")


def random_ranks(seed: int) -> dict[bytes, int]:
    """Tokens over two letters that no training would give, in any order."""
    rng = random.Random(seed)
    tokens = {bytes(rng.choices(b"ab", k=rng.randrange(2, 7))) for _ in range(rng.randrange(3, 14))}
    longer = rng.sample(sorted(tokens), len(tokens))
    return {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + longer)}


@pytest.mark.parametrize("seed", range(60))
def test_any_ranks_are_read_with_their_meaning(seed: int, tmp_path: Path) -> None:
    ranks = random_ranks(seed)
    (tmp_path / "ranks").write_bytes(b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    theirs = tiktoken.Encoding("any", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer.from_tiktoken(tmp_path / "ranks")
    rng = random.Random(seed)
    for n in [*range(1, 12), 30, 60, 150]:
        text = " ".join("".join(rng.choices("ab", k=n)) for _ in range(30))
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode_bytes(text.encode()).tolist() == theirs.encode_ordinary(text)
    ours.export_tiktoken(tmp_path / "again")
    assert load_tiktoken_bpe(str(tmp_path / "again")) == ranks
    # ... and the one bit that says "a word that is a token is that token" through tokenizers
    ours.export_hf(tmp_path / "tokenizer.json")
    hugging_face = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert hugging_face.encode(text).ids == ours.encode(text)
    assert Tokenizer.from_hf(tmp_path / "tokenizer.json").hash == ours.hash


def test_the_two_orders_of_merging_can_differ(tmp_path: Path) -> None:
    # The list says (ab, c); of "abc" it leaves a and bc, which tiktoken merges since abc is a token.
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"bc", 257: b"ab", 258: b"abc"}
    tokenizer = Tokenizer(vocab, [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")])
    theirs = tiktoken.Encoding(
        "other", pat_str=GPT2_PATTERN, mergeable_ranks={t: i for i, t in vocab.items()}, special_tokens={}
    )
    assert tokenizer.encode("abc") == [97, 256]
    assert theirs.encode("abc") == [258]
    with pytest.raises(ValueError, match=r"merge 2 is \(b'ab', b'c'\), but tiktoken.* has \(b'a', b'bc'\)"):
        tokenizer.export_tiktoken(tmp_path / "ranks")
    tokenizer.export_hf(tmp_path / "tokenizer.json")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("abc").ids == [97, 256]
    unreachable = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"xyz"}, [])
    with pytest.raises(ValueError, match="no merges lead to b'xyz'"):
        unreachable.export_tiktoken(tmp_path / "ranks")
    assert not (tmp_path / "ranks").exists()


def test_pairs_of_ranks_of_a_trained_vocabulary_are_its_merges() -> None:
    vocab, merges = bpe_reference.train("".join(SAMPLE) * 2, 150)
    pairs, whole = pairs_of_ranks({token: i for i, token in vocab.items()})
    assert [tuple(vocab[i] for i in pair) for pair in pairs.tolist()] == [(a, b, a + b) for a, b in merges]
    assert whole == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nnonsense\n", "line 2 of"),
        (b"YQ== 0\n!!! 1\n", "line 2 of"),
        (b"YQ== 0\nYg== 0\n", "one rank to two tokens"),
        (b"", "or has none"),
        (b"YQ== 0\n", "single byte"),
    ],
)
def test_damaged_ranks_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "ranks").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_tiktoken(tmp_path / "ranks")
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_tiktoken(tmp_path / "nothing")


def test_ranks_are_read_however_their_lines_are_written(tmp_path: Path) -> None:
    """What is written as tiktoken does is read by arrays, anything else line by line: what one takes the other does."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"abcd", b"xyz"]
    lines = [b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    expected = None
    for written in (
        b"\n".join(lines) + b"\n",
        b"\n".join(lines),
        b"\r\n".join(lines) + b"\r\n",
        b"\n".join(lines).replace(b" ", b"\t ") + b" \n",
        b"\n".join([*lines[:-1], lines[-1].replace(b" ", b" +")]),
        b"\n".join(lines[::-1]) + b"\n",
    ):
        (tmp_path / "ranks").write_bytes(written)
        tokenizer = Tokenizer.from_tiktoken(tmp_path / "ranks")
        expected = expected or tokenizer.hash
        assert tokenizer.hash == expected
        assert tokenizer.merges == [(b"a", b"b"), (b"ab", b"c"), (b"abc", b"d")]
        assert tokenizer.ignore_merges  # nothing makes xyz
    # Of these a2b_base64 makes something, if it is not strict.
    for field in (b"YW=J", b"YQ==YWJj", b"YWJj!!!!", b"====", b"=YWJj", b"YW", b"YWI= 260 YWI=", b"YWJj 260\n\nYWI="):
        (tmp_path / "ranks").write_bytes(b"\n".join([*lines, field + b" 261", b""]))
        with pytest.raises(ValueError, match=r"line 26[12] of"):
            Tokenizer.from_tiktoken(tmp_path / "ranks")


def test_special_tokens_of_ranks(tmp_path: Path) -> None:
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    tokenizer.export_tiktoken(tmp_path / "ranks")
    assert Tokenizer.from_tiktoken(tmp_path / "ranks", special_tokens=[END, PAD]).special_tokens == {END: 256, PAD: 257}
    assert Tokenizer.from_tiktoken(tmp_path / "ranks", special_tokens={END: 300}).vocab_size == 301
    with pytest.raises(ValueError, match="has the id 97"):
        Tokenizer.from_tiktoken(tmp_path / "ranks", special_tokens={END: 97})
