"""The command line, run as a user does, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rooflight.tokenizer import Tokenizer, compare
from rooflight.tokenizer.commands import app

TEXT = "the cat sat on the mat<|endoftext|>naïve 日本語, they'll see 1234\n" * 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.txt").write_text(TEXT, encoding="utf-8")
    run("train", tmp_path / "x.txt", "--out", tmp_path / "tk", "--vocab-size", 285, "-q")
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_train_encode_decode(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tk")
    assert tokenizer.vocab_size == 285
    assert tokenizer.special_tokens == {"<|endoftext|>": 0}
    n = len(tokenizer.encode(TEXT))
    assert f"{n:,} tokens" in run("encode", "-t", folder / "tk", folder / "x.txt", "-q")
    run("decode", "-t", folder / "tk", folder / "x.bin", "--out", folder / "y.txt")
    assert (folder / "y.txt").read_text(encoding="utf-8") == TEXT
    assert run("decode", "-t", folder / "tk", folder / "x.bin") == TEXT


def test_text_on_the_command_line(folder: Path) -> None:
    ids = Tokenizer.load(folder / "tk").encode("the 日本")
    printed = run("encode", "-t", folder / "tk", "--text", "the 日本")
    assert printed.split() == [str(i) for i in ids]
    assert run("decode", "-t", folder / "tk", "--ids", printed) == "the 日本\n"
    lines = run("encode", "-t", folder / "tk", "--text", "the 日本", "--offsets").splitlines()
    assert len(lines) == len(ids)
    assert lines[-1].split()[1] == "5-6"


def test_inspect(folder: Path) -> None:
    printed = run("inspect", "-t", folder / "tk", folder / "x.txt", "--text", "the cat 日本")
    tokenizer = Tokenizer.load(folder / "tk")
    assert "285 tokens, 28 merges" in printed
    assert "<|endoftext|> = 0" in printed
    assert tokenizer.hash in printed
    assert f"{len(TEXT.encode()) / len(tokenizer.encode(TEXT)):.3f} on" in printed
    assert "the cat 日本" in printed


def test_tokenizer_json_is_read_too(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tk")
    tokenizer.export_hf(folder / "tokenizer.json")
    printed = run("encode", "-t", folder / "tokenizer.json", "--text", "the cat")
    assert printed.split() == [str(i) for i in tokenizer.encode("the cat")]


def test_token_files_of_another_tokenizer_are_refused(folder: Path) -> None:
    run("encode", "-t", folder / "tk", folder / "x.txt", "-q")
    run("train", folder / "x.txt", "--out", folder / "other", "--vocab-size", 280, "-q")
    with pytest.raises(ValueError, match="was made by the tokenizer"):
        run("decode", "-t", folder / "other", folder / "x.bin")
    with pytest.raises(ValueError, match="neither a file nor --text"):
        run("encode", "-t", folder / "tk")
    with pytest.raises(ValueError, match="neither a file nor --ids"):
        run("decode", "-t", folder / "tk")


def test_bench_measures_every_installed_peer(folder: Path) -> None:
    printed = run("bench", folder / "x.txt", "--vocab-size", 285, "--repeats", 1, "--json", folder / "bench.json", "-q")
    assert "tiktoken" in printed
    assert "285 tokens" in printed
    found = json.loads((folder / "bench.json").read_text())
    assert found["kind"] == "tokenizer"
    assert found["corpus"] == {"name": "x.txt", "bytes": 14_000, "encoded_bytes": 14_000, "vocab_size": 285}
    assert found["failures"] == []
    measured = {(row["task"], row["peer"]) for row in found["rows"]}
    encoders = ("tiktoken", "tokenizers")
    tasks = ("encode", "encode again", "encode short", "decode", "encode file")
    assert measured >= {("train", "tokenizers"), *((task, peer) for task in tasks for peer in encoders)}
    for row in found["rows"]:
        assert min(value for name, value in row.items() if name not in ("task", "peer")) > 0


def test_bench_shows_no_speed_for_other_ids_and_says_why_a_peer_fails(folder: Path, monkeypatch) -> None:
    jobs = []

    def measured(job: dict) -> dict | str:
        jobs.append((job["task"], job["peer"], job["workers"]))
        if job["peer"] == "tokenizers":
            return "it crashed"
        return {"parts": {job["task"]: [2.0, 1.0]}, "proof": job["peer"] == "tiktoken", "peak_bytes": 1_000_000}

    monkeypatch.setattr(compare, "_run", measured)
    tokenizer = Tokenizer.load(folder / "tk")
    rows = compare.compare(folder / "x.txt", tokenizer=tokenizer, only=["tiktoken", "tokenizers"], repeats=2)
    assert jobs[:6] == [
        ("encode", "rooflight", 1),
        ("encode", "tiktoken", 1),
        ("encode", "tokenizers", 1),
        ("encode", "rooflight", 1),
        ("encode file", "rooflight", 2),
        ("encode file", "tiktoken", 2),
    ]
    assert rows[0] == ("encode", "rooflight", 2.0, 1.0, 1_000_000, "")
    assert [row.why_not for row in rows[1:3]] == ["other result: True", "it crashed"]
    found = compare.results(rows, folder / "x.txt", vocab_size=285, encode_bytes=1, num_workers=2)
    assert found["rows"] == []
    assert len(found["failures"]) == 4


def test_the_commands_do_without_torch() -> None:
    code = "import sys, rooflight.tokenizer.commands; assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
