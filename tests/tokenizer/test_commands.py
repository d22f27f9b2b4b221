"""The command line, run as a user does, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.commands import app, data
from rooflight.tokenizer.files import read_token_file

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


def test_a_name_that_no_pattern_has_is_refused(folder: Path) -> None:
    for command in ("train", "count"):
        result = CliRunner().invoke(app, [command, str(folder / "text.txt"), "--out", "x", "--pattern", "gpt4"])
        assert isinstance(result.exception, ValueError)
        assert str(result.exception).startswith("pattern: got 'gpt4', expected one of gpt2, cl100k, ")


def test_text_on_the_command_line(folder: Path) -> None:
    ids = Tokenizer.load(folder / "tk").encode("the 日本")
    printed = run("encode", "-t", folder / "tk", "--text", "the 日本")
    assert printed.split() == [str(i) for i in ids]
    assert run("decode", "-t", folder / "tk", "--ids", printed) == "the 日本\n"
    lines = run("encode", "-t", folder / "tk", "--text", "the 日本", "--offsets").splitlines()
    assert len(lines) == len(ids)
    assert lines[-1].split()[1] == "5-6"


def test_several_files_become_a_token_file_each(folder: Path) -> None:
    (folder / "y.txt").write_text("the cat", encoding="utf-8")
    run("encode", "-t", folder / "tk", folder / "x.txt", folder / "y.txt", "--out", folder / "tokens", "-q")
    assert run("decode", "-t", folder / "tk", folder / "tokens" / "x.bin") == TEXT
    assert run("decode", "-t", folder / "tk", folder / "tokens" / "y.bin") == "the cat"
    for extra, message in (
        ((folder / "y.txt",), "y.bin would be written for"),
        ((folder / "no.txt",), "there is no .*no.txt"),
        (("--out", folder / "x.txt"), "out: expected a folder for 2 files"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("encode", "-t", folder / "tk", folder / "x.txt", folder / "y.txt", *extra)
    assert not (folder / "x.bin").exists()


def test_a_file_without_a_header_gets_the_one_that_encode_writes(folder: Path) -> None:
    run("encode", "-t", folder / "tk", folder / "x.txt", "-q")
    header = json.loads((folder / "x.bin.json").read_text())
    with pytest.raises(ValueError, match="is there already"):
        run("header", "-t", folder / "tk", folder / "x.bin")
    (folder / "x.bin.json").unlink()
    run("header", "-t", folder / "tk", folder / "x.bin")
    assert json.loads((folder / "x.bin.json").read_text()) == header
    for content, message in (
        (b"\x00\x00\x1d\x01", "has ids that"),
        (b"\0", "of 2 bytes each, got"),
        (b"", "of 0 bytes"),
    ):
        (folder / "z.bin").write_bytes(content)  # 285, one past the last id
        with pytest.raises(ValueError, match=message):
            run("header", "-t", folder / "tk", folder / "z.bin")
    assert not (folder / "z.bin.json").exists()


@pytest.mark.parametrize("ids", ["abc", "1 285", "-1", "1.5", "0x10"])
def test_what_is_no_id_is_named(folder: Path, ids: str) -> None:
    with pytest.raises(ValueError, match=rf"ids: expected ids of .*, got '{ids.split()[-1]}'"):
        run("decode", "-t", folder / "tk", f"--ids={ids}")


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


def test_a_corpus_counted_trained_on_and_encoded(folder: Path) -> None:
    texts = [text for text in TEXT.split("<|endoftext|>") if text]
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    (folder / "in" / "README.md").write_text("No corpus.")
    run("train", folder / "in", "--out", folder / "tk1", "--vocab-size", 285, "-q")
    for i in range(2):
        assert f"{i}.counts: " in run(
            "count", folder / "in", "--out", folder / f"{i}.counts", "--shard", f"{i}/2", "-q"
        )
    counts = [argument for i in range(2) for argument in ("--counts", folder / f"{i}.counts")]
    assert "from 2 files of counts" in run("train", *counts, "--out", folder / "tk2", "--vocab-size", 285, "-q")
    names = [path.name for path in (folder / "tk1").iterdir()]
    assert names
    for name in names:
        assert (folder / "tk1" / name).read_bytes() == (folder / "tk2" / name).read_bytes()

    tokenizer = Tokenizer.load(folder / "tk1")
    ids = [i for text in texts for i in (*tokenizer.encode(text, allowed_special="none"), 0)]
    alone = typer.Typer()
    alone.command()(data)
    for arguments, of in (((), "1 files"), (("--eod", ""), "1 files"), (("--shard", "1/2"), "0 files")):
        out = folder / f"out{len(of)}{len(arguments)}{arguments[:1]}"
        result = CliRunner().invoke(
            alone, [*map(str, (folder / "in", "-t", folder / "tk1", "--out", out, "-q")), *arguments]
        )
        assert result.exit_code == 0, result.output
        found = [i for path in sorted(out.glob("*.bin")) for i in read_token_file(path)[0].tolist()]
        assert found == ([] if "--shard" in arguments else [i for i in ids if i] if arguments else ids)
        assert f"{of}, {len(found):,} tokens of" in result.output
        if not arguments:
            assert "left out: 1 documents without text" in result.output
        assert "left out: 1 files (.md)" in result.output
    for arguments, message in (
        (("train", "--out", folder / "tk3"), "neither text nor --counts"),
        (("train", folder / "x.txt", *counts, "--out", folder / "tk3"), "both text and --counts"),
        (("train", "--counts", folder / "tk2" / "vocab.json", "--out", folder / "tk2", "--overwrite"), "is the input"),
        (("count", folder / "in", "--out", folder / "c", "--shard", "1-2"), "shard: got '1-2', expected I/N"),
        (("count", folder / "in", "--out", folder / "c", "--shard", "2/2"), "shard: got 2/2, expected I/N"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)


def test_the_commands_do_without_torch() -> None:
    code = "import sys, rooflight.tokenizer.commands; assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_command_writes_over_its_input(folder: Path) -> None:
    run("encode", "-t", folder / "tk", folder / "x.txt", "-q")
    (folder / "link").symlink_to(folder / "x.bin")
    (folder / "y.bin").write_text(TEXT, encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for arguments in (
        ("encode", folder / "x.txt", "--out", folder / "x.txt", "-q"),
        ("encode", folder / "y.bin", "-q"),  # whose default output is itself
        ("decode", folder / "x.bin", "--out", folder / "x.bin"),
        ("decode", folder / "x.bin", "--out", folder / "link"),
        ("decode", folder / "x.bin", "--out", folder / "x.bin.json"),
    ):
        with pytest.raises(ValueError, match="is the input"):
            run(arguments[0], "-t", folder / "tk", *arguments[1:])
    with pytest.raises(ValueError, match="is the input"):
        run("train", folder / "tk" / "merges.txt", "--out", folder / "tk", "--overwrite", "-q")
    with pytest.raises(ValueError, match="expected another folder or --overwrite"):
        run("train", folder / "x.txt", "--out", folder / "tk", "-q")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    run("train", folder / "x.txt", "--out", folder / "tk", "--overwrite", "--vocab-size", 280, "-q")
    assert Tokenizer.load(folder / "tk").vocab_size == 280


def test_where_the_result_cannot_go_is_said_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_bpe", "count_words"):
        monkeypatch.setattr(f"rooflight.tokenizer.{name}", lambda *_, **__: pytest.fail("the work was begun"))
    monkeypatch.setattr(Tokenizer, "encode_file", lambda *_, **__: pytest.fail("the work was begun"))
    text, encode = folder / "x.txt", ("encode", "-t", folder / "tk", folder / "x.txt", "--out")
    for arguments, message in (
        (("train", text, "--out", text), "x.txt is no folder"),
        (("train", text, "--out", text / "tk"), "x.txt is no folder"),
        (("count", text, "--out", folder), "is a folder, expected a file"),
        ((*encode, folder), "is a folder, expected a file"),
        ((*encode[:4], "--text", "x"), "got both a file and --text"),
        (("decode", "-t", folder / "tk", text, "--ids", "1"), "got both a file and --ids"),
        (("encode", "-t", folder / "none", text), "none: no folder of a tokenizer there"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(*arguments)
