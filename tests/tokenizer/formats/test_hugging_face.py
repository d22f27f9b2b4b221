"""tokenizer.json as it is in the world: ids equal to those of `tokenizers` for every kind of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from rooflight.tokenizer import PATTERNS, Tokenizer
from rooflight.tokenizer.formats.printable import printable
from rooflight.tokenizer.pretokenize import cut_stream
from support import bpe_reference

CORPUS = (
    "the cat sat on the mat; the cat's 1234 5678 12 naïve cafe\u0301 日本語日本語 привет Å A\u030a \t\n camelCase "
    "HTMLParser !\n\n  x = y // 2\n"
) * 3
VOCAB, MERGES = bpe_reference.train(CORPUS, 120)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ATOMS = [
    *("the cat", " sat", "on the mat;", "'s", " ", "  ", "\n", "\t", "\u3000", "1", "234", "½", "!", "//"),
    *("é", "e\u0301", "Å", "A\u030a", "\u212b", "日本", "ア・", "ñ", "n\u0303", "camelCase"),
    *("<|end|>", "<mask>", "<w>", "x", "_", "cafe\u0301", "\u0338", "[TASK]", "[TAS\u212a]", "|\u212a x"),
]


def texts(seed: int, n: int = 400) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.choice((1, 2, 3, 5, 9, 20)))) for _ in range(n)]


def split(pattern: str, behavior: str = "Isolated", invert: bool = False, kind: str = "Regex") -> dict:
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(content: str, i: int, **flags: bool) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": content} | plain | flags


NO_REGEX = BYTE_LEVEL | {"use_regex": False}
N = len(VOCAB)
LATER = added("", N + 1, normalized=True, special=False)
CASES = {
    "NFC, Qwen2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence(split(PATTERNS["qwen2"]), NO_REGEX)},
    "NFC in a sequence, NeoX": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
    "several Splits, DeepSeek": {"pre_tokenizer": sequence(*map(split, PATTERNS["deepseek"]), NO_REGEX)},
    "Digits, SmolLM": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)},
    "Digits together": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)},
    "Split that removes": {"pre_tokenizer": sequence(split(PATTERNS["llama3"], "Removed", True), NO_REGEX)},
    "Split that removes something": {"pre_tokenizer": sequence(split(r"\p{L}+|\s+", "Removed", True), NO_REGEX)},
    "Split that leaves something": {"pre_tokenizer": sequence(split(r"\p{L}+"), NO_REGEX)},
    "Split by a string": {"pre_tokenizer": sequence(split(" ", kind="String"), BYTE_LEVEL)},
    "ByteLevel alone in a sequence": {"pre_tokenizer": sequence(BYTE_LEVEL)},
    "prefix space": {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "lstrip, RoBERTa": {"added_tokens": [added("<|end|>", N), added("<mask>", N + 1, lstrip=True)]},
    "rstrip": {"added_tokens": [added("<|end|>", N, rstrip=True), added("<mask>", N + 1, lstrip=True, rstrip=True)]},
    "single word": {"added_tokens": [added("<|end|>", N), added("cat", N + 1, single_word=True)]},
    "normalized, NeoX": {
        "normalizer": {"type": "NFC"},
        "added_tokens": [
            added("<|end|>", N),
            *(added(token, i, normalized=True, special=False) for i, token in enumerate(("  ", "   ", "|x|"), N + 1)),
        ],
    },
    "normalized, overlapped": {"added_tokens": [added("<|end|>", N), LATER | {"content": "end"}]},
    "no special one": {"added_tokens": [added("<|end|>", N), added("<mask>", N + 1, special=False)]},
    "Split inverted": {"pre_tokenizer": sequence(split(r"\p{L}+", invert=True), NO_REGEX)},
    "Splits by strings": {"pre_tokenizer": sequence(split("//", kind="String"), split("|", kind="String"), BYTE_LEVEL)},
    "Digits after a Split": {
        "pre_tokenizer": sequence(split(PATTERNS["llama3"]), {"type": "Digits", "individual_digits": True}, NO_REGEX)
    },
    "normalized, a fine-tuned Qwen2": {
        "normalizer": {"type": "NFC"},
        "added_tokens": [
            added("<|end|>", N),
            *(
                added(token, N + 1 + i, normalized=True)
                for i, token in enumerate(("<w>", "[TASK]", "caf\u00e9", "|K x"))
            ),
        ],
    },
    "white space beside lstrip, ModernBERT": {
        "normalizer": {"type": "NFC"},
        "added_tokens": [
            added("<|end|>", N),
            *(added(" " * n, N - 1 + n, normalized=True, special=False) for n in (2, 3)),
            added("<mask>", N + 3, lstrip=True),
        ],
    },
    "normalized before one that is not": {"added_tokens": [added("x<|", N, normalized=True), added("<|end|>", N + 1)]},
    "lstrip, and a longer one": {"added_tokens": [added("<m", N, lstrip=True), added("<mask>", N + 1)]},
    "single word, and a shorter one": {
        "added_tokens": [added("<m|", N), added("<w>x", N + 1, single_word=True), added("<w>", N + 2)]
    },
    "ids with holes, in the vocabulary": {"added_tokens": [added("<|end|>", N + 9), added("<mask>", N + 20)]},
    "an ordinary token's bytes": {"added_tokens": [added("日本", N), added("the", 257), added("<|end|>", N + 1)]},
    "all of it": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True},
        "added_tokens": [added("<|end|>", N), added("<mask>", N + 1, lstrip=True)],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_tokenizers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    content = json.loads(path.read_text(encoding="utf-8")) | {"added_tokens": [added("<|end|>", N)]} | CASES[case]
    if (token := content["added_tokens"][1:2]) and token[0]["content"] == "the":
        token[0]["id"] = content["model"]["vocab"]["the"]
    if "holes" in case:
        content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    peer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = Tokenizer.from_hf(path)
    samples = texts(len(case))
    expected = [encoding.ids for encoding in peer.encode_batch(samples, add_special_tokens=False)]
    for text, ids in zip(samples, expected, strict=True):
        assert tokenizer.encode(text) == ids, text
    # By every other way too, and after being written again.
    flat, counts = tokenizer.encode_many(samples)
    assert np.split(flat, np.cumsum(counts)[:-1])[7].tolist() == expected[7]
    assert flat.tolist() == [i for ids in expected for i in ids]
    together = "".join(samples) * 3
    whole = peer.encode(together, add_special_tokens=False).ids
    assert tokenizer.encode(together) == whole
    assert list(tokenizer.encode_iterable(samples * 3)) == whole
    tokenizer.save(tmp_path / "own")
    tokenizer.export_hf(tmp_path / "again.json")
    for copy in Tokenizer.load(tmp_path / "own"), Tokenizer.load(tmp_path / "again.json"):
        assert copy.encode(together) == whole
    assert Tokenizer.load(tmp_path / "own").hash == tokenizer.hash
    assert Tokenizer.load(tmp_path).encode(together) == whole  # a Hugging Face folder
    (tmp_path / "x.txt").write_text(together, encoding="utf-8", newline="")
    tokenizer.encode_file(tmp_path / "x.txt", tmp_path / "x.bin", num_workers=1)
    assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == whole


def test_a_vocabulary_may_lack_single_bytes(tmp_path: Path) -> None:
    """SmolLM2's lacks six control characters, four bytes of rare planes, and those that are in no UTF-8."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    lacking = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
    model = content["model"]
    tokens = [token for token in model["vocab"] if token not in {printable(bytes([byte])) for byte in lacking}]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    content["added_tokens"] = [added("<|end|>\x04", len(tokens))]
    path.write_text(json.dumps(content), encoding="utf-8")
    peer, tokenizer = tokenizers.Tokenizer.from_file(str(path)), Tokenizer.from_hf(path)
    samples = [text for text in texts(3) if not set(text.encode()) & {*lacking}]
    samples += ["a<|end|>\x04b", "the " * 500]
    assert len(samples) > 50
    for text in samples:
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids, text
    for text in ("the\x04cat", "the cat " * 5000 + "\x04", "\U00040000", "x" * 300 + "\x16"):
        for encode in (tokenizer.encode, lambda text: list(tokenizer.encode_iterable([text]))):
            with pytest.raises(ValueError, match=r"text: the byte b'.*' has no token in this vocabulary, in b'"):
                encode(text)
        assert peer.encode(text).ids  # which drops it
        # and nothing of it is remembered
        assert tokenizer.encode(samples[0] + "the cat " * 5000) == peer.encode(samples[0] + "the cat " * 5000).ids
    tokenizer.save(tmp_path / "own")
    tokenizer.export_hf(tmp_path / "again.json")
    for copy in (Tokenizer.load(tmp_path / "own"), Tokenizer.load(tmp_path / "again.json")):
        assert copy.hash == tokenizer.hash
        assert copy.decode(copy.encode(samples[1])) == samples[1]
    with pytest.raises(ValueError, match="is missing, expected all 256"):
        tokenizer.export_tiktoken(tmp_path / "ranks")
    with pytest.raises(ValueError, match="is missing, expected all 256"):  # which nobody else wrote
        Tokenizer(tokenizer.vocab, tokenizer.merges)


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for pre_tokenizer in (
        sequence(split(r"\w+", "MergedWithNext"), NO_REGEX),
        sequence(split(r"\w+", "Removed", True), split(r"\d"), NO_REGEX),
        sequence(split(r"\w+"), BYTE_LEVEL | {"add_prefix_space": True}),
        sequence(BYTE_LEVEL, split(r"\w+")),
        sequence(NO_REGEX),
        {"type": "Metaspace"},
    ):
        path.write_text(json.dumps(content | {"pre_tokenizer": pre_tokenizer}), encoding="utf-8")
        with pytest.raises(ValueError, match="pre_tokenizer"):
            Tokenizer.from_hf(path)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([added("<|end|>", N), added("cafe\u0301", N + 1, normalized=True)], "not in normal form C"),
        ([added("<mask>", N, lstrip=True), added("  ", N + 1)], "'<mask>', with lstrip or rstrip, could take"),
        ([added(" x", N), added("<m|", N + 1, rstrip=True)], "'<m|', with lstrip or rstrip, could take"),
        ([added("<|end|>", N), added("<mask>", N + 1)], "'<mask>', and tokenizers gives both 341"),
    ],
)
def test_added_tokens_that_tokenizers_finds_otherwise_are_refused(
    tokens: list[dict], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    content = json.loads(path.read_text(encoding="utf-8")) | {"normalizer": {"type": "NFC"}, "added_tokens": tokens}
    if "both" in reason:  # in a vocabulary with a hole the second has the id that is the first one's
        content["model"]["vocab"]["<mask>"] = N + 1
        tokens[0]["content"] = "<|first|>"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_hf(path)


@pytest.mark.parametrize("ids", [(N + 1, N), (N + 7, N + 9), (N - 1, N)])
def test_ids_are_given_as_tokenizers_gives_them(ids: tuple[int, int], tmp_path: Path) -> None:
    """Whatever the file says: the model's or, in turn, those after its size."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    tokens = [added("<|end|>", ids[0]), added("<mask>", ids[1])]
    content = json.loads(path.read_text(encoding="utf-8")) | {"added_tokens": tokens}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match=rf"'<\|end\|>' the id {ids[0]}, and tokenizers {N}, as is done here"):
        tokenizer = Tokenizer.from_hf(path)
    peer = tokenizers.Tokenizer.from_file(str(path))
    assert tokenizer.special_tokens == {"<|end|>": N, "<mask>": N + 1}
    for text in texts(2, 50):
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids


def test_what_is_said_of_added_tokens_by_chance_is_so(tmp_path: Path) -> None:
    """Of random tokens those that are not refused are found as `tokenizers` finds them."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    atoms = [
        "<",
        "|",
        "a",
        " ",
        "  ",
        "a b",
        "e\u0301",
        "\u00e9",
        "\u0338",
        "K",
        "\u212a",
        "\uac01",
        "\u1100\u1161\u11a8",
    ]
    n_read = n_refused = 0
    for seed in range(80):
        rng = random.Random(seed)
        contents = {"".join(rng.choices(atoms, k=rng.randrange(1, 4))) for _ in range(rng.choice((2, 2, 3, 4)))}
        chances = {"normalized": 0.5, "lstrip": 0.2, "rstrip": 0.2, "single_word": 0.1}
        tokens = [
            added(token, N + i, **{flag: rng.random() < chance for flag, chance in chances.items()})
            for i, token in enumerate(sorted(contents - {*map(printable, VOCAB.values()), " "}))
        ]
        normalizer = {"type": "NFC"} if rng.random() < 0.5 else None
        path.write_text(json.dumps(content | {"normalizer": normalizer, "added_tokens": tokens}), encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_hf(path)
        except ValueError:
            n_refused += 1
            continue
        n_read += 1
        peer = tokenizers.Tokenizer.from_file(str(path))
        for _ in range(60):
            text = "".join(rng.choices([*atoms, *contents], k=rng.randrange(1, 9)))
            assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids, (text, tokens)
        # Wherever a stream is cut, and after being written again.
        text = "".join(rng.choices([*atoms, *contents], k=200))
        ids = peer.encode(text, add_special_tokens=False).ids
        pieces = cut_stream([text.encode()], tokenizer._all, 1)
        assert tokenizer._encoder.encode_to_list(pieces, tokenizer._all.specials) == ids, tokens
        tokenizer.export_hf(tmp_path / "again.json")
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "again.json")).encode(text).ids == ids, tokens
    assert n_read > n_refused > 0


