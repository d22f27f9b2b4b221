"""Files: what is written is read again, and damaged files are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import numpy as np
import pytest
import tokenizers

from rooflight.tokenizer import Tokenizer, train_bpe_from_iterator
from rooflight.tokenizer.formats import directory, hugging_face
from rooflight.tokenizer.pretokenize import for_oniguruma
from support import bpe_reference

END = "<|endoftext|>"
CORPUS = "the cat sat on the mat; naïve café, 日本語日本語 aaaaaaaa  \t\n\x00\x7f\xa0\xad" * 3
VOCAB, MERGES = bpe_reference.train(CORPUS, 40)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCAB, MERGES, [END, "<a token with spaces é>"], pattern=r"\S+|\s+")


def test_save_and_load_keep_the_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    copy = Tokenizer.load(tmp_path / "new" / "folder")
    assert copy.hash == tokenizer.hash
    assert (copy.vocab, copy.merges, copy.special_tokens, copy.pattern) == (
        tokenizer.vocab,
        tokenizer.merges,
        tokenizer.special_tokens,
        tokenizer.pattern,
    )
    tokenizer.save(tmp_path / "new" / "folder")  # over itself
    assert not list((tmp_path / "new" / "folder").glob("*.tmp"))


def test_tables_say_what_the_text_files_say_and_are_not_trusted_when_changed(tmp_path) -> None:
    tokenizer = Tokenizer(VOCAB, MERGES, {END: 300, "a": 301}, ignore_merges=True)  # with a gap, and "a" twice
    tokenizer.save(tmp_path)
    saved = (tmp_path / "tables.npy").read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # nothing else is parsed
        patch.setattr(directory, "read_gpt2", None)
        copies = [Tokenizer.load(tmp_path)]
    at = saved.index(b"the")
    for changed in (saved[:at] + b"tea" + saved[at + 3 :], saved[:-4], None):
        (tmp_path / "tables.npy").unlink()
        if changed is not None:
            (tmp_path / "tables.npy").write_bytes(changed)
        copies.append(Tokenizer.load(tmp_path))
    for copy in copies:
        assert list(copy.vocab.items()) == list(tokenizer.vocab.items())
        assert np.array_equal(copy.definition.pairs, tokenizer.definition.pairs)
        assert copy.definition.hash == tokenizer.hash
        assert copy.is_by_rank == tokenizer.is_by_rank
        assert copy.encode(CORPUS + END) == tokenizer.encode(CORPUS + END)


def test_gpt2_files(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert vocab["Ġ"] == 32  # GPT-2's space
    assert vocab[END] == 256 + 40
    lines = (tmp_path / "merges.txt").read_text().split("\n")
    assert lines[0].startswith("#version")
    assert len(lines) == 1 + 40 + 1
    copy = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", list(tokenizer.special_tokens))
    assert copy.vocab == tokenizer.vocab
    assert copy.merges == tokenizer.merges
    # without the first line, as Stanford CS336 has it
    (tmp_path / "merges.txt").write_text("\n".join(lines[1:]))
    copy = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", list(tokenizer.special_tokens))
    assert copy.merges == tokenizer.merges


def test_a_merge_that_begins_with_the_sign_of_a_comment_is_a_merge(tmp_path) -> None:
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"##", 257: b"#v"}
    tokenizer = Tokenizer(vocab, [(b"#", b"#"), (b"#", b"v")])
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).merges == tokenizer.merges


def test_missing_and_damaged_files_are_refused(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    merges = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text("\n".join(merges.split("\n")[:-2]))
    with pytest.raises(ValueError, match="changed after saving"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text(merges + "a b c\n")
    with pytest.raises(ValueError, match=r"merge 40 is .* expected two tokens"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text(merges + "\u4e00 b\n")
    with pytest.raises(ValueError, match="merge 40 is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 1, "b": 1}')
    with pytest.raises(ValueError, match="one id to two tokens"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer of version 1"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("n_written", range(5))
def test_a_tokenizer_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch, n_written) -> None:
    old, new = (Tokenizer(*train_bpe_from_iterator([text] * 9, 260, []), []) for text in ("abcde abcd", "vwxyz vwxy"))
    old.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    left = [None] * n_written

    def disk_with_room_for_some(descriptor: int) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_with_room_for_some)
        with pytest.raises(OSError, match=r"No space left on device: .*\.(json|txt|npy)'"):
            new.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Tokenizer.load(tmp_path).hash == old.hash
    new.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == new.hash
    assert {path.name for path in tmp_path.iterdir()} == before.keys()


def test_possessive_repetitions_are_exported_as_what_they_mean(tmp_path, monkeypatch) -> None:
    """To Oniguruma, the engine of tokenizers, `{1,3}+` is a repetition of the repetition."""
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    vocab, merges = train_bpe_from_iterator(["1234 12 34 123 abc"] * 30, 300, [], pattern=pattern)
    tokenizer = Tokenizer(vocab, merges, pattern=pattern)
    tokenizer.export_hf(tmp_path / "x.json")
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "x.json"))
    for text in ("1234", "12345678 1234a"):
        assert peer.encode(text).ids == tokenizer.encode(text)
    monkeypatch.setattr(hugging_face, "for_oniguruma", lambda pattern: pattern)
    with pytest.raises(ValueError, match=r"split .* otherwise"):
        tokenizer.export_hf(tmp_path / "y.json")
    assert not (tmp_path / "y.json").exists()


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        (r"\p{N}{1,3}+|x", r"(?>\p{N}{1,3})|x"),
        (r"(?:ab|[]}+]{1,2}+){2}b++", r"(?:ab|(?>[]}+]{1,2})){2}b++"),
        (r"(a(b)){2,}+\}{3}+", r"(?>(a(b)){2,})(?>\}{3})"),
        (r"a{1,3}?b?+c*+", r"a{1,3}?b?+c*+"),
    ],
)
def test_for_oniguruma(pattern: str, written: str) -> None:
    assert for_oniguruma(pattern) == written


def test_folders_of_other_tokenizers_are_not_written_over(tokenizer: Tokenizer, tmp_path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="is no tokenizer of version 1"):
        tokenizer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_configuration_lacks_is_named(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("pattern", "special_tokens", "ignore_merges", "hash"):
        path.write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        with pytest.raises(ValueError, match=f"tokenizer_config.json has no '{name}'"):
            Tokenizer.load(tmp_path)


def test_the_hash_stays_what_it_was(tokenizer: Tokenizer, tmp_path) -> None:
    """Token files and checkpoints know a tokenizer by it."""
    content = [
        tokenizer.pattern,
        [[i, token.hex()] for i, token in tokenizer.vocab.items()],
        [[left.hex(), right.hex()] for left, right in tokenizer.merges],
        sorted(tokenizer.special_tokens.items()),
        False,
    ]
    assert tokenizer.hash == hashlib.sha256(json.dumps(content).encode()).hexdigest()
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for change in ({"pattern": "x"}, {"ignore_merges": True}, {"hash": "0"}, {"checksum": "0", "pattern": "x"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="changed after saving"):
            Tokenizer.load(tmp_path)
    del config["checksum"]  # as saved by earlier versions
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
