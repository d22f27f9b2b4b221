"""Many texts and whole files, encoded by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .files import atomic, header_path, token_dtype, write_token_header
from .pretokenize import Cutter, file_ranges
from .progress import progress_bars
from .workers import Crew, check_num_workers

# Bytes of text that a process encodes at a time.
_TASK = 1 << 22

# The ids (int32) of many texts, one text after another, and how many each has.
EncodeMany = Callable[[Sequence[str]], tuple[np.ndarray, list[int]]]


def encode_file(
    encode: Callable[[bytes], np.ndarray],
    cutter: Cutter,
    vocab_size: int,
    tokenizer_hash: str,
    path: Path,
    out_path: Path,
    *,
    num_workers: int | None,
    progress: bool,
) -> int:
    """See Tokenizer.encode_file. `encode` gives the ids of a part of the file; it is sent to other processes."""
    num_workers = check_num_workers(num_workers)
    dtype = token_dtype(vocab_size)
    tasks = [(path, *span) for span in file_ranges(path, cutter, _TASK)]
    n_bytes = tasks[-1][2] if tasks else 0
    n_tokens = 0
    # A reader refuses a token file without a header, but could not tell that the header is of another.
    with progress_bars(progress) as bar, atomic(out_path, replaces_first=header_path(out_path)) as out:
        advance = bar("Encoding", n_bytes)
        with Crew(partial(_FileWorker, encode, dtype), num_workers) as crew:
            for (_, start, stop), ids in zip(tasks, crew.map(tasks), strict=True):
                out.write(ids)
                n_tokens += len(ids) // dtype.itemsize
                advance(stop - start)
    write_token_header(out_path, vocab_size, tokenizer_hash, n_tokens, n_bytes)
    return n_tokens


def encode_batch(encode_many: EncodeMany, texts: Iterable[str], *, num_workers: int | None) -> Iterator[list[int]]:
    """The ids of each text. `encode_many` is sent to other processes."""
    with Crew(partial(_BatchWorker, encode_many), check_num_workers(num_workers)) as crew:
        for ids, counts in crew.map(_groups(texts)):
            flat = ids.tolist()
            end = 0
            for count in counts:
                yield flat[end : end + count]
                end += count


class _FileWorker:
    def __init__(self, encode: Callable[[bytes], np.ndarray], dtype: np.dtype) -> None:
        self._encode = encode
        self._dtype = dtype

    def run(self, task: tuple[Path, int, int]) -> bytes:
        path, start, stop = task
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) < stop - start:
            raise OSError(f"{path} became shorter while it was read")
        return self._encode(data).astype(self._dtype).tobytes()


class _BatchWorker:
    def __init__(self, encode_many: EncodeMany) -> None:
        self.run = encode_many


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: got {type(text).__name__}, expected str")
        group.append(text)
        size += len(text)
        if size >= _TASK:
            yield group
            group, size = [], 0
    if group:
        yield group