def test_no_stream_is_cut_inside_a_token_that_is_not_normal_yet(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    tokens = [added("\u00e9|a b", N, normalized=True)]
    content = json.loads(path.read_text(encoding="utf-8")) | {"normalizer": {"type": "NFC"}, "added_tokens": tokens}
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer, text = Tokenizer.from_hf(path), "x y " * 9 + "e\u0301|a b c" * 3 + " x y" * 9
    pieces = list(cut_stream([text.encode()], tokenizer._all, 1))
    assert len(pieces) > 9
    ids = tokenizer._encoder.encode_to_list(pieces, tokenizer._all.specials)
    assert ids == tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    assert ids.count(N) == 3


def test_offsets_are_refused_where_the_text_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(VOCAB, MERGES, []).export_hf(path)
    content = json.loads(path.read_text(encoding="utf-8")) | {"normalizer": {"type": "NFC"}}
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.from_hf(path)
    assert tokenizer.encode("caf\u00e9", offsets=True)[0] == tokenizer.encode("caf\u00e9")
    with pytest.raises(ValueError, match="offsets: "):
        tokenizer.encode("cafe\u0301", offsets=True)


def test_a_saved_folder_opens_in_auto_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(VOCAB, MERGES, ["<|end|>"], pattern="llama3")
    tokenizer.save(tmp_path / "tk")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tk")
    assert type(peer).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    for text in texts(1):
        assert peer(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert Tokenizer.load(tmp_path / "tk").hash == tokenizer.hash
    # One that tokenizer.json cannot say is saved without.
    Tokenizer(VOCAB | {N: b"a"}, MERGES, {"a": N}).save(tmp_path / "tk")
    assert not (tmp_path / "tk" / "tokenizer.json").exists()
    (tmp_path / "hf").mkdir()
    tokenizer.export_hf(tmp_path / "hf" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"holds another tokenizer's tokenizer\.json"):
        tokenizer.save(tmp_path / "hf")
