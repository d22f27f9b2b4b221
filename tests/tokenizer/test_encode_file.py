"""Token files: contents, processes, and what happens when something goes wrong half way."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rooflight.tokenizer import Tokenizer, encode_file
from rooflight.tokenizer.encoding import BulkEncoder
from rooflight.tokenizer.files import read_token_file
from rooflight.tokenizer.pretokenize import Cutter
from support import bpe_reference

END = "<|endoftext|>"
CORPUS = "the cat sat on the mat; naïve café, 日本語日本語 aaaaaaaa  \t\n\x00 1234 they'll see\n" * 3
VOCAB, MERGES = bpe_reference.train(CORPUS, 60)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCAB, MERGES, [END, END + END])


@pytest.fixture
def text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(encode_file, "TASK", 3000)
    monkeypatch.setattr(encode_file, "GROUP", 1000)
    path = tmp_path / "x.txt"
    path.write_bytes(((CORPUS + END) * 150).encode())
    return path


def test_tokens_and_header(tokenizer: Tokenizer, text_file: Path) -> None:
    text = text_file.read_bytes().decode()
    out = text_file.with_name("x.bin")
    n = tokenizer.encode_file(text_file, out, num_workers=1)
    ids = np.fromfile(out, "<u2")
    assert ids.tolist() == tokenizer.encode(text)
    assert json.loads(text_file.with_name("x.bin.json").read_text()) == {
        "format": "rooflight-tokens",
        "version": 1,
        "dtype": "uint16",
        "vocab_size": len(VOCAB) + 2,
        "tokenizer_hash": tokenizer.hash,
        "n_tokens": n,
        "n_bytes": len(text.encode()),
    }
    read, header = read_token_file(out)
    assert np.array_equal(read, ids)
    assert header["n_tokens"] == n
    assert sorted(p.name for p in text_file.parent.iterdir()) == ["x.bin", "x.bin.json", "x.txt"]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_processes(
    tokenizer: Tokenizer, text_file: Path, num_workers: int
) -> None:
    one, several = text_file.with_name("one.bin"), text_file.with_name("several.bin")
    n = tokenizer.encode_file(text_file, one, num_workers=1)
    assert tokenizer.encode_file(text_file, several, num_workers=num_workers) == n
    assert one.read_bytes() == several.read_bytes()
    texts = text_file.read_text(encoding="utf-8").split(END)
    assert tokenizer.encode_batch(texts, num_workers=num_workers) == [tokenizer.encode(text) for text in texts]


def test_large_vocabularies_take_four_bytes(text_file: Path) -> None:
    tokenizer = Tokenizer(VOCAB | {70_000: END.encode()}, MERGES, [END])
    tokenizer.encode_file(text_file, text_file.with_name("x.bin"), num_workers=1)
    ids, header = read_token_file(text_file.with_name("x.bin"))
    assert header["dtype"] == "uint32"
    assert ids.tolist() == tokenizer.encode(text_file.read_text(encoding="utf-8"))


def test_invalid_utf8_is_read_as_the_replacement_character(tokenizer: Tokenizer, text_file: Path) -> None:
    data = bytes(range(256)) * 40 + b"\xe6\x97 \xf0\x9f"
    text_file.write_bytes(data)
    tokenizer.encode_file(text_file, text_file.with_name("x.bin"), num_workers=1)
    ids, header = read_token_file(text_file.with_name("x.bin"))
    assert ids.tolist() == tokenizer.encode(data.decode(errors="replace"))
    assert header["n_bytes"] == len(data)


def test_an_empty_file_gives_an_empty_token_file(tokenizer: Tokenizer, text_file: Path) -> None:
    text_file.write_bytes(b"")
    assert tokenizer.encode_file(text_file, text_file.with_name("x.bin")) == 0
    assert len(read_token_file(text_file.with_name("x.bin"))[0]) == 0


def test_bad_arguments(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        tokenizer.encode_file(tmp_path / "nothing.txt", tmp_path / "x.bin")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match="num_workers: got 0"):
        tokenizer.encode_file(tmp_path / "x.txt", tmp_path / "x.bin", num_workers=0)
    with pytest.raises(FileNotFoundError):
        tokenizer.encode_file(tmp_path / "x.txt", tmp_path / "no folder" / "x.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


class InterruptedTestError(Exception):
    pass


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_leaves_what_was_there(
    tokenizer: Tokenizer, text_file: Path, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = text_file.with_name("x.bin")
    if earlier:
        tokenizer.encode_file(text_file, out, num_workers=1)
    before = {p.name: p.read_bytes() for p in text_file.parent.iterdir()}
    calls = 0

    def fail_later(self: BulkEncoder, data: bytes, cutter: Cutter) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedTestError
        return np.zeros(len(data), np.int32)

    monkeypatch.setattr(BulkEncoder, "encode_bytes", fail_later)
    with pytest.raises(InterruptedTestError):
        tokenizer.encode_file(text_file, out, num_workers=1)
    assert {p.name: p.read_bytes() for p in text_file.parent.iterdir()} == before


def children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_killed_worker_ends_the_whole(tokenizer: Tokenizer, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This process works slowly, so that the other one starts, takes tasks and is killed on one of them.
    own = BulkEncoder.encode_bytes
    monkeypatch.setattr(BulkEncoder, "encode_bytes", lambda *arguments: (time.sleep(0.05), own(*arguments))[1])
    known = set(children())

    def kill() -> None:
        while not (started := set(children()) - known):
            time.sleep(0.01)
        for pid in started:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"worker process \d+ was killed by SIGKILL"):
        tokenizer.encode_file(text_file, text_file.with_name("x.bin"), num_workers=2)
    killer.join()
    assert [p.name for p in text_file.parent.iterdir()] == ["x.txt"]
    assert set(children()) == known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no header of a token file"),
        ({"n_tokens": 3}, "does not hold the 3 uint16 ids"),
        ({"dtype": "uint32"}, "does not hold"),
    ],
)
def test_token_files_that_do_not_fit_their_header_are_refused(
    tokenizer: Tokenizer, text_file: Path, change: dict, message: str
) -> None:
    out, header = text_file.with_name("x.bin"), text_file.with_name("x.bin.json")
    tokenizer.encode_file(text_file, out, num_workers=1)
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_token_file(out)
    header.unlink()
    with pytest.raises(FileNotFoundError):
        read_token_file(out)


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_the_input_is_no_output(tokenizer: Tokenizer, text_file: Path, link: str | None) -> None:
    before = text_file.read_bytes()
    other = text_file.with_name("y.txt")
    if link:
        getattr(other, link)(text_file)
    else:
        other = text_file.parent / "." / text_file.name
    for path, out in (text_file, other), (other, text_file):
        with pytest.raises(ValueError, match=r"out_path: .* is the input"):
            tokenizer.encode_file(path, out)
    header = text_file.rename(text_file.with_name("x.bin.json"))
    with pytest.raises(ValueError, match=r"out_path: .* is the input"):  # which the header would replace
        tokenizer.encode_file(header, text_file.with_name("x.bin"))
    assert header.read_bytes() == before


def test_writers_of_one_file_do_not_disturb_each_other(tokenizer: Tokenizer, text_file: Path) -> None:
    """The last to finish has its token file and its header there; here they differ in length."""
    other = text_file.with_name("other.txt")
    other.write_bytes(text_file.read_bytes()[: 1 << 12])
    out = text_file.with_name("x.bin")

    def write(path: Path) -> None:
        for _ in range(10):
            tokenizer.encode_file(path, out, num_workers=1)
            done.append(path)

    done: list[Path] = []
    threads = [threading.Thread(target=write, args=(path,)) for path in (text_file, other, text_file, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 40
    read_token_file(out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["other.txt", "x.bin", "x.bin.json", "x.txt"]
