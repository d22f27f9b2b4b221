"""Training: files or documents in, vocabulary and merges out.

count words in every process (pretokenize/, count.py, workers.py)  ->  merge in one (merge.py)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..inputs import count_odd, is_regular, warn_of_odd
from ..pretokenize import (
    GPT2_PATTERN,
    Cutter,
    Pattern,
    Specials,
    document_chunks,
    file_ranges,
    pretokenize,
    read_chunks,
    resolve,
    stream_chunks,
)
from ..progress import progress_bars
from ..workers import Crew, check_num_workers
from .count import Tally, WordCounter, Words
from .merge import MAX_TOKENS, learn_merges

Vocabulary = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]


def train_bpe(
    input_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    pattern: Pattern = GPT2_PATTERN,
    progress: bool = False,
    max_words: int | None = None,
) -> tuple[Vocabulary, Merges]:
    """Byte-level BPE from text files (Sennrich et al. 2016; Radford et al. 2019).

    input_path: a path or a list of paths, pipes too; larger than memory is fine. UTF-8; each invalid sequence counts as
        U+FFFD, as in bytes.decode("utf-8", errors="replace"). A file's end is a document's end.
    vocab_size: number of ids: the special tokens in the order given, the 256 bytes, then the merges. A text that runs
        out of pairs gives fewer.
    special_tokens: bound documents; nothing is learned from them or across them. Longest first where they overlap.
    num_workers: processes, this one included; default, one for each CPU core. The result does not depend on it.
    pattern: see Tokenizer. Another than those known by name runs slower, and holds a document at a time in memory.
    progress: progress bars on standard error.
    max_words: merge only that many of the most frequent pre-tokens, to bound memory; default, all of them.

    Merges take the most frequent pair, and of equally frequent ones the greatest pair of bytes.

    Returns (vocab, merges): the bytes of every id, and the pairs in the order in which they were merged.
    Raises FileNotFoundError on a missing file, ValueError on the other arguments, RuntimeError when a worker dies.
    Warns of many NUL or invalid bytes, the sign of another encoding than UTF-8.
    """
    paths = [input_path] if isinstance(input_path, str | os.PathLike) else list(input_path)
    if not paths:
        raise ValueError("input_path: got an empty list, expected a path or a list of paths")
    trainer = _Trainer(vocab_size, special_tokens, num_workers, pattern, max_words)
    if all(map(is_regular, paths)):
        tasks = [(path, *piece) for path in paths for piece in file_ranges(path, trainer.cutter)]
        return trainer.train(tasks, sum(stop - start for _, start, stop in tasks), progress)
    return trainer.train(_tasks_of_streams(paths, trainer.cutter), None, progress)


def train_bpe_from_iterator(
    documents: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    pattern: Pattern = GPT2_PATTERN,
    progress: bool = False,
    max_words: int | None = None,
) -> tuple[Vocabulary, Merges]:
    """train_bpe from an iterable of documents, each a str; it is read once and need not fit in memory.

    Raises ValueError on a lone surrogate in a document.
    """
    if isinstance(documents, str):
        raise ValueError("documents: got a str, expected an iterable of str")
    trainer = _Trainer(vocab_size, special_tokens, num_workers, pattern, max_words)
    return trainer.train(document_chunks(documents, trainer.cutter), None, progress)


def _tasks_of_streams(paths: Iterable[str | os.PathLike[str]], cutter: Cutter) -> Iterator[Any]:
    for path in paths:
        if is_regular(path):
            yield from [(path, *piece) for piece in file_ranges(path, cutter)]
        else:
            yield from stream_chunks(path, cutter)


class _Trainer:
    def __init__(
        self,
        vocab_size: int,
        special_tokens: Sequence[str],
        num_workers: int | None,
        pattern: Pattern,
        max_words: int | None,
    ) -> None:
        self.specials = Specials(special_tokens)
        smallest = 256 + len(self.specials.tokens)
        if not isinstance(vocab_size, int | np.integer) or vocab_size < smallest:
            raise ValueError(
                f"vocab_size: got {vocab_size!r}, expected an integer of at least {smallest}: "
                f"256 bytes and {len(self.specials.tokens)} special tokens"
            )
        if vocab_size > MAX_TOKENS:
            raise ValueError(f"vocab_size: got {vocab_size}, expected at most {MAX_TOKENS}")
        if max_words is not None and (not isinstance(max_words, int | np.integer) or max_words < 1):
            raise ValueError(f"max_words: got {max_words!r}, expected a positive integer or None")
        self.n_merges = int(vocab_size) - smallest
        self.num_workers = check_num_workers(num_workers)
        self.cutter = Cutter(self.specials, resolve(pattern))
        self.max_words = max_words

    def train(self, tasks: Iterable[Any], n_bytes: int | None, progress: bool) -> tuple[Vocabulary, Merges]:
        with progress_bars(progress) as bar:
            words = self._count(tasks, bar("Counting words", n_bytes))
            if self.max_words is not None:
                words = words.most_frequent(self.max_words)
            merges = learn_merges(words, self.n_merges, bar("Merging pairs", self.n_merges))
        tokens = [*self.specials.encoded, *(bytes([byte]) for byte in range(256)), *(a + b for a, b in merges)]
        return dict(enumerate(tokens)), merges

    def _count(self, tasks: Iterable[Any], advance: Callable[[int], None]) -> Words:
        make = partial(_Counting, self.specials.tokens, self.cutter.pattern)
        with Crew(make, self.num_workers) as crew:
            for n_bytes in crew.map(tasks):
                advance(n_bytes)
            counting = crew.finish()
        n_nul, n_replaced = counting.n_odd.tolist()
        warn_of_odd(n_nul, n_replaced, counting.n_bytes)
        return counting.counter.words()


class _Counting:
    """A worker that counts words, in pieces of files and in masked chunks of text."""

    def __init__(self, special_tokens: Sequence[str], pattern: Pattern) -> None:
        self._cutter = Cutter(Specials(special_tokens), pattern)
        self.counter = WordCounter()
        self.n_bytes = 0
        self.n_odd = np.zeros(2, np.int64)

    def run(self, task: bytes | tuple[str, int, int]) -> int:
        """Returns the number of bytes read."""
        chunks = [task] if isinstance(task, bytes) else read_chunks(*task, self._cutter)
        before = self.n_bytes
        for chunk in chunks:
            self.n_bytes += len(chunk)
            self.n_odd += count_odd(chunk)
            self.counter.add(pretokenize(chunk, self._cutter.pattern))
        return self.n_bytes - before

    def finish(self) -> tuple[Tally, int, np.ndarray]:
        return self.counter.tally(), self.n_bytes, self.n_odd

    def join(self, final: tuple[Tally, int, np.ndarray]) -> None:
        tally, n_bytes, n_odd = final
        self.counter.add_tally(tally)
        self.n_bytes += n_bytes
        self.n_odd += n_odd
