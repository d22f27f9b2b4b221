"""What is read as text: pipes too, and no compressed, binary or otherwise encoded file without a word."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from rooflight.tokenizer import Tokenizer, train_bpe
from rooflight.tokenizer.files import read_token_file

TEXT = "the cat sat on the mat<|endoftext|>naïve 日本語, they'll see 1234\n" * 300
END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("x.gz", gzip.compress(TEXT.encode()), "gzip"),
        ("x.txt", gzip.compress(TEXT.encode()), "gzip"),
        ("x.zst", b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
        ("x.bz2", bz2.compress(TEXT.encode()), "bzip2"),
        ("x.xz", lzma.compress(TEXT.encode()), "xz"),
        ("x.txt", TEXT.encode("utf-16"), "UTF-16"),
        ("x.txt", b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16"),
        ("x.txt", TEXT.encode("utf-32"), "UTF-32"),
        ("x.jsonl", b'{"text": "the cat"}\n' * 100, "JSON lines"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    with pytest.raises(ValueError, match=f"{name}'? .*{what}.*expected UTF-8 text"):
        train_bpe(path, 300, [])
    with pytest.raises(ValueError, match=what):
        tokenizer.encode_file(path, tmp_path / "x.bin")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (TEXT.encode("utf-16-le"), "[1-9][0-9,]* NUL characters"),
        ("déjà vu, naïve café ".encode("latin-1") * 300, r"[1-9][0-9,]* U\+FFFD"),
    ],
)
def test_another_encoding_is_warned_of(tmp_path: Path, data: bytes, warning: str, num_workers: int) -> None:
    (tmp_path / "x.txt").write_bytes(data * (200 * num_workers - 199))  # several ranges for two processes
    with pytest.warns(UserWarning, match=warning):
        train_bpe(tmp_path / "x.txt", 300, [END], num_workers=num_workers)


def test_a_few_odd_bytes_are_no_reason_to_warn(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes((TEXT * 10).encode() + b"\x00\xff" * 99)
    train_bpe(tmp_path / "x.txt", 300, [END])


def test_pipes(tmp_path: Path) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "x.txt"
    file.write_bytes(TEXT.encode() * 20)
    os.mkfifo(pipe)

    def feed(data: bytes) -> None:
        threading.Thread(target=pipe.write_bytes, args=(data,)).start()

    trained = train_bpe(file, 300, [END])
    feed(TEXT.encode() * 20)
    assert train_bpe(pipe, 300, [END]) == trained
    feed(TEXT.encode() * 20)
    assert train_bpe([file, pipe], 300, [END]) == train_bpe([file, file], 300, [END])
    tokenizer = Tokenizer(*trained, [END])
    n = tokenizer.encode_file(file, tmp_path / "x.bin")
    feed(TEXT.encode() * 20)
    assert tokenizer.encode_file(pipe, tmp_path / "y.bin") == n
    (ids, header), (ids_of_pipe, header_of_pipe) = map(read_token_file, (tmp_path / "x.bin", tmp_path / "y.bin"))
    assert np.array_equal(ids, ids_of_pipe)
    assert header == header_of_pipe
    feed(gzip.compress(TEXT.encode()))
    with pytest.raises(ValueError, match="gzip"):
        train_bpe(pipe, 300, [END])

    # A pipe to write to gets the ids alone, and stays a pipe.
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert tokenizer.encode_file(file, pipe) == n
    reader.join(30)
    assert read == [ids.tobytes()]
    assert pipe.is_fifo()
    assert not (tmp_path / "pipe.json").exists()
