"""`rooflight data`: ids as documents encoded alone have them, in files that no interruption or division changes."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.corpus import encode, prepare
from rooflight.tokenizer.corpus.encode import EncodeWorker
from rooflight.tokenizer.definition import define
from rooflight.tokenizer.files import read_json, read_token_file
from rooflight.tokenizer.tokenizer import _build
from rooflight.training.data import open_tokens
from support import bpe_reference

EOD, OTHER = "<|endoftext|>", "<|user|>"
CORPUS = "the cat sat on the mat; naïve café, 日本語日本語 aaaaaaaa  \t\n\x00 1234 they'll see\n" * 3
VOCAB, MERGES = bpe_reference.train(CORPUS, 60)
TOKENIZER = Tokenizer(VOCAB, MERGES, [EOD, OTHER])
EOD_ID = TOKENIZER.special_tokens[EOD]

random.seed(16)
_WORDS = [*CORPUS.replace("\0", "").split(" "), EOD, OTHER, "<|", "\n\n", "x" * 40, "😀"]
DOCUMENTS = [" ".join(random.choices(_WORDS, k=random.choice([1, 5, 40, 200]))) for _ in range(120)] + [EOD]
EMPTY = [""] * 3 + [None]  # among the lines and rows
TEXT = EOD.join(text.replace(EOD, "") or "a" for text in DOCUMENTS)


def json_lines() -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in [*EMPTY, *DOCUMENTS, *EMPTY])


def parquet() -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    written = io.BytesIO()
    pq.write_table(pa.table({"text": EMPTY + DOCUMENTS + EMPTY}), written, row_group_size=30)
    return written.getvalue()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


INPUTS: dict[str, Callable[[], bytes]] = {
    "a.txt": TEXT.encode,
    "b.txt.gz": lambda: gzip.compress((TEXT + EOD).encode()),  # its last document has its end
    "b.txt.zst": lambda: zstd(TEXT.encode()),
    "c.jsonl": json_lines,
    "d.jsonl.gz": lambda: gzip.compress(json_lines()),
    "d.jsonl.zst": lambda: zstd(json_lines()),
    "e.parquet": parquet,
}


def expected(name: str, *, eod: bool = True, allow_special: bool = False) -> tuple[list[int], int, int]:
    """The ids of a file, its documents and their bytes, by encoding each alone."""
    is_text = "txt" in name
    found = TEXT.split(EOD) if is_text else DOCUMENTS
    ids: list[int] = []
    for text in found:
        ids += TOKENIZER.encode(text, allowed_special={OTHER, EOD} if allow_special else "none")
        if eod and ids[-1] != EOD_ID:
            ids.append(EOD_ID)
    n_bytes = sum(len(text.encode()) for text in found)
    if allow_special and eod and not is_text:
        n_bytes -= sum(text.count(EOD) for text in found) * len(EOD)
    return ids, ids.count(EOD_ID) if eod else len(found), n_bytes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ids_in(folder: Path) -> list[int]:
    return np.concatenate([read_token_file(path)[0] for path in sorted(folder.glob("*.bin"))]).tolist()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of every kind of file, and of texts that share parts."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz"):
        (folder / name).write_bytes(INPUTS[name]())
    for n, text in enumerate(DOCUMENTS[:20]):
        (folder / f"z{n:02}.txt").write_text(text, newline="")
    return folder


@pytest.mark.parametrize(("shard_tokens", "num_workers"), [(50_000, 1), (2000, 2)])
@pytest.mark.parametrize("name", INPUTS)
def test_ids_are_those_of_each_document(tmp_path: Path, name: str, shard_tokens: int, num_workers: int) -> None:
    (tmp_path / name).write_bytes(INPUTS[name]())
    out = tmp_path / "out"
    done = prepare.prepare(TOKENIZER, [tmp_path / name], out, shard_tokens=shard_tokens, num_workers=num_workers)
    ids, n_documents, n_bytes = expected(name)
    assert ids_in(out) == ids
    headers = [json.loads(path.read_text()) for path in sorted(out.glob("shard-*.json"))]
    assert done.headers == headers
    assert sum(header["n_documents"] for header in headers) == n_documents
    assert sum(header["n_bytes"] for header in headers) == n_bytes
    assert {header["eod"] for header in headers} == {EOD_ID}
    assert done.n_empty == (0 if "txt" in name else 2 * len(EMPTY))
    assert len(headers) > len(ids) / shard_tokens
    for path in out.glob("*.bin"):
        opened = open_tokens(path)  # what training reads them by
        assert 0 < opened.n_tokens <= shard_tokens
        assert opened.tokenizer_hash == TOKENIZER.hash
        if "txt" not in name:
            assert opened.tokens[-1] == EOD_ID  # a document is whole
    assert len(list(out.iterdir())) == 2 * len(headers) + 1


@pytest.mark.parametrize("name", ["a.txt", "c.jsonl"])
@pytest.mark.parametrize("eod", [True, False])
@pytest.mark.parametrize("allow_special", [True, False])
def test_special_tokens_in_the_text(tmp_path: Path, name: str, eod: bool, allow_special: bool) -> None:
    (tmp_path / name).write_bytes(INPUTS[name]())
    out = tmp_path / "out"
    done = prepare.prepare(
        TOKENIZER, [tmp_path / name], out, eod=EOD if eod else None, allow_special=allow_special, num_workers=1
    )
    ids, n_documents, n_bytes = expected(name, eod=eod, allow_special=allow_special)
    if name == "a.txt" and not eod:  # the text between is text too
        ids = TOKENIZER.encode(TEXT, allowed_special="all" if allow_special else "none")
        n_documents, n_bytes = 1, len(TEXT.encode())
    assert ids_in(out) == ids
    (header,) = done.headers
    assert (header["n_documents"], header["n_bytes"]) == (n_documents, n_bytes)
    assert ("eod" in header) == eod


@pytest.mark.parametrize("pattern", ["gpt2", r"\p{L}+"])
def test_long_documents_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(encode, "TASK", 20)
    tokenizer = Tokenizer(VOCAB, MERGES, [EOD, OTHER], pattern=pattern)
    texts = [*DOCUMENTS, "1", "2", "a", "1 2"]  # of which a pattern of one's own leaves some and some not
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.prepare(tokenizer, [tmp_path / "x.jsonl"], tmp_path / "out", num_workers=1)
    encoded = [tokenizer.encode(text, allowed_special="none") for text in texts]
    assert ids_in(tmp_path / "out") == [i for ids in encoded if ids for i in (*ids, EOD_ID)]


@pytest.mark.parametrize("n", [3, 50])
def test_jobs_write_the_files_that_one_writes(corpus: Path, tmp_path: Path, n: int) -> None:
    whole = prepare.prepare(TOKENIZER, [corpus], tmp_path / "whole", shard_tokens=3000, num_workers=1)
    headers = []
    for i in reversed(range(n)):
        headers += prepare.prepare(
            TOKENIZER, [corpus], tmp_path / "jobs", shard_tokens=3000, num_workers=1, shard=(i, n)
        ).headers
    assert contents(tmp_path / "jobs") == contents(tmp_path / "whole")
    assert sorted(map(json.dumps, headers)) == sorted(map(json.dumps, whole.headers))
    parts = {name.split("-")[1] for name in contents(tmp_path / "whole") if name.startswith("shard")}
    assert len(parts) > 10
    assert any(name.endswith("-002.bin") for name in contents(tmp_path / "whole"))


def test_going_on_after_an_error_anywhere(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path) -> None:
        prepare.prepare(TOKENIZER, [corpus], out, shard_tokens=3000, num_workers=1)

    run(tmp_path / "whole")
    encode_task, n_calls, stop_at = EncodeWorker.run, 0, 0

    def stopping(worker: EncodeWorker, task: encode.Task) -> encode.Result:
        nonlocal n_calls
        n_calls += 1
        if n_calls == stop_at:
            raise KeyboardInterrupt
        return encode_task(worker, task)

    monkeypatch.setattr(EncodeWorker, "run", stopping)
    run(tmp_path / "counted")
    n_tasks = n_calls
    assert n_tasks > 100
    for step in (25, 10**9):  # interrupted every so many tasks, until nothing is left
        out = tmp_path / f"out{step}"
        n_encoded = n_runs = 0
        while True:
            stop_at, n_calls = step, 0
            try:
                run(out)
                break
            except KeyboardInterrupt:
                n_runs += 1
                assert n_runs < n_tasks
                assert not list(out.glob("*.tmp"))
            finally:
                n_encoded += n_calls
        assert contents(out) == contents(tmp_path / "whole")
        assert n_encoded <= n_tasks + n_runs * 15  # no more is done again than a shard
    n_calls = 0
    run(tmp_path / "whole")
    assert n_calls == 0


def test_going_on_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    """Each process is killed in the middle of a shard; the last one is not."""
    TOKENIZER.save(tmp_path / "tk")
    code = """
