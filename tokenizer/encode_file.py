"""Many texts and whole files, encoded by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from .corpus.documents import Range, Text, blocks
from .corpus.parts import Span
from .encoding import BulkEncoder
from .files import header_path, refuse_same_file, token_dtype, token_file
from .inputs import is_cuttable, refuse_documents
from .pretokenize import Cutter
from .progress import progress_bars
from .sizes import GROUP, TASK
from .workers import Crew, check_num_workers

# The ids (int32) of many texts, one text after another, and how many each has.
EncodeMany = Callable[[Sequence[str]], tuple[np.ndarray, list[int]]]


def encode_file(
    encoder: BulkEncoder,
    cutter: Cutter,
    vocab_size: int,
    tokenizer_hash: str,
    path: Path,
    out_path: Path,
    *,
    num_workers: int | None,
    progress: bool,
) -> int:
    """See Tokenizer.encode_file. The encoder and the cutter are sent to other processes."""
    num_workers = check_num_workers(num_workers)
    refuse_same_file("out_path", out_path, path)
    refuse_same_file("out_path", header_path(out_path), path)
    refuse_documents(path)
    n_bytes = path.stat().st_size if is_cuttable(path) else None
    n_done = 0
    make = partial(_FileWorker, encoder, cutter, token_dtype(vocab_size))
    with progress_bars(progress) as bar, token_file(out_path, vocab_size, tokenizer_hash) as (out, header):
        advance = bar("Encoding", n_bytes)
        with Crew(make, num_workers) as crew:
            for ids, n in crew.map(block for block, _ in blocks(Span(str(path)), cutter, TASK)):
                out.write(ids)
                n_done += n
                advance(n)
        header["n_bytes"] = n_done
    return out.n_tokens


def encode_batch(encode_many: EncodeMany, texts: Iterable[str], *, num_workers: int | None) -> list[list[int]]:
    """The ids of each text. `encode_many` is sent to other processes; lists are made here, of arrays."""
    lists: list[list[int]] = []
    num_workers = check_num_workers(num_workers)
    with Crew(partial(_BatchWorker, encode_many), num_workers) as crew:
        for ids, counts in crew.map(_groups(texts, GROUP if num_workers > 1 else TASK)):
            ends = np.cumsum(counts).tolist()
            lists += [ids[i:j].tolist() for i, j in pairwise([0, *ends])]
    return lists


class _FileWorker:
    def __init__(self, encoder: BulkEncoder, cutter: Cutter, dtype: np.dtype) -> None:
        self._encoder = encoder
        self._cutter = cutter
        self._dtype = dtype

    def run(self, block: Range | Text) -> tuple[bytes, int]:
        """The ids, and of how many bytes."""
        return self._encoder.encode_bytes(block.read(), self._cutter).astype(self._dtype).tobytes(), block.size


class _BatchWorker:
    def __init__(self, encode_many: EncodeMany) -> None:
        self.run = encode_many


def _groups(texts: Iterable[str], later: int) -> Iterator[list[str]]:
    """The texts in groups of a TASK's characters, and of `later` from the second on, which starts processes."""
    group: list[str] = []
    size = 0
    most = TASK
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts: got {type(text).__name__}, expected str")
        group.append(text)
        size += len(text)
        if size >= most:
            yield group
            group, size, most = [], 0, later
    if group:
        yield group
