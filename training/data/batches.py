"""Batches: windows of token files as tensors on the device.

Training batches are a pure function of seed and step, so a resumed run needs no state here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...model.typed import typed
from .corpus import Corpus, check_window
from .documents import IGNORED, document_bounds, room_for
from .order import Places

__all__ = ["Batch", "Batches", "batch_generator", "get_batch", "validation_batches"]

Batch = tuple[Tensor, ...]  # inputs and targets (rows, T), int64; with documents also their bounds (documents.py)


@typed
def get_batch(
    tokens: npt.NDArray,
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    *,
    generator: np.random.Generator | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`batch_size` windows at uniformly random places: inputs and targets, the targets one token ahead.

    tokens: (n,), any integer dtype, mapped or in memory, n > context_length.  generator: numpy's (default: a fresh
    one).  vocab_size: the model's, to hold the ids to.
    Returns two int64 tensors (batch_size, context_length) on `device`.
    Raises ValueError when no window fits, or on an id that the model does not have.
    """
    check_window(len(tokens), batch_size, context_length)
    generator = np.random.default_rng() if generator is None else generator
    starts = generator.integers(0, len(tokens) - context_length, size=batch_size)
    rows = _rows([tokens], np.zeros_like(starts), starts, context_length, vocab_size)
    return _shifted(rows, torch.device(device))


def batch_generator(seed: int, step: int) -> np.random.Generator:
    """The generator of one batch: an independent stream for every (seed, step), with no state to save."""
    return np.random.default_rng((seed, step))


class Batches:
    """The batches of a run from `step` on, an endless iterator; `at(step)` is any of them.

    A batch is (inputs, targets), or with documents (inputs, targets, bounds): see Batch.
    batch_size: of the whole batch.  rows: those of it to draw, all by default. Rank r of `world` takes
    slice(r * batch_size // world, (r + 1) * batch_size // world): the ranks' rows together are the batch that one
    process has, whatever `world` is.  micro_batches: equal parts of the rows, each with its own bounds.
    order: "random" or "epochs" (order.py).  samples: windows drawn in the steps before `step` (default: batch_size
    times step; otherwise where the batch size was another before).  eod: the id that ends documents; None: windows are
    whole.  vocab_size: the model's, to hold the ids to.
    On a GPU the next batch is copied from pinned memory on a stream of its own while this one is trained on.
    Raises ValueError when no window fits; an iteration does on an id that the model does not have.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int,
        context_length: int,
        device: torch.device,
        *,
        seed: int,
        step: int = 0,
        samples: int | None = None,
        order: str = "random",
        rows: slice = slice(None),
        micro_batches: int = 1,
        eod: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        corpus.check_windows(batch_size, context_length)
        self.tokens, self.device, self.seed, self.step, self.vocab_size = corpus.tokens, device, seed, step, vocab_size
        self.batch_size, self.context_length, self.rows = batch_size, context_length, range(batch_size)[rows]
        self.before = (batch_size * step if samples is None else samples) - batch_size * step
        self.order, self.micro_batches, self.eod = order, micro_batches, eod
        lengths = [[file.n_tokens for file in source.files] for source in corpus.sources]
        weights = [source.weight for source in corpus.sources]
        self.places = Places(lengths, weights, context_length, order=order, seed=seed)
        self.room = 0
        if eod is not None:
            self.room = room_for(self.tokens, eod, len(self.rows) // micro_batches, context_length)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self.stream is None:
            return self._draw()
        if self._ahead is None:
            self._ahead = self._copied(self.stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for x in (batch := self._ahead):
            x.record_stream(current)  # its memory is the copying stream's: not to be reused before the step has read it
        self._ahead = self._copied(self.stream)
        return batch

    def _copied(self, stream: torch.cuda.Stream) -> Batch:
        with torch.cuda.stream(stream):
            return self._draw()

    def _draw(self) -> Batch:
        self.step += 1
        return self.at(self.step - 1)

    def at(self, step: int) -> Batch:
        """The batch of that step, by the steps done before it."""
        rows = _rows(self.tokens, *self.places_of(step), self.context_length, self.vocab_size)
        if self.eod is None:
            return _shifted(rows, self.device)
        return _in_documents(rows, self.eod, self.device, self.micro_batches, self.room)

    def places_of(self, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(shard, first token) of each of the rows: the one place that says what a sample of the run is."""
        samples = self.before + self.batch_size * step + np.arange(self.batch_size)
        mine = slice(self.rows.start, self.rows.stop)
        if self.order == "epochs":
            return self.places.draw(samples[mine], None)
        shards, starts = self.places.draw(samples, batch_generator(self.seed, step))
        return shards[mine], starts[mine]


