"""The tokenizer beside its peers: the command, run as a user does, and what no speed is shown for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rooflight.bench.cases import tokenizer as tokenizer_case
from rooflight.bench.cli import app
from rooflight.tokenizer import Tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "x.txt"
    path.write_text("the cat sat on the mat<|endoftext|>naïve 日本語, they'll see 1234\n" * 200, encoding="utf-8")
    return path


def test_bench_measures_every_installed_peer(text: Path) -> None:
    out = text.with_name("bench.json")
    arguments = ["tokenizer", "bench", text, "--vocab-size", 285, "--repeats", 1, "--json", out, "-q"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    printed = result.output
    assert "tiktoken" in printed
    assert "285 tokens" in printed
    found = json.loads(out.read_text())
    assert found["kind"] == "tokenizer"
    assert found["corpus"] == {"name": "x.txt", "bytes": 14_000, "encoded_bytes": 14_000, "vocab_size": 285}
    assert found["failures"] == []
    measured = {(row["task"], row["peer"]) for row in found["rows"]}
    encoders = ("tiktoken", "tokenizers")
    tasks = ("encode", "encode again", "encode short", "decode", "encode file")
    assert measured >= {("train", "tokenizers"), *((task, peer) for task in tasks for peer in encoders)}
    for row in found["rows"]:
        assert min(value for name, value in row.items() if name not in ("task", "peer")) > 0


def test_bench_shows_no_speed_for_other_ids_and_says_why_a_peer_fails(text: Path, monkeypatch) -> None:
    jobs = []

    def measured(job: dict) -> dict | str:
        jobs.append((job["task"], job["peer"], job["workers"]))
        if job["peer"] == "tokenizers":
            return "it crashed"
        return {"parts": {job["task"]: [2.0, 1.0]}, "proof": job["peer"] == "tiktoken", "peak_bytes": 1_000_000}

    monkeypatch.setattr(tokenizer_case, "_run", measured)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    rows = tokenizer_case.compare(text, tokenizer=tokenizer, only=["tiktoken", "tokenizers"], repeats=2)
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
    found = tokenizer_case.results(rows, text, vocab_size=285, encode_bytes=1, num_workers=2)
    assert found["rows"] == []
    assert len(found["failures"]) == 4


def test_the_comparison_does_without_torch() -> None:
    code = "import sys, rooflight.bench.cli, rooflight.bench.cases.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
