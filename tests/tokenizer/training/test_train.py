"""Training from files and iterators: special tokens, independence of processes and sizes, errors."""

import pickle
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from rooflight.tokenizer import Tokenizer, train_bpe, train_bpe_from_iterator
from rooflight.tokenizer.pretokenize import GPT2_PATTERN
from rooflight.tokenizer.training import train
from support import bpe_reference

END = "<|endoftext|>"
# OpenAI's cl100k_base, without its "at the end of the text".
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s"
)


@pytest.fixture
def corpus(tmp_path) -> Path:
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text("utf-8")
    documents = source.split("\n\n\n")
    path = tmp_path / "corpus.txt"
    path.write_bytes(f"\n{END}\n".join(documents).encode())
    return path


@pytest.fixture
def small_ranges(monkeypatch):
    """Tasks of 4 KB, so that a small file occupies several processes."""
    monkeypatch.setattr(train, "TASK", 4_000)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_ids_and_merges(tmp_path):
    path = write(tmp_path / "text", b"low low lower newest newest widest")
    vocab, merges = train_bpe(path, 260, [END])
    # Each of these occurs three times, as do "es" and "ow" until "we" takes their letters: the greater pair goes first.
    assert merges == [(b"w", b"e"), (b"s", b"t"), (b"l", b"o")]
    assert vocab[0] == END.encode()
    assert [vocab[1 + byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert [vocab[257 + i] for i in range(3)] == [b"we", b"st", b"lo"]
    assert list(vocab) == list(range(260))


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K])
def test_equals_the_reference(tmp_path, pattern):
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text("utf-8")
    vocab, merges = train_bpe(write(tmp_path / "text", text.encode()), 456, [], pattern=pattern, num_workers=1)
    assert (vocab, merges) == bpe_reference.train(text, 200, pattern)


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K])
def test_the_number_of_workers_changes_nothing(corpus, small_ranges, pattern):
    results = [train_bpe(corpus, 500, [END], num_workers=n, pattern=pattern) for n in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    documents = corpus.read_text("utf-8").split(END)
    for n in (1, 2):
        assert train_bpe_from_iterator(iter(documents), 500, [END], num_workers=n, pattern=pattern) == results[0]


def test_several_files_are_several_documents(tmp_path):
    paths = [write(tmp_path / "a", b"ab ab a"), write(tmp_path / "b", b"b ab")]
    assert train_bpe(paths, 258, []) == train_bpe_from_iterator(["ab ab a", "b ab"], 258, [])
    assert train_bpe(paths, 258, [])[1] == [(b"a", b"b"), (b" ", b"ab")]


def test_nothing_is_learned_from_or_across_special_tokens(tmp_path):
    path = write(tmp_path / "text", b"xy<|><|>xy<|>z<|>z<|>zz<|><|>" * 20)
    vocab, merges = train_bpe(path, 300, ["<|>", "<|><|>"])
    assert merges == [(b"x", b"y"), (b"z", b"z")]
    assert len(vocab) == 260


def test_invalid_bytes_count_as_replacement_characters(tmp_path):
    raw = b"caf\xe9 \xff\xfe \xe6\x97 caf\xe9" * 10
    repaired = raw.decode("utf-8", errors="replace").encode()
    assert train_bpe(write(tmp_path / "a", raw), 270, []) == train_bpe(write(tmp_path / "b", repaired), 270, [])


def test_max_words_keeps_the_most_frequent(tmp_path):
    path = write(tmp_path / "text", b"ab " * 5 + b"cd " * 3 + b"ef ")
    assert {a + b for a, b in train_bpe(path, 400, [], max_words=1)[1]} == {b"ab", b" ab"}


def test_an_empty_text_gives_the_bytes(tmp_path):
    vocab, merges = train_bpe(write(tmp_path / "text", b""), 1_000, [END])
    assert merges == []
    assert len(vocab) == 257


def test_progress_goes_to_standard_error(corpus, capsys):
    train_bpe(corpus, 300, [END], progress=True, num_workers=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Counting words" in err
    assert "Merging pairs" in err
    train_bpe(corpus, 300, [END], num_workers=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 256}, "vocab_size: got 256, expected an integer of at least 257"),
        ({"vocab_size": 300.0}, "vocab_size: got 300.0"),
        ({"vocab_size": 1 << 22}, "vocab_size: got 4194304, expected at most 2097151"),
        ({"special_tokens": [END, END]}, "is given more than once"),
        ({"special_tokens": [""]}, "got '', expected non-empty strings"),
        ({"num_workers": 0}, "num_workers: got 0, expected a positive integer or None"),
        ({"pattern": "["}, "is no regular expression"),
        ({"max_words": 0}, "max_words: got 0, expected a positive integer or None"),
        ({"input_path": []}, "input_path: got an empty list"),
    ],
)
def test_bad_arguments_are_refused(corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(**{"input_path": corpus, "vocab_size": 300, "special_tokens": [END]} | arguments)


def test_sizes_may_be_numpys(corpus):
    assert train_bpe(corpus, np.int64(300), [END], max_words=np.int32(50)) == train_bpe(
        corpus, 300, [END], max_words=50
    )


@pytest.mark.parametrize("specials", [["a"], ["é", "the", " the", "\n"], ["aa", "a"]])
def test_a_tokenizer_takes_every_special_token_that_training_takes(tmp_path, specials):
    text = "the banana, the café\n" * 30
    vocab, merges = train_bpe(write(tmp_path / "x", text.encode()), 300, specials)
    tokenizer = Tokenizer(vocab, merges, specials)
    assert tokenizer.special_tokens == {token: i for i, token in enumerate(specials)}
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode_bytes(text.encode()).tolist()
    assert set(range(len(specials))) & set(ids)
    plain = tokenizer.encode(text, allowed_special="none")
    assert not set(range(len(specials))) & set(plain)
    assert tokenizer.decode(ids) == tokenizer.decode(plain) == text
    tokenizer.save(tmp_path / "tk")
    loaded = Tokenizer.load(tmp_path / "tk")
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(text) == ids


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        train_bpe(tmp_path / "missing", 300, [])


def test_documents_must_be_text():
    with pytest.raises(ValueError, match="documents: got a str, expected an iterable of str"):
        train_bpe_from_iterator("text", 300, [])
    with pytest.raises(ValueError, match="lone surrogate"):
        train_bpe_from_iterator(["fine", "\ud800"], 300, [])


def test_the_worker_can_be_pickled():
    # Fresh processes build theirs from the arguments alone.
    assert pickle.loads(pickle.dumps(train._Counting)) is train._Counting
