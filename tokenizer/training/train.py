"""Training: files or documents in, vocabulary and merges out.

count words in every process (pretokenize/, count.py, workers.py)  ->  merge in one (merge.py)

Words counted elsewhere, on other machines too, are merged likewise (counts.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..corpus.documents import Block, Lines, Rows, blocks, documents
from ..corpus.parts import Span, check_shard, find_files, parts
from ..files import refuse_same_file
from ..inputs import count_odd, is_cuttable, kind_of, warn_of_odd
from ..pretokenize import (
    GPT2_PATTERN,
    Cutter,
    Pattern,
    Specials,
    cut_stream,
    document_chunks,
    pretokenize,
    resolve,
)
from ..progress import Advance, progress_bars
from ..sizes import CHUNK, COUNTED_PART, MAX_TOKENS, TASK
from ..workers import Crew, check_num_workers
from .count import Tally, WordCounter, Words
from .counts import read_counts, write_counts
from .merge import learn_merges

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
    field: str = "text",
) -> tuple[Vocabulary, Merges]:
    """Byte-level BPE from text files (Sennrich et al. 2016; Radford et al. 2019).

    input_path: a path or a list of paths, pipes too; larger than memory is fine. UTF-8; each invalid sequence counts as
        U+FFFD, as in bytes.decode("utf-8", errors="replace"). A file's end is a document's end. Also .jsonl, .parquet,
        and text or .jsonl that gzip or zstd compressed.
    vocab_size: number of ids: the special tokens in the order given, the 256 bytes, then the merges. A text that runs
        out of pairs gives fewer.
    special_tokens: bound documents; nothing is learned from them or across them. Longest first where they overlap.
    num_workers: processes, this one included; default, one for each CPU core. The result does not depend on it.
    pattern: see Tokenizer. Another than those known by name runs slower, and holds a document at a time in memory.
    progress: progress bars on standard error.
    max_words: merge only that many of the most frequent pre-tokens, to bound memory; default, all of them.
    field: of each line of .jsonl, and the column of .parquet; a document each.

    Merges take the most frequent pair, and of equally frequent ones the greatest pair of bytes.

    Returns (vocab, merges): the bytes of every id, and the pairs in the order in which they were merged.
    Raises FileNotFoundError on a missing file, ValueError on the other arguments, RuntimeError when a worker dies.
    Warns of many NUL or invalid bytes, the sign of another encoding than UTF-8.
    """
    paths = [input_path] if isinstance(input_path, str | os.PathLike) else list(input_path)
    if not paths:
        raise ValueError("input_path: got an empty list, expected a path or a list of paths")
    trainer = _Trainer(vocab_size, special_tokens, num_workers, pattern, max_words)
    tasks: Iterable[Block] = _blocks([Span(os.fspath(path)) for path in paths], trainer.cutter, field)
    n_bytes = None
    if all(kind_of(path) == "text" and is_cuttable(path) for path in paths):
        tasks = list(tasks)
        n_bytes = sum(block.size for block in tasks)
    return trainer.train(tasks, n_bytes, progress, field)


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


def train_bpe_from_counts(
    paths: Sequence[str | os.PathLike[str]],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    pattern: Pattern = GPT2_PATTERN,
    progress: bool = False,
    max_words: int | None = None,
) -> tuple[Vocabulary, Merges]:
    """train_bpe from files of counts, equal to training on all the text that they were counted in.

    Raises ValueError on counts of another pattern or other special tokens, on a damaged file, and one given twice.
    """
    if isinstance(paths, str | os.PathLike) or not paths:
        raise ValueError(f"paths: got {paths!r}, expected a list of files")
    trainer = _Trainer(vocab_size, special_tokens, 1, pattern, max_words)
    words, _ = read_counts(paths, trainer.specials.tokens, trainer.cutter.pattern)
    with progress_bars(progress) as bar:
        return trainer.merge(words, bar)


def count_words(
    inputs: Sequence[str | os.PathLike[str]],
    out_path: str | os.PathLike[str],
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    pattern: Pattern = GPT2_PATTERN,
    progress: bool = False,
    field: str = "text",
    shard: tuple[int, int] = (0, 1),
) -> tuple[int, int]:
    """Write how often each pre-token occurs in files, and folders of them, for train_bpe_from_counts.

    shard: (i, n), of n jobs the one with number i, from 0: each counts every n-th part of the files.
    The other arguments are train_bpe's. The file depends neither on num_workers nor on the order of the inputs.
    Returns the number of different pre-tokens and of the bytes that were counted.
    """
    i, n = check_shard(shard)
    out_path = Path(out_path)
    if out_path.is_dir():
        raise ValueError(f"out_path: {out_path} is a folder, expected a file")
    files, _ = find_files(inputs)
    refuse_same_file("out_path", out_path, *files)
    cutter = Cutter(Specials(special_tokens), resolve(pattern))
    out_path.parent.mkdir(parents=True, exist_ok=True)
    spans = [span for part in parts(files, COUNTED_PART)[i::n] for span in part]
    with progress_bars(progress) as bar:
        advance = bar("Counting words", None)
        words, n_bytes = _count(_blocks(spans, cutter, field), cutter, check_num_workers(num_workers), advance, field)
    write_counts(out_path, words, cutter.specials.tokens, cutter.pattern, n_bytes)
    return len(words.counts), n_bytes


def _blocks(spans: Iterable[Span], cutter: Cutter, field: str) -> Iterator[Block]:
    for span in spans:
        yield from (block for block, _ in blocks(span, cutter, TASK, field))


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

    def train(
        self, tasks: Iterable[bytes | Block], n_bytes: int | None, progress: bool, field: str = ""
    ) -> tuple[Vocabulary, Merges]:
        with progress_bars(progress) as bar:
            words, _ = _count(tasks, self.cutter, self.num_workers, bar("Counting words", n_bytes), field)
            return self.merge(words, bar)

    def merge(self, words: Words, bar: Callable[[str, int | None], Advance]) -> tuple[Vocabulary, Merges]:
        if self.max_words is not None:
            words = words.most_frequent(self.max_words)
        merges = learn_merges(words, self.n_merges, bar("Merging pairs", self.n_merges))
        tokens = [*self.specials.encoded, *(bytes([byte]) for byte in range(256)), *(a + b for a, b in merges)]
        return dict(enumerate(tokens)), merges


def _count(
    tasks: Iterable[bytes | Block], cutter: Cutter, num_workers: int, advance: Advance, field: str
) -> tuple[Words, int]:
    """The words, and in how many bytes of text."""
    make = partial(_Counting, cutter.specials.tokens, cutter.pattern, field)
    with Crew(make, num_workers) as crew:
        for n_bytes in crew.map(tasks):
            advance(n_bytes)
        counting = crew.finish()
    n_nul, n_replaced = counting.n_odd.tolist()
    warn_of_odd(n_nul, n_replaced, counting.n_bytes)
    return counting.counter.words(), counting.n_bytes


class _Counting:
    """A worker that counts words, in pieces of files, in documents, and in masked chunks of text."""

    def __init__(self, special_tokens: Sequence[str], pattern: Pattern, field: str) -> None:
        self._field = field
        self._cutter = Cutter(Specials(special_tokens), pattern)
        self.counter = WordCounter()
        self.n_bytes = 0
        self.n_odd = np.zeros(2, np.int64)

    def run(self, task: bytes | Block) -> int:
        """Returns the number of bytes read."""
        if isinstance(task, bytes):
            chunks: Iterable[bytes] = [task]
        elif isinstance(task, Lines | Rows):
            chunks = document_chunks(documents(task, self._field), self._cutter)
        else:
            chunks = map(self._cutter.mask, cut_stream([task.read()], self._cutter, CHUNK))
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
