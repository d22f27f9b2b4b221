"""Corpora to shards of token files: `rooflight data`.

    parts of the input (parts.py)  ->  tasks of some megabytes (documents.py)  ->  ids, in every process  ->  shards

A shard is a token file of one part: shard-00012-003.bin is the fourth of part 12. What a part gives depends on nothing
but that part, so jobs that share the parts write the files that one job would. A shard's header says what it was made
of: {"part": 12, "n_tasks": 75, "part_ends": true}, the tasks of its part up to its end; it is all that going on after
an interruption needs. corpus.json says of which input, how, and in how many parts the corpus was made.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..encoding import cutter_of
from ..files import locked, read_json, read_token_file, remove_leftovers, shown, token_file, write_json
from ..inputs import warn_of_odd
from ..pretokenize import Cutter
from ..progress import progress_bars
from ..sizes import TASK
from ..tokenizer import Tokenizer
from ..workers import Crew, check_num_workers
from .documents import Block, blocks, with_last
from .encode import EncodeWorker, Result, Task
from .parts import Span, check_shard, find_files, parts

FORMAT, VERSION = "rooflight-corpus", 1
SHARD_TOKENS = 100_000_000
# A part has so many bytes of text for each token of a shard: fewer than texts have, so that it mostly makes one shard.
_PART = 3


class Prepared(NamedTuple):
    """headers: of the job's shards, in order, those of earlier runs too.  n_empty: documents without text that this run
    met.  left_out: files of the folders that were not taken."""

    headers: list[dict[str, Any]]
    n_empty: int
    left_out: list[Path]


def prepare(
    tokenizer: Tokenizer,
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    eod: str | None = "<|endoftext|>",
    field: str = "text",
    allow_special: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    shard: tuple[int, int] = (0, 1),
    num_workers: int | None = None,
    progress: bool = False,
) -> Prepared:
    """Encode files into token files in the folder `out`; go on there where an earlier run was interrupted.

    inputs: text, .jsonl and .parquet, .gz and .zst, and folders of them (parts.find_files). A document is a text file,
        a line or a row; those without text are left out. Invalid UTF-8 in text files is read as U+FFFD.
    eod: the special token behind each document, whose id is "eod" in the headers; in text files its text ends a
        document too. None: none.
    field: of JSON lines, and the column of Parquet files.
    allow_special: special tokens in the text become their ids. They are ordinary text otherwise, but for `eod` in
        text files.
    shard_tokens: tokens of a token file, at most, unless one document has more than a quarter of that.
    shard: (i, n), of n jobs the one with number i, from 0: together they write the files that (0, 1) writes.
    num_workers: processes; the files do not depend on it.

    Memory does not grow with the files' size, but with the longest document.
    Raises ValueError on other arguments than those `out` was made with, on input in `out`, or that is not what its name
    says (the file and line are named), and ImportError without a module that reads it.
    """
    eod_id = None if eod is None else _eod_id(tokenizer, eod)
    if not isinstance(shard_tokens, int | np.integer) or isinstance(shard_tokens, bool) or shard_tokens < 1:
        raise ValueError(f"shard_tokens: got {shard_tokens!r}, expected a positive integer")
    i, n = check_shard(shard)
    num_workers = check_num_workers(num_workers)
    files, left_out = find_files(inputs)
    out = Path(out)
    _refuse_overlap(out, inputs, files)
    all_parts = parts(files, _PART * int(shard_tokens))
    made_of: dict[str, Any] = {
        "tokenizer_hash": tokenizer.hash,
        "eod": eod_id,
        "field": field,
        "allow_special": allow_special,
    }
    made_of |= {"shard_tokens": int(shard_tokens), "inputs": [[shown(path), path.stat().st_size] for path in files]}
    made_of["n_parts"] = len(all_parts)  # last: what another number of them comes from is named
    with _claimed(out, made_of):
        done = {part: _done(out, part, tokenizer.hash) for part in range(i, len(all_parts), n)}
        todo = [part for part, headers in done.items() if not (headers and headers[-1]["part_ends"])]
        for pattern in ("corpus.json", *(_path(out, part, None).name for part in todo)):
            remove_leftovers(out, pattern)
        # A task of so many bytes has no more tokens than a shard, were they a byte each and an end behind each.
        size = min(TASK, max(1, int(shard_tokens) // 4))
        marks = () if eod is None else (eod,)
        cutter = cutter_of(tokenizer.definition, tokenizer.special_tokens if allow_special else marks)
        make = partial(EncodeWorker, tokenizer, eod, field, allow_special)
        n_odd, n_empty = np.zeros(3, np.int64), 0
        with progress_bars(progress) as bar, Crew(make, num_workers) as crew:
            advance = bar("Encoding", sum(span.size for part in todo for span in all_parts[part]))

            def left() -> Iterator[Task]:
                for part in todo:
                    n_done = done[part][-1]["n_tasks"] if done[part] else 0
                    for task in _tasks(part, all_parts[part], cutter, size, field):
                        if task.number < n_done:
                            advance(task.n_read)
                        else:
                            yield task

            def results() -> Iterator[Result]:
                nonlocal n_odd, n_empty
                for result in crew.map(left()):
                    advance(result.n_read)
                    n_odd, n_empty = n_odd + result.n_odd, n_empty + result.n_empty
                    yield result

            numbered = _numbered(results(), {part: len(done[part]) for part in todo}, int(shard_tokens))
            for (part, number), group in groupby(numbered, lambda item: item[0]):
                header = _write(_path(out, part, number), (result for _, result in group), tokenizer, eod_id)
                done[part] += [header] if header else []
    warn_of_odd(*n_odd.tolist())
    return Prepared([header for headers in done.values() for header in headers], n_empty, left_out)


def _eod_id(tokenizer: Tokenizer, eod: str) -> int:
    if eod not in tokenizer.special_tokens:
        known = ", ".join(map(repr, tokenizer.special_tokens)) or "none"
        raise ValueError(f"eod: {eod!r} is no special token of the tokenizer, expected one of {known}")
    i = tokenizer.special_tokens[eod]
    if (tokenizer.definition.pairs[:, 2] == i).any() or i in tokenizer.definition.byte_ids:
        raise ValueError(f"eod: {eod!r} may come from ordinary text too, expected a token that does not")
    return i


def _refuse_overlap(out: Path, inputs: Iterable[str | os.PathLike[str]], files: Iterable[Path]) -> None:
    real = Path(os.path.realpath(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    for path in files:
        if real in Path(os.path.realpath(path)).parents:
            raise ValueError(f"out: {out} holds the input {path}, expected another folder")
    for path in map(Path, inputs):
        if path.is_dir() and Path(os.path.realpath(path)) in (real, *real.parents):
            raise ValueError(f"out: {out} lies in the input {path}, expected another folder")


@contextmanager
def _claimed(out: Path, made_of: dict[str, Any]) -> Iterator[None]:
    """While entered, corpus.json says what `out` is made of, and no job of another corpus rewrites it.

    Raises ValueError where there are shards of another corpus, or a job that makes one.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "corpus.json"
    content = {"format": FORMAT, "version": VERSION, **made_of}
    with ExitStack() as held:
        with locked(out):
            begun = any(out.glob("shard-*"))
            if begun and not path.exists():
                raise ValueError(f"out: {out} holds token files but no corpus.json, expected another folder")
            if path.exists() and (begun or not _lock(held.enter_context(path.open("rb")), fcntl.LOCK_EX)):
                _compare(out, read_json(path), content)
            else:
                write_json(path, content)
            # shared by the jobs of this corpus as long as they are at work
            claim = held.enter_context(path.open("rb"))
            _lock(claim, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(claim, fcntl.LOCK_UN)  # not only closed: a worker that has not ended yet holds it too


def _lock(file: IO[bytes], how: int) -> bool:
    """False where another process has a lock that does not allow it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _compare(out: Path, earlier: Any, content: dict[str, Any]) -> None:
    """Raises ValueError on a corpus that is another one."""
    for name, now in content.items():
        before = earlier.get(name) if isinstance(earlier, dict) else None
        if before == now:
            continue
        if name == "inputs" and isinstance(before, list):  # the first that differs
            before, now = ([item for item in a if item not in b][:1] for a, b in ((before, now), (now, before)))
        raise ValueError(f"out: {out} holds a corpus of other {name}, {before!r}, expected {now!r} or another folder")


def _path(out: Path, part: int, number: int | None) -> Path:
    """The token file; for None, a pattern of all there are of the part."""
    return out / f"shard-{part:05}-{'*' if number is None else f'{number:03}'}.bin"


def _done(out: Path, part: int, tokenizer_hash: str) -> list[dict[str, Any]]:
    """The headers of the part's shards that are there, up to the first that is not, or is damaged."""
    headers: list[dict[str, Any]] = []
    while True:
        try:
            header = read_token_file(_path(out, part, len(headers)))[1]
            if header["tokenizer_hash"] != tokenizer_hash or header["part"] != part:
                return headers
        except (OSError, ValueError, KeyError):
            return headers
        headers.append(header)
        if header["part_ends"]:
            return headers


def _tasks(part: int, spans: Iterable[Span], cutter: Cutter, size: int, field: str) -> Iterator[Task]:
    """The part's blocks, of small files several together."""
    groups = _together(chain.from_iterable(blocks(span, cutter, size, field) for span in spans), size)
    for number, ((group, n_read), ends) in enumerate(with_last(groups)):
        yield Task(part, number, ends, n_read, group)


def _together(found: Iterable[tuple[Block, int]], size: int) -> Iterator[tuple[list[Block], int]]:
    group: list[Block] = []
    n_bytes = n_read = 0
    for block, n in found:
        if group and n_bytes + block.size > size:
            yield group, n_read
            group, n_bytes, n_read = [], 0, 0
        group.append(block)
        n_bytes += block.size
        n_read += n
    if group:
        yield group, n_read


def _numbered(results: Iterable[Result], first: dict[int, int], limit: int) -> Iterator[tuple[tuple[int, int], Result]]:
    """Each result with the part and number of the shard it goes to: as many go together as `limit` allows.

    first: the number of each part's first shard. A result without tokens goes where the one before it goes.
    """
    part, number, n_tokens = -1, 0, 0
    for result in results:
        if result.part != part:
            part, n_tokens = result.part, 0
            number = first[part]
        elif n_tokens and result.n_tokens and n_tokens + result.n_tokens > limit:
            number, n_tokens = number + 1, 0
        n_tokens += result.n_tokens
        yield (part, number), result


def _write(path: Path, results: Iterator[Result], tokenizer: Tokenizer, eod_id: int | None) -> dict[str, Any] | None:
    """Writes a shard; returns its header, or None where there is no token."""
    n_bytes = n_documents = 0
    first = next((result for result in results if result.n_tokens), None)
    if first is None:
        return None
    with token_file(path, tokenizer.vocab_size, tokenizer.hash) as (file, header):
        for result in chain([first], results):
            file.write(result.ids)
            n_bytes += result.n_bytes
            n_documents += result.n_documents
            last = result
        header |= {"n_bytes": n_bytes, "n_documents": n_documents}
        header |= {} if eod_id is None else {"eod": eod_id}
        header |= {"part": last.part, "n_tasks": last.number + 1, "part_ends": last.ends}
    return header | {"n_tokens": file.n_tokens}
