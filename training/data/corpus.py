"""What a run is trained on: one token file, several, or folders of shards; with weights, a mixture of them.

Without weights all files are one stream of text, however it is cut. With weights each path is a source of its own, and
a run draws that share of its windows from it (order.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...model.typed import typed
from .order import turns
from .tokens import TokenFile, bits_per_byte, open_tokens

__all__ = ["Corpus", "Source", "open_corpus"]


@dataclass(frozen=True)
class Source:
    """Token files in order, and the weight of the whole among the corpus's sources."""

    files: tuple[TokenFile, ...]
    weight: float = 1.0

    @property
    def n_tokens(self) -> int:
        return sum(file.n_tokens for file in self.files)


@dataclass(frozen=True)
class Corpus:
    """Sources whose files come from one tokenizer."""

    sources: tuple[Source, ...]

    def __str__(self) -> str:
        """Its first file, and how many more there are."""
        more = len(self.files) - 1
        return f"{self.files[0].path}" + (f" and {more} more" if more else "")

    @cached_property
    def files(self) -> tuple[TokenFile, ...]:
        return tuple(file for source in self.sources for file in source.files)

    @cached_property
    def tokens(self) -> tuple[npt.NDArray[np.unsignedinteger], ...]:
        """Each file's, mapped."""
        return tuple(file.tokens for file in self.files)

    @cached_property
    def n_tokens(self) -> int:
        return sum(source.n_tokens for source in self.sources)

    def check_windows(self, batch_size: int, context_length: int) -> None:
        """Raise ValueError unless batches of this shape can be drawn from every source."""
        for source in self.sources:
            longest = max(source.files, key=lambda file: file.n_tokens)
            check_window(longest.n_tokens, batch_size, context_length, f"{longest.path} with ")

    @property
    def tokenizer_hash(self) -> str:
        return self.files[0].tokenizer_hash

    def bits_per_byte(self, loss: float) -> float:
        """Loss in nats per token as bits per byte of text, at these files' mean number of bytes per token."""
        return bits_per_byte(loss, self.n_tokens, sum(file.n_bytes for file in self.files))


@typed
def open_corpus(
    paths: str | Path | Sequence[str | Path] | Mapping[str, float],
    *,
    vocab_size: int | None = None,
    name: str = "paths",
) -> Corpus:
    """Map token files: one path, several, or a table of paths and weights; a path is x.bin, or a folder of such files,
    taken by name.

    vocab_size: as in open_tokens, which reads each.  name: what errors call `paths`.
    Raises FileNotFoundError as open_tokens does, ValueError on a folder without token files, on a file given twice (of
    a table, under one path), on tokenizers that differ, on a weight below 1/10,000 of their sum, and as open_tokens
    does.
    """
    if isinstance(paths, Mapping):
        sources = tuple(Source(_open([path], vocab_size), weight) for path, weight in paths.items())
    else:
        sources = (Source(_open([paths] if isinstance(paths, str | Path) else paths, vocab_size)),)
    if not any(source.files for source in sources):
        raise ValueError(f"{name}: got none, expected a token file or folder at least")
    for source in sources:
        _refuse_twice(name, source.files)
    try:
        turns([source.weight for source in sources])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    corpus = Corpus(sources)
    first = corpus.files[0]
    for file in corpus.files:
        if file.tokenizer_hash != first.tokenizer_hash:
            raise ValueError(
                f"{first.path} and {file.path} come from different tokenizers, with the hashes "
                f"{first.tokenizer_hash[:12]} and {file.tokenizer_hash[:12]}: encode them with the same one"
            )
    return corpus


def _refuse_twice(name: str, files: Sequence[TokenFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        if (earlier := seen.setdefault(os.path.realpath(file.path), file.path)) is not file.path:
            raise ValueError(
                f"{name}: {file.path} is given twice, as {earlier} before; a table gives a path more of the windows"
            )


def check_window(n_tokens: int, batch_size: int, context_length: int, whose: str = "") -> None:
    """Raise ValueError unless batches of this shape can be drawn from so many tokens in a row, `whose` they are."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    if n_tokens <= context_length:
        raise ValueError(
            f"context_length {context_length} needs at least {context_length + 1} tokens, got {whose}{n_tokens}"
        )


def _open(paths: Sequence[str | Path], vocab_size: int | None) -> tuple[TokenFile, ...]:
    return tuple(open_tokens(file, vocab_size=vocab_size) for path in paths for file in _files(Path(path)))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.bin"))
    if not found:
        raise ValueError(f"{path} is a folder without token files, expected some x.bin beside x.bin.json")
    return found