@typed
def validation_batches(
    tokens: npt.NDArray | Sequence[npt.NDArray],
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    *,
    max_batches: int | None = None,
    eod: int | None = None,
    vocab_size: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Non-overlapping windows in file order, as (inputs, targets); the last batch may have fewer rows.

    tokens: (n,), or several such, where no window goes from one to the next.
    Every position of each but the first and a tail shorter than a window is a target once. With max_batches, that many
    batches of windows spread evenly over all, the same ones every time.  eod: the id that ends documents, whose bounds
    a batch then has too (Batch); None: windows are whole.  vocab_size: the model's, to hold the ids to.
    rank, world: every world-th batch, from number rank on. Each rank has as many, as a sharded model's compute
    together: where there is none left, the last one again, with targets that are all IGNORED.
    Raises ValueError when no window fits, or on an id that the model does not have.
    """
    shards = [tokens] if isinstance(tokens, np.ndarray) else tokens
    check_window(max(map(len, shards), default=0), batch_size, context_length)
    counts = np.array([(len(some) - 1) // context_length if len(some) else 0 for some in shards])
    ends = np.cumsum(counts)
    chosen = np.arange(ends[-1])
    if max_batches is not None and max_batches * batch_size < len(chosen):
        chosen = np.linspace(0, len(chosen) - 1, max_batches * batch_size).round().astype(np.int64)
    room = 1 if eod is None else room_for(shards, eod, batch_size, context_length)
    firsts = range(0, len(chosen), batch_size)
    for i in range(rank, -(-len(firsts) // world) * world, world):
        first = firsts[min(i, len(firsts) - 1)]
        window = chosen[first : first + batch_size]
        shard = np.searchsorted(ends, window, side="right")
        starts = (window - (ends - counts)[shard]) * context_length
        rows = _rows(shards, shard, starts, context_length, vocab_size)
        there = torch.device(device)
        batch: Batch = _shifted(rows, there) if eod is None else _in_documents(rows, eod, there, 1, room)
        yield batch if i < len(firsts) else (batch[0], torch.full_like(batch[1], IGNORED), *batch[2:])


def _rows(
    shards: Sequence[npt.NDArray],
    which: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    context_length: int,
    vocab_size: int | None,
) -> npt.NDArray[np.int64]:
    """Windows of context_length + 1 tokens, (rows, context_length + 1): from shard which[i], from token starts[i] on.

    One gather serves inputs and targets; int64 is what embeddings and losses take.
    """
    places = starts[:, None] + np.arange(context_length + 1)
    if len(shards) == 1:
        rows = shards[0][places].astype(np.int64)
    else:
        rows = np.empty(places.shape, np.int64)
        for i in np.unique(which):
            rows[which == i] = shards[i][places[which == i]]
    if vocab_size is not None and rows.max() >= vocab_size:  # here, since on a GPU it would end every kernel after it
        row, column = np.argwhere(rows >= vocab_size)[0]
        raise ValueError(
            f"{getattr(shards[which[row]], 'filename', 'tokens')}: token {starts[row] + column} is "
            f"{rows[row, column]}, and the model's vocab_size {vocab_size}: its header promises less, encode the text "
            "again"
        )
    return rows


def _shifted(rows: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs, and targets one token ahead."""
    there = _moved(rows, device)
    return there[:, :-1], there[:, 1:]


def _in_documents(
    rows: npt.NDArray[np.int64], eod: int, device: torch.device, micro_batches: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets that do not cross from document to document, and bounds."""
    inputs, targets = _shifted(rows, device)
    bounds = document_bounds(rows[:, :-1] == eod, micro_batches, room)
    return inputs, torch.where(inputs == eod, IGNORED, targets), _moved(bounds, device)


def _moved(x: npt.NDArray, device: torch.device) -> Tensor:
    there = torch.from_numpy(x)
    if device.type == "cuda":  # from pinned memory, the copy overlaps the step in progress
        return there.pin_memory().to(device, non_blocking=True)
    return there if device.type == "cpu" else there.to(device)