import os, sys
from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.corpus import encode, prepare
tokenizer, corpus, out, left, num_workers = sys.argv[1:]
def run(worker, task, run=encode.EncodeWorker.run, left=[int(left)], parent=os.getpid()):
    left[0] -= 1
    if left[0] == 0:
        os.kill(parent, 9)
    return run(worker, task)
encode.EncodeWorker.run = run
prepare.prepare(Tokenizer.load(tokenizer), [corpus], out, shard_tokens=3000, num_workers=int(num_workers))
"""
    prepare.prepare(TOKENIZER, [corpus], tmp_path / "whole", shard_tokens=3000, num_workers=1)
    out, leftovers = tmp_path / "out", 0
    for left, num_workers in ((30, 1), (20, 2), (10**9, 2)):
        arguments = [tmp_path / "tk", corpus, out, str(left), str(num_workers)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=120, check=False)
        if left < 10**9:
            assert done.returncode == -signal.SIGKILL
            leftovers += len(list(out.glob("*.tmp")))
    assert done.returncode == 0
    assert leftovers
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_damaged_or_gone_is_made_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run() -> None:
        prepare.prepare(TOKENIZER, [corpus], out, shard_tokens=3000, num_workers=1)

    run()
    before = contents(out)
    several = max(name for name in before if name.endswith("-001.bin"))
    (out / several).write_bytes(before[several][:-2])
    (out / "shard-00000-000.bin.json").unlink()
    (out / "shard-00001-000.bin").unlink()
    with (out / "shard-00000-000.bin.9-0.tmp").open("wb") as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        run()
        assert (out / "shard-00000-000.bin.9-0.tmp").exists()  # a writer's, still at work
    (out / "shard-00000-000.bin.9-0.tmp").unlink()
    assert contents(out) == before


def test_what_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(inputs: list[Path] = [corpus], out: Path = out, tokenizer: Tokenizer = TOKENIZER, **options) -> None:  # noqa: B006
        prepare.prepare(tokenizer, inputs, out, num_workers=1, **options)

    same_id = Tokenizer(VOCAB, MERGES, ["t"])
    for options, message in (
        ({"eod": "<|end|>"}, r"eod: '<\|end\|>' is no special token of the tokenizer, expected one of '<\|endoftext"),
        ({"eod": "t", "tokenizer": same_id}, "eod: 't' may come from ordinary text"),
        ({"shard_tokens": 0}, "shard_tokens: got 0, expected a positive integer"),
        ({"shard": (2, 2)}, "shard: got 2/2"),
        ({"inputs": [corpus / "a.txt", corpus]}, "a.txt is given twice"),
        ({"out": corpus}, "out: .*in holds the input"),
        ({"out": corpus / "out"}, "out: .* lies in the input"),
        ({"out": corpus, "inputs": [corpus / "c.jsonl"]}, "out: .*in holds the input .*c.jsonl"),
        ({"out": corpus / "a.txt"}, "out: .*a.txt is a file, expected a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    (tmp_path / "link").symlink_to(corpus)
    with pytest.raises(ValueError, match="holds the input"):
        run(out=tmp_path / "link")
    assert not out.exists()

    (corpus / "c.jsonl").write_bytes(INPUTS["c.jsonl"]() + b"{")
    with pytest.raises(ValueError, match=r"c\.jsonl, line 130: is no JSON"):
        run()
    assert [path.name for path in out.iterdir()] == ["corpus.json"]  # and nothing half done
    (corpus / "c.jsonl").write_bytes(INPUTS["c.jsonl"]())
    run()
    before = contents(out)
    other = Tokenizer(VOCAB, MERGES[:-1], [EOD, OTHER])
    for options, message in (
        ({"tokenizer": other}, "a corpus of other tokenizer_hash"),
        ({"eod": None}, "a corpus of other eod"),
        ({"eod": OTHER}, "a corpus of other eod"),
        ({"shard_tokens": 10**6}, "a corpus of other shard_tokens, 100000000, expected 1000000 or another folder"),
        ({"allow_special": True}, "a corpus of other allow_special"),
        ({"field": "body"}, "a corpus of other field"),
        ({"inputs": [corpus / "a.txt"]}, "a corpus of other inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    assert contents(out) == before
    of_parts = {"out": tmp_path / "parts", "shard_tokens": 1000}
    run(**of_parts)
    with pytest.raises(ValueError, match="a corpus of other inputs"):  # and not of another number of parts
        run(inputs=[corpus / "a.txt"], **of_parts)
    (out / "corpus.json").unlink()
    with pytest.raises(ValueError, match="holds token files but no corpus"):
        run()


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 1\n.txt"))
    path.write_text("the cat")
    for _ in range(2):
        headers = prepare.prepare(TOKENIZER, [path], tmp_path / "out", num_workers=1).headers
        assert headers == [read_json(tmp_path / "out" / "shard-00000-000.bin.json")]
    assert read_json(tmp_path / "out" / "corpus.json")["inputs"] == [[f"{tmp_path}/caf\\xe9 1\n.txt", 7]]


def test_documents_without_text_end_the_part_of_a_long_one(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("the cat " * 100, *EMPTY)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for n_empty in (4, 0):  # the second time there is nothing to do
        prepared = prepare.prepare(
            TOKENIZER, [tmp_path / "x.jsonl.gz"], tmp_path / "out", shard_tokens=10, num_workers=1
        )
        assert prepared.n_empty == n_empty
        assert [(header["n_tasks"], header["part_ends"]) for header in prepared.headers] == [(5, True)]


@pytest.mark.parametrize("name", INPUTS)
def test_a_byte_without_a_token_is_said_to_be_in_which_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(INPUTS[name]())
    vocab = {i: b"x" * (2 + i) if token == b" " else token for i, token in VOCAB.items()}
    lacks = _build(define(vocab, [], [EOD], "gpt2", ignore_merges=False, all_bytes=False))
    with pytest.raises(ValueError, match=rf"{name}: text: the byte b' ' has no token"):
        prepare.prepare(lacks, [tmp_path / name], tmp_path / "out", num_workers=1)


def test_another_encoding_is_warned_of_and_nothing_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("déjà vu, naïve café ".encode("latin-1") * 300)
    with pytest.warns(UserWarning, match=r"[1-9][0-9,]* U\+FFFD"):
        prepare.prepare(TOKENIZER, [tmp_path / "x.txt"], tmp_path / "out", num_workers=1)
    text = TOKENIZER.decode(ids_in(tmp_path / "out"))
    assert text == "d\ufffdj\ufffd vu, na\ufffdve caf\ufffd " * 300 + EOD
    (tmp_path / "y.txt").write_text(EOD)
    (tmp_path / "z.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "nothing.txt").write_text("")
    for _ in range(2):
        inputs = [tmp_path / name for name in ("y.txt", "z.jsonl", "nothing.txt")]
        assert prepare.prepare(TOKENIZER, inputs, tmp_path / "none", num_workers=1) == ([], 1, [])
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["corpus.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt.gz", "x.parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, name: str) -> None:
    """The peak of a process for 120 MB of text, beside that for 30 MB; the rows are one group of one file."""
    TOKENIZER.save(tmp_path / "tk")
    code = """
import re, sys
from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.corpus.prepare import prepare
prepare(Tokenizer.load(sys.argv[1]), [sys.argv[2]], sys.argv[3], num_workers=1, shard_tokens=4_000_000)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""  # (getrusage would tell of the process that started this one too.)
    text = " ".join(random.choices(_WORDS[:-6], k=400_000))[:1_000_000]
    peaks = []
    for size in (30, 120):
        path = tmp_path / str(size) / name
        path.parent.mkdir()
        if name == "x.parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            starts = random.choices(range(len(text) - 10_000), k=100 * size)
            pq.write_table(pa.table({"text": [text[i : i + 10_000] for i in starts]}), path)
        else:
            data = (json.dumps({"text": text}) + "\n").encode() if name == "x.jsonl" else text.encode()
            with path.open("wb") if name == "x.jsonl" else gzip.open(path, "wb", compresslevel=1) as file:
                file.writelines([data] * size)
        arguments = [tmp_path / "tk", path, tmp_path / f"out{size}"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, env=os.environ
        )
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 20, peaks
