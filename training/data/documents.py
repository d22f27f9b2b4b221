"""Documents within a batch: where they end, for attention that never crosses from one to the next.

A document ends with the end-of-document token `eod`, and a window's first and last are cut by the window. The flattened
windows of a micro-batch are then packed sequences, as flash_attention_varlen has them: cu_seqlens are 0, the places
after each eod, and each window's end. What follows an eod is another document's first token, which nothing predicts:
the target there is IGNORED, and the loss is the mean over the other ones.

Kernels launch programs for every sequence that cu_seqlens has room for, and a CUDA graph takes one shape alone. So
cu_seqlens are padded with empty sequences at the end, up to a power of two that a batch of this corpus seldom passes; a
batch that does has the next one, and its step runs without the graph.

    windows  [a b . c d e] [f . . g h .]     . is eod, 0
    bounds   0 3 6 8 9 12 12 12 12 (room for 8 documents, 5 there)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .corpus import Corpus

__all__ = ["IGNORED", "bounds_of", "document_bounds", "end_of_document", "room_for"]

IGNORED = -100  # a target that the loss leaves out
SAMPLE = 1 << 18  # tokens of a shard that are looked at for the density of documents


def end_of_document(corpora: Iterable[Corpus], given: int | None) -> int:
    """The id that ends documents: what the headers say, else `given`, the configuration's.

    Raises ValueError where neither says it, or they do not agree.
    """
    files = [file for corpus in corpora for file in corpus.files]
    eod = next((file.eod for file in files if file.eod is not None), None) if given is None else given
    for file in files:
        if given is None and file.eod is None:
            raise ValueError(
                f"documents: the header of {file.path} does not say which token ends a document; `rooflight data` "
                "writes it there, and for other files the key eod is its id"
            )
        if file.eod not in (None, eod):
            raise ValueError(f"eod must be {file.eod}, as the header of {file.path} has it, got {eod}")
        if eod is not None and eod >= file.vocab_size:
            raise ValueError(f"eod must be an id below {file.vocab_size}, the vocab_size of {file.path}, got {eod}")
    assert eod is not None
    return eod


def document_bounds(ends: npt.NDArray[np.bool_], micro_batches: int, room: int = 1) -> npt.NDArray[np.int32]:
    """cu_seqlens of each micro-batch, (micro_batches, documents + 1), padded with its number of tokens.

    ends: (rows, T), whether a document ends with that token; rows is a multiple of micro_batches.
    room: documents to have room for at least; more take the next power of two.
    """
    ends = ends.copy()
    ends[:, -1] = True
    parts = [np.flatnonzero(part) + 1 for part in ends.reshape(micro_batches, -1)]
    longest = max(map(len, parts))
    room = room if longest <= room else 1 << (longest - 1).bit_length()
    bounds = np.full((micro_batches, room + 1), ends.size // micro_batches, np.int32)
    bounds[:, 0] = 0
    for row, part in zip(bounds, parts, strict=True):
        row[1 : len(part) + 1] = part
    return bounds


def bounds_of(targets: Tensor, micro_batches: int) -> Tensor:
    """document_bounds from targets alone, (rows, T) on the CPU: a document ends where its target is IGNORED."""
    return torch.from_numpy(document_bounds((targets == IGNORED).numpy(), micro_batches))


def room_for(tokens: Iterable[npt.NDArray], eod: int, rows: int, context_length: int) -> int:
    """Documents that a micro-batch of these rows seldom passes, a power of two: 1.5 times what the densest of the
    shards has at its beginning."""
    density = max((np.count_nonzero(some[:SAMPLE] == eod) / max(1, len(some[:SAMPLE])) for some in tokens), default=0.0)
    return 1 << int(np.ceil(np.log2(rows * (1 + 1.5 * density * context_length))))
