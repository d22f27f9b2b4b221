"""Speed beside other tokenizers, given the same vocabulary and the same text."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from .bpe import Tokenizer

if TYPE_CHECKING:
    from rich.table import Table

# What people send to a model, in characters.
_SHORT = 200


class Row(NamedTuple):
    """One tokenizer's seconds (of the processor) for the text; None where it did not give the first one's ids."""

    name: str
    cold: float | None  # nothing remembered from earlier texts
    warm: float | None  # the same text again
    short: float | None  # one string of 200 characters
    decode: float | None


class _Peer(NamedTuple):
    name: str
    make: Callable[[], tuple[Callable[[str], list[int]], Callable[[list[int]], str]]]


def compare(tokenizer: Tokenizer, text: str, *, repeats: int = 3) -> list[Row]:
    """Time encoding and decoding of `text`, its special tokens taken as ordinary text, in this thread."""
    with TemporaryDirectory() as folder:
        peers = list(_peers(tokenizer, Path(folder)))
        expected = tokenizer.encode(text, allowed_special="none")
        short = [text[i : i + _SHORT] for i in range(0, min(len(text), 1000 * _SHORT), _SHORT)]
        return [_measure(peer, text, short, expected, repeats) for peer in peers]


def _measure(peer: _Peer, text: str, short: list[str], expected: list[int], repeats: int) -> Row:
    colds, warms = [], []
    for _ in range(repeats):
        encode, decode = peer.make()
        encode("a")  # what is built at the first call
        seconds, ids = _timed(encode, text)
        if list(ids) != expected:
            return Row(peer.name, None, None, None, None)
        colds.append(seconds)
        warms.append(_timed(encode, text)[0])
    shorts = [_timed(lambda texts: [encode(part) for part in texts], short)[0] / len(short) for _ in range(repeats + 1)]
    decodes = [_timed(decode, expected)[0] for _ in range(repeats)]
    return Row(peer.name, min(colds), min(warms), min(shorts), min(decodes))


def _timed(function: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = function(argument)
    return time.process_time() - start, result


def _peers(tokenizer: Tokenizer, folder: Path):
    def ours():
        vocab, merges, specials = tokenizer.vocab, tokenizer.merges, list(tokenizer.special_tokens)
        fresh = Tokenizer(vocab, merges, specials, pattern=tokenizer.pattern, ignore_merges=tokenizer.ignore_merges)
        return lambda text: fresh.encode(text, allowed_special="none"), fresh.decode

    yield _Peer("rooflight", ours)
    if find_spec("tiktoken"):
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        tokenizer.export_tiktoken(folder / "ranks")
        ranks = load_tiktoken_bpe(str(folder / "ranks"))

        def openai():
            encoding = tiktoken.Encoding(
                "bench", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
            )
            return encoding.encode_ordinary, encoding.decode

        yield _Peer("tiktoken", openai)
    if find_spec("tokenizers"):
        import tokenizers

        Tokenizer(tokenizer.vocab, tokenizer.merges, pattern=tokenizer.pattern).export_hf(folder / "tokenizer.json")

        def hugging_face():
            loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            return lambda text: loaded.encode(text).ids, loaded.decode

        yield _Peer("tokenizers", hugging_face)


def table(rows: list[Row], text: str) -> Table:
    """The rows beside one another; ratios are to the first row's."""
    from rich.table import Table

    size = len(text.encode()) / 1e6
    shown = Table(title=f"{size:.1f} MB, one thread; x: times as fast as the first row")
    for name in ("", "encode, cold MB/s", "encode, warm MB/s", f"{_SHORT} characters, us", "decode MB/s"):
        shown.add_column(name, justify="right" if name else "left")

    def cell(seconds: float | None, first: float | None, of_short: bool = False) -> str:
        if seconds is None or first is None:
            return "other ids"
        value = seconds * 1e6 if of_short else size / seconds
        return f"{value:.1f} ({first / seconds:.2f}x)"

    first = rows[0]
    for row in rows:
        shown.add_row(
            row.name,
            cell(row.cold, first.cold),
            cell(row.warm, first.warm),
            cell(row.short, first.short, of_short=True),
            cell(row.decode, first.decode),
        )
    return shown
