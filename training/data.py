"""Token files and batches.

A token file is `x.bin`, the ids as raw little-endian uint16 or uint32, beside `x.bin.json`, its header:

    {"format": "rooflight-tokens", "version": 1, "dtype": "uint16", "vocab_size": 1024, "tokenizer_hash": "<sha256
    hex>",
     "n_tokens": 1923441, "n_bytes": 5003178}

n_bytes is the length of the text that the tokens stand for, which turns a loss in nats per token into bits per byte.
The file is mapped, never read whole. Training batches are a pure function of (seed, step), so a resumed run needs no
state here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.typed import typed

FORMAT = "rooflight-tokens"
VERSION = 1


@dataclass(frozen=True)
class TokenFile:
    """A mapped token file: `tokens` (n_tokens,), uint16 or uint32, read-only, and the fields of its header."""

    path: Path
    tokens: npt.NDArray[np.unsignedinteger]
    vocab_size: int
    tokenizer_hash: str
    n_bytes: int

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def bits_per_byte(self, loss: float) -> float:
        """Loss in nats per token as bits per byte of text, at this file's mean number of bytes per token."""
        return loss / math.log(2) * self.n_tokens / self.n_bytes


@typed
def open_tokens(path: str | Path, *, vocab_size: int | None = None) -> TokenFile:
    """Map a token file.

    vocab_size: the model's; the file's must not exceed it (a model may pad its vocabulary).
    Raises FileNotFoundError when the file or its header is missing, ValueError when the header is not one, contradicts
    the file's size, or names ids that the model does not have.
    """
    path = Path(path)
    header_path = path.with_name(path.name + ".json")
    for needed, what in ((path, "token file"), (header_path, "header of the token file")):
        if not needed.is_file():
            raise FileNotFoundError(
                f"no {what} at {needed}; `rooflight tokenizer encode` writes both x.bin and x.bin.json"
            )
    header = _read_header(header_path)
    dtype = np.dtype(header["dtype"]).newbyteorder("<")
    size, expected = path.stat().st_size, header["n_tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but its header promises {header['n_tokens']} tokens of {header['dtype']}, "
            f"{expected} bytes: encode the text again"
        )
    if vocab_size is not None and header["vocab_size"] > vocab_size:
        raise ValueError(
            f"{path} was encoded with a vocabulary of {header['vocab_size']} tokens, "
            f"more than the model's vocab_size of {vocab_size}"
        )
    return TokenFile(
        path=path,
        tokens=np.memmap(path, dtype=dtype, mode="r"),
        vocab_size=header["vocab_size"],
        tokenizer_hash=header["tokenizer_hash"],
        n_bytes=header["n_bytes"],
    )


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a token file's header: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f'{path} is not a token file\'s header: expected "format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')!r}, expected {VERSION}")
    if header.get("dtype") not in ("uint16", "uint32"):
        raise ValueError(f'{path} has dtype {header.get("dtype")!r}, expected "uint16" or "uint32"')
    if not isinstance(header.get("tokenizer_hash"), str):
        raise ValueError(f"{path} has no tokenizer_hash, expected a string")
    for name in ("vocab_size", "n_tokens", "n_bytes"):
        value = header.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path} has {name} {value!r}, expected a positive integer")
    return header


def check_window(tokens: npt.NDArray, batch_size: int, context_length: int) -> None:
    """Raise ValueError unless batches of this shape can be drawn from the tokens."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    if len(tokens) <= context_length:
        raise ValueError(
            f"context_length {context_length} needs at least {context_length + 1} tokens, got {len(tokens)}"
        )


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
    check_window(tokens, batch_size, context_length)
    generator = np.random.default_rng() if generator is None else generator
    starts = generator.integers(0, len(tokens) - context_length, size=batch_size)
    return _windows(tokens, starts, context_length, torch.device(device), vocab_size)


def batch_generator(seed: int, step: int) -> np.random.Generator:
    """The generator of one batch: an independent stream for every (seed, step), with no state to save."""
    return np.random.default_rng((seed, step))


class Batches:
    """The batches of a run from `step` on, (inputs, targets) each, as get_batch draws them; an endless iterator.

    On a GPU the next batch is copied from pinned memory on a stream of its own while this one is trained on.
    """

    def __init__(
        self,
        tokens: npt.NDArray,
        batch_size: int,
        context_length: int,
        device: torch.device,
        *,
        seed: int,
        step: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.tokens, self.shape, self.device = tokens, (batch_size, context_length), device
        self.seed, self.step, self.vocab_size = seed, step, vocab_size
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
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

    def _copied(self, stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(stream):
            return self._draw()

    def _draw(self) -> tuple[Tensor, Tensor]:
        generator = batch_generator(self.seed, self.step)
        self.step += 1
        return get_batch(self.tokens, *self.shape, self.device, generator=generator, vocab_size=self.vocab_size)


@typed
def validation_batches(
    tokens: npt.NDArray,
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    *,
    max_batches: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Non-overlapping windows in file order, as (inputs, targets); the last batch may have fewer rows.

    Every position but the first and a tail shorter than a window is a target once. With max_batches, that many batches
    of windows spread evenly over the file, the same ones every time.  vocab_size: the model's, to hold the ids to.
    Raises ValueError when no window fits, or on an id that the model does not have.
    """
    check_window(tokens, batch_size, context_length)
    n_windows = (len(tokens) - 1) // context_length
    chosen = np.arange(n_windows)
    if max_batches is not None and max_batches * batch_size < n_windows:
        chosen = np.linspace(0, n_windows - 1, max_batches * batch_size).round().astype(np.int64)
    for first in range(0, len(chosen), batch_size):
        starts = chosen[first : first + batch_size] * context_length
        yield _windows(tokens, starts, context_length, torch.device(device), vocab_size)


def _windows(
    tokens: npt.NDArray, starts: npt.NDArray, context_length: int, device: torch.device, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    # One gather of length context_length + 1 serves inputs and targets; int64 is what embeddings and losses take.
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))
    if vocab_size is not None and rows.max() >= vocab_size:  # here, since on a GPU it would end every kernel after it
        row, column = (rows >= vocab_size).nonzero()[0].tolist()
        raise ValueError(
            f"{getattr(tokens, 'filename', 'tokens')}: token {starts[row] + column} is {rows[row, column]}, and the "
            f"model's vocab_size {vocab_size}: its header promises less, encode the text again"
        )
    if device.type == "cuda":  # from pinned memory, the copy overlaps the step in progress
        rows = rows.pin_memory().to(device, non_blocking=True)
    elif device.type != "cpu":
        rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]
