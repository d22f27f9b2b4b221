"""A tokenizer.json read in parts: what the parser reads, or nothing."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.formats import hugging_face
from rooflight.tokenizer.formats.large_json import WrittenVocab, read_apart
from rooflight.tokenizer.formats.printable import printable

# What could be taken for a separator, an escape or the end of a part.
NAMES = [
    *"abĠé日",
    '"',
    "\\",
    ",",
    "],",
    "],[",
    "[",
    '",',
    '":',
    ": 1",
    "}",
    "\\\\",
    '\\"',
    "merges",
    "vocab",
    "x y",
    "",
]
LAYOUTS: list[dict[str, Any]] = [{"indent": 2}, {"indent": 0}, {}, {"separators": (",", ":")}]


def parsed(data: bytes) -> Any:
    """What the parser reads, pairs as lines."""
    content = json.loads(data.decode())
    model = content["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return content


def read(data: bytes) -> Any:
    """What is read in parts, as the parser has it."""
    if (content := read_apart(data)) is not None:
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        assert isinstance(vocab, WrittenVocab)
        vocab = dict(zip(vocab.names[1:-1].split("\n"), vocab.ids, strict=True))
        content["model"] |= {"vocab": vocab, "merges": merges.split("\n")}
    return content


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_reads_what_the_parser_reads_or_nothing(layout: dict[str, Any], pairs: bool) -> None:
    n_read = 0
    for seed in range(400):
        rng = random.Random(seed)
        names = rng.sample(NAMES, 6) if seed % 2 else [f"t{i}" for i in range(6)]
        merges: list[Any] = [[rng.choice(names).replace(" ", "_") for _ in "ab"] for _ in range(rng.randrange(5))]
        merges = merges if pairs else [" ".join(pair) for pair in merges]
        content = {"model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}}
        data = json.dumps({"added_tokens": [{"id": 1}]} | content, ensure_ascii=seed % 5 == 0, **layout).encode()
        for damaged in range(8):
            if damaged:
                at, end = sorted(rng.choices(range(len(data)), k=2))
                new = rng.choice([b"", b'"', b"\\", b",", b"\n", b" ", b"0", b"]", b"\xff", b"\x01", data[at : at + 9]])
                changed = data[:at] + new + data[at + 1 if end - at > 20 else end :]
            else:
                changed = data
            if (content := read(changed)) is not None:
                n_read += 1
                assert content == parsed(changed), changed
    assert n_read > 150


def write(path, model: dict[str, Any], **more: Any) -> None:
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    content = {"added_tokens": [], "pre_tokenizer": pre_tokenizer} | more | {"model": {"type": "BPE"} | model}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2))


def vocab_of(*tokens: bytes) -> dict[str, int]:
    return {printable(token): i for i, token in enumerate([bytes([byte]) for byte in range(256)] + list(tokens))}


def test_both_ways_give_the_same_tokenizer(tmp_path, monkeypatch) -> None:
    path = tmp_path / "tokenizer.json"
    # <s> is in the vocabulary, plain, and é as well; ab is made by a merge
    vocab = vocab_of(b"ab", b"abc", b'"\\') | {"<s>": 259, "日": 260}
    added = [{"id": vocab.get(name, 261), "content": name} for name in ("<s>", "日", "ab", "<new>")]
    write(path, {"vocab": vocab, "merges": ["a b", "ab c", '" \\']}, added_tokens=added)
    assert isinstance(read_apart(path.read_bytes())["model"]["vocab"], WrittenVocab)
    fast = Tokenizer.from_hf(path)
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "read_apart", lambda data: None)
        slow = Tokenizer.from_hf(path)
    assert fast.hash == slow.hash
    assert fast.encode('abc"\\<s>日<new>') == slow.encode('abc"\\<s>日<new>') == [256, 99, 258, 259, 260, 261]


def test_what_is_wrong_is_named_as_the_parser_reads_it(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    vocab, merges = vocab_of(b"ab", b"abc"), ["a b", "ab c"]
    for model, added, message in (
        ({"vocab": vocab, "merges": [*merges, "a c"]}, (), "'ac' of merge 2 is not in the vocabulary"),
        ({"vocab": vocab, "merges": [*merges, "a b c"]}, (), "merge 2 is 'a b c', expected two tokens"),
        ({"vocab": vocab, "merges": [*merges, "a b"]}, (), "a pair is listed more than once"),
        ({"vocab": vocab | {"x!": 5}, "merges": merges}, (), "one id to two tokens"),
        ({"vocab": vocab | {"日": 258}, "merges": merges}, (), "token '日': '日' is none of GPT-2's 256"),
        # An added token that the model lacks is made by no merge.
        ({"vocab": vocab, "merges": [*merges, "a a"]}, [{"id": 258, "content": "aa"}], "'aa' of merge 2"),
        ({"vocab": vocab, "merges": "a b\nab c"}, (), "merges='a b"),
        ({"vocab": vocab, "merges": [" "]}, (), "'' of merge 0 is not in the vocabulary"),
        ({"vocab": vocab, "merges": [["a", 1]]}, (), "a merge that is no string, nor a list of strings"),
        ({"vocab": {}, "merges": merges}, (), "vocab: got none"),
        ({"vocab": {"a": 0}, "merges": ["a a"]}, [{"id": 0, "content": "a"}], "'aa' of merge 0 is not in"),
    ):
        write(path, model, added_tokens=added)
        with pytest.raises(ValueError, match=re.escape(message)):
            Tokenizer.from_hf(path)
    # Of a name that is written twice the parser takes the last id.
    write(path, {"vocab": vocab, "merges": merges}, added_tokens=[{"id": 97, "content": "a"}])
    path.write_text(path.read_text().replace('"abc": 257', '"abc": 257,\n      "a": 258'))
    with pytest.warns(UserWarning, match="gives the added token"), pytest.raises(ValueError, match="id 97 is missing"):
        Tokenizer.from_hf(path)
