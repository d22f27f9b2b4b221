"""Speed and memory beside other tokenizers, on the same text: each measurement in a process of its own, in turns."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from ...tokenizer import Tokenizer, train_bpe
from .here import commit, processor
from .tokenizer_peers import END_OF_TEXT, N_SHORT, SHORT, coders, trainers

if TYPE_CHECKING:
    from rich.table import Table

OURS = "rooflight"


class Row(NamedTuple):
    """One task, by one tokenizer: the least wall and processor seconds of its runs, and its greatest peak of memory.

    why_not: instead of these, why there are none: another result than ours, or the peer's error.
    """

    task: str
    peer: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    why_not: str = ""


def installed(peers: Iterable[str]) -> list[str]:
    """Those of the peers that can be imported, ours first."""
    return [peer for peer in peers if peer == OURS or find_spec(peer)]


def compare(
    path: Path,
    *,
    vocab_size: int = 10_000,
    tokenizer: Tokenizer | None = None,
    encode_bytes: int = 20_000_000,
    num_workers: int = 2,
    repeats: int = 3,
    only: list[str] | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train on the file at `path` (unless `tokenizer` is given), then encode and decode its first `encode_bytes`.

    Peers encode with our vocabulary; their ids must be ours. Trained vocabularies must be as large as ours; which of
    equally frequent pairs a peer merges first is its own affair.
    num_workers: threads or processes for training and for encoding the file; encoding and decoding a text take one.
    only: peers; default, all that are installed.
    told: is given a line for each run.
    Raises RuntimeError when ours fails.
    """
    rows: list[Row] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        job: dict[str, Any] = {
            "text": str(path),
            "vocab_size": vocab_size,
            "tokenizer": name,
            "out": str(folder / "out"),
        }

        def measure(task: str, peers: dict[str, Any], workers: int) -> None:
            chosen = [peer for peer in installed(peers) if only is None or peer in (OURS, *only)]
            rows.extend(_in_turns([job | {"task": task, "peer": p, "workers": workers} for p in chosen], repeats, told))

        if tokenizer is None:
            measure("train", trainers(), num_workers)
            vocab, merges = train_bpe(path, vocab_size, [END_OF_TEXT], num_workers=num_workers)
            tokenizer = Tokenizer(vocab, merges, [END_OF_TEXT])
        tokenizer.save(folder)
        tokenizer.export_tiktoken(folder / "ranks.tiktoken")
        Tokenizer(tokenizer.vocab, tokenizer.merges, pattern=tokenizer.pattern).export_hf(folder / "tokenizer.json")
        with path.open("rb") as file:
            text = file.read(encode_bytes).decode(errors="ignore").encode()
        (folder / "text").write_bytes(text)
        job["text"] = str(folder / "text")
        measure("encode", coders(), 1)
        measure("encode file", coders(), num_workers)
    return rows


def _in_turns(jobs: list[dict[str, Any]], repeats: int, told: Callable[[str], None]) -> list[Row]:
    """The rows of one task, by tokenizer, from runs that take turns. The first job is ours."""
    ours = jobs[0]["peer"]
    runs: dict[str, list[dict[str, Any]]] = {job["peer"]: [] for job in jobs}
    errors: dict[str, str] = {}
    for i in range(repeats):
        for job in jobs:
            peer = job["peer"]
            if peer in errors:
                continue
            done = _run(job)
            if isinstance(done, str):
                errors[peer] = done
            elif runs[ours] and done["proof"] != runs[ours][0]["proof"]:
                errors[peer] = f"other result: {str(done['proof'])[:8]}"
            else:
                runs[peer].append(done)
            told(f"{job['task']}, run {i + 1}: {peer} {errors.get(peer, '')}")
    if ours in errors:
        raise RuntimeError(f"{jobs[0]['task']}: {errors[ours]}")
    rows = []
    for part in runs[ours][0]["parts"]:
        for peer, timed in runs.items():
            if peer in errors:
                rows.append(Row(part, peer, 0.0, 0.0, 0, errors[peer]))
            else:
                wall, cpu = (min(run["parts"][part][which] for run in timed) for which in (0, 1))
                rows.append(Row(part, peer, wall, cpu, max(run["peak_bytes"] for run in timed)))
    return rows


def _run(job: dict[str, Any]) -> dict[str, Any] | str:
    """What the tokenizer measured in a fresh process, or the last line of its error."""
    workers = str(job["workers"])
    threads = {"RAYON_NUM_THREADS": workers, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.tokenizer_peers", json.dumps(job)],
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with status {done.returncode}"
    return json.loads(Path(job["out"]).read_text("utf-8"))


def results(rows: list[Row], path: Path, *, vocab_size: int, encode_bytes: int, num_workers: int) -> dict[str, Any]:
    """The content of a results file: for each task and peer our figures and its own; where, with what, when."""
    ours = {row.task: row for row in rows if row.peer == OURS}
    pairs = [(ours[row.task], row) for row in rows if row.peer != OURS]
    return {
        "kind": "tokenizer",
        "machine": {
            "device": processor(),
            "threads": num_workers,
            "torch": _version("torch"),
            "triton": _version("triton"),
            "cuda": None,
            "python": platform.python_version(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        },
        "corpus": {
            "name": path.name,
            "bytes": path.stat().st_size,
            "encoded_bytes": min(encode_bytes, path.stat().st_size),
            "vocab_size": vocab_size,
        },
        "versions": {row.peer: _version(row.peer) for row in rows},
        "rows": [
            {
                "task": row.task,
                "peer": row.peer,
                "seconds": own.seconds,
                "peer_seconds": row.seconds,
                "cpu_seconds": own.cpu_seconds,
                "peer_cpu_seconds": row.cpu_seconds,
                "peak_bytes": own.peak_bytes,
                "peer_peak_bytes": row.peak_bytes,
            }
            for own, row in pairs
            if not row.why_not
        ],
        "failures": [{"task": row.task, "peer": row.peer, "why": row.why_not} for row in rows if row.why_not],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def table(rows: list[Row], title: str) -> Table:
    """One row for each task and tokenizer, side by side; the ratios are ours to the row's."""
    from rich.table import Table

    shown = Table(title=title)
    for name in ("task", "tokenizer", "seconds", "ours / its", "CPU seconds", "ours / its", "peak MB"):
        shown.add_column(name, justify="left" if name in ("task", "tokenizer") else "right")
    if any(row.why_not for row in rows):
        shown.add_column("why there are no figures")
    own = {row.task: row for row in rows if row.peer == OURS}
    last = ""
    for row in rows:
        task = "" if row.task == last else _SPELT.get(row.task, row.task)
        if last and task:
            shown.add_section()
        last = row.task
        if row.why_not:
            shown.add_row(task, row.peer, *[""] * 5, row.why_not)
            continue
        ratios = [
            "" if row.peer == OURS else f"{ours / its:.2f}"
            for ours, its in ((own[row.task].seconds, row.seconds), (own[row.task].cpu_seconds, row.cpu_seconds))
        ]
        peak = f"{row.peak_bytes / 1e6:.0f}"
        shown.add_row(task, row.peer, f"{row.seconds:.3f}", ratios[0], f"{row.cpu_seconds:.3f}", ratios[1], peak)
    return shown


_SPELT = {
    "train": "train",
    "encode": "encode, one thread",
    "encode again": "the same again",
    "encode short": f"{N_SHORT:,} x {SHORT} characters",
    "encode file": "encode a file",
}
