"""The demo's text: markup stripped, documents split, nothing fetched in a test."""

from pathlib import Path

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


def test_files_that_are_not_text_are_passed_over(tmp_path: Path):
    (tmp_path / "a.txt").write_text("words\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt").write_bytes(b"nul \0 byte")
    name, files = text.find_text(tmp_path, tmp_path)
    assert name == str(tmp_path)
    assert list(text.read_documents(files)) == ["words\n"]


@pytest.mark.parametrize("missing", ["nowhere.txt", "empty"])
def test_a_missing_path_is_named(tmp_path: Path, missing: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=missing):
        text.find_text(tmp_path / missing, tmp_path)


def test_falls_back_to_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(folder: Path) -> list[Path]:
        raise OSError("no network")

    monkeypatch.setattr(text, "fetch_plays", unreachable)
    name, files = text.find_text(None, tmp_path)
    assert "standard library" in name
    assert any(path.name == "tokenize.py" for path in files)
    assert all("site-packages" not in path.parts for path in files)
