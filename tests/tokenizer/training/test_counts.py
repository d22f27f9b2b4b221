"""Word counts of parts of a corpus: merged, they are those of the whole; what does not belong together is refused."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest

from rooflight.tokenizer import PATTERNS, count_words, train_bpe, train_bpe_from_counts
from rooflight.tokenizer.training import train
from rooflight.tokenizer.training.count import WordCounter, Words
from rooflight.tokenizer.training.counts import read_counts, write_counts

END = "<|endoftext|>"
TEXT = "the cat sat on the mat<|endoftext|>naïve 日本語, they'll see 1234" + "x" * 40 + "\n"
TEXTS = [TEXT * n for n in (1, 300, 20, 5)] + ["cut here" + "y" * n for n in range(60)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(train, "COUNTED_PART", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(TEXTS))
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (folder / "b.jsonl").write_text(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "d.txt.gz").write_bytes(gzip.compress("".join(TEXTS).encode()))
    return folder


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", r"\w+|\s"])
@pytest.mark.parametrize(("n", "num_workers"), [(1, 2), (3, 1), (40, 1)])
def test_merged_counts_train_as_the_whole_text(corpus: Path, n: int, num_workers: int, pattern: str) -> None:
    whole = train_bpe(sorted(corpus.iterdir()), 330, [END], pattern=pattern, field="body", num_workers=1)
    plain = corpus.parent / "plain.txt"  # nothing but text, in one file
    plain.write_text((END.join(["".join(TEXTS), END.join(TEXTS)]) + END) * 2)
    assert train_bpe(plain, 330, [END], pattern=pattern, num_workers=1) == whole
    files = [corpus.parent / f"{i}.counts" for i in range(n)]
    sizes = [
        count_words([corpus], file, [END], pattern=pattern, field="body", shard=(i, n), num_workers=num_workers)
        for i, file in enumerate(files)
    ]
    assert train_bpe_from_counts(files, 330, [END], pattern=pattern) == whole
    assert train_bpe_from_counts(files, 330, [END], pattern=pattern, max_words=9) == train_bpe(
        plain, 330, [END], pattern=pattern, num_workers=1, max_words=9
    )
    if n > 1:
        assert sum(size > 0 for _, size in sizes) > 2
    assert read_counts(files, (END,), PATTERNS.get(pattern, pattern))[1] == sum(size for _, size in sizes)


def test_equal_counts_are_equal_files(corpus: Path) -> None:
    files = [corpus.parent / "counts" / name for name in "abc"]  # a folder that is not there yet
    count_words([corpus], files[0], [END], field="body", num_workers=1)
    count_words([corpus], files[1], [END], field="body", num_workers=2)
    count_words(sorted(corpus.iterdir(), reverse=True), files[2], [END], field="body", num_workers=1)
    first, *others = (file.read_bytes() for file in files)
    assert others == [first, first]


def test_words_of_every_kind_are_kept_in_order(tmp_path: Path) -> None:
    words = {b"a": 3, b"a\0": 2**40, b"\0a": 1, b"\xff\0b": 4, b"\xff\0a": 5, bytes(70): 6, b"z" * 70: 7, b"B": 8}
    data = Words(b"".join(words), np.array([*map(len, words)]), np.array([*words.values()]))
    write_counts(tmp_path / "x", data, [], "p", 9)
    found, n_bytes = read_counts([tmp_path / "x"], [], "p")
    assert found.todict() == {word: n for word, n in words.items() if word[0] != 0xFF}  # none of a text's
    assert n_bytes == 9
    with np.load(tmp_path / "x") as file:
        stored = Words(file["data"].tobytes(), file["lengths"], file["counts"])
    assert list(stored.todict().items()) == sorted(words.items(), key=lambda item: (len(item[0]), item[0]))
    empty = WordCounter().words()
    write_counts(tmp_path / "y", empty, [], "p", 0)
    assert read_counts([tmp_path / "x", tmp_path / "y"], [], "p")[0].todict() == found.todict()


def test_what_is_refused(corpus: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    count_words([corpus], good, [END, "<|x|>"], pattern="llama3", field="body", num_workers=1)

    def refused(
        message: str, *paths: Path, specials: tuple[str, ...] = (END, "<|x|>"), pattern: str = "llama3"
    ) -> None:
        with pytest.raises(ValueError, match=message):
            train_bpe_from_counts(paths, 300, specials, pattern=pattern)

    refused("good was made with the pattern llama3, expected gpt2", good, pattern="gpt2")
    refused(r"good was made with the pattern llama3, expected '\\\\w'", good, pattern=r"\w")
    refused(
        r"good was made with the special_tokens \['<\|endoftext\|>', '<\|x\|>'\], expected \[", good, specials=(END,)
    )
    refused("expected", good, specials=("<|x|>", END))
    (tmp_path / "link").symlink_to(good)
    refused("link is given twice", good, tmp_path / "link")
    refused("paths: got ()")
    data = good.read_bytes()
    wrong = io.BytesIO()
    np.savez(wrong, header=np.frombuffer(b'{"format": "rooflight-counts", "version": 2}', np.uint8))
    spoiled = bytearray(data)
    spoiled[len(data) // 2] ^= 1
    for content in (data[:-9], data[:9], bytes(spoiled), b"", b"the cat sat", b"[1]", wrong.getvalue()):
        (tmp_path / "bad").write_bytes(content)
        refused("bad is no file of counts of version 1", tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="none"):
        train_bpe_from_counts([tmp_path / "none"], 300, [END])
    with pytest.raises(ValueError, match=r"out_path: .* is the input"):
        count_words([corpus], corpus / "a.txt", [END], field="body")
    with pytest.raises(ValueError, match=r"out_path: .* is a folder"):
        count_words([corpus / "a.txt"], corpus, [END])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: has no field 'text'"):
        count_words([corpus], tmp_path / "out", [END], num_workers=1)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_cut_is_not_counted_once_for_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COUNTED_PART", 100)
    data = gzip.compress(bytes(range(32, 127)) * 2)
    assert len(data) > 100
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.txt' is compressed, expected a name that ends in \.gz or \.zst"):
        count_words([tmp_path / "x.txt"], tmp_path / "out", [END], num_workers=1)
    (tmp_path / "x.txt").rename(tmp_path / "x.txt.gz")
    assert count_words([tmp_path / "x.txt.gz"], tmp_path / "out", [END], num_workers=1)[1] == 190
