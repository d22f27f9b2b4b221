"""What is read as text: pipes too, and no compressed, binary or otherwise encoded file without a word."""

from __future__ import annotations

import bz2
import gzip
import json
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
        ("x.bz2", bz2.compress(TEXT.encode()), "bzip2"),
        ("x.xz", lzma.compress(TEXT.encode()), "xz"),
        ("x.txt", TEXT.encode("utf-16"), "UTF-16"),
        ("x.txt", b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16"),
        ("x.txt", TEXT.encode("utf-32"), "UTF-32"),
        ("x.txt", b"PAR1", "Parquet"),
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
@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt"])  # known by its first bytes
def test_compressed_text_is_read(tmp_path: Path, name: str, num_workers: int) -> None:
    (tmp_path / "plain").write_bytes(TEXT.encode() * 20)
    (tmp_path / name).write_bytes(gzip.compress(TEXT.encode() * 20))
    trained = train_bpe(tmp_path / "plain", 300, [END])
    assert train_bpe(tmp_path / name, 300, [END], num_workers=num_workers) == trained
    tokenizer = Tokenizer(*trained, [END])
    tokenizer.encode_file(tmp_path / "plain", tmp_path / "plain.bin")
    tokenizer.encode_file(tmp_path / name, tmp_path / "x.bin", num_workers=num_workers)
    (ids, header), (ids_of_gz, header_of_gz) = (read_token_file(tmp_path / f) for f in ("plain.bin", "x.bin"))
    assert np.array_equal(ids, ids_of_gz)
    assert header == header_of_gz


def test_documents_are_trained_on_and_not_encoded_without_ends(tmp_path: Path) -> None:
    texts = TEXT.split("\n")
    (tmp_path / "x.txt").write_text(END.join(texts))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    trained = train_bpe(tmp_path / "x.txt", 300, [END])
    assert train_bpe(tmp_path / "x.jsonl", 300, [END]) == trained
    with pytest.raises(ValueError, match=r"x\.jsonl' holds JSON lines, .*`rooflight data`"):
        Tokenizer(*trained, [END]).encode_file(tmp_path / "x.jsonl", tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: has no field 'body'"):
        train_bpe(tmp_path / "x.jsonl", 300, [END], field="body")


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
    feed(gzip.compress(TEXT.encode() * 20))
    assert train_bpe(pipe, 300, [END]) == trained
    feed(bz2.compress(TEXT.encode()))
    with pytest.raises(ValueError, match="bzip2"):
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
