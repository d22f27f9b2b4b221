"""Encoding in several processes beside one: a file, and a list of texts.

    python -m rooflight.bench.measure.processes TEXT TOKENIZER [WORKERS] [REPEATS]    # default: 2 workers, 5 repeats

TEXT is a text file; its first 40 MB, in texts of 2,000 characters, are the list. TOKENIZER is a folder. Each run is a
process of its own, which starts with empty tables, and one and several take turns. Shown is the least of each: seconds
on the wall, of processor time of the busiest process, and of all. On cores that nothing else uses the first two are
nearly the same. On others whoever gets a core does more of the work, and what all take is the steadier figure: the
speed-up that it stands for is WORKERS x one / all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ...tokenizer import Tokenizer
from ..cases.tokenizer_peers import Clock

__all__ = ["main", "measure"]

MEGABYTES, CHARACTERS = 40, 2_000
TASKS = ("encode_file", "encode_batch")


def measure(task: str, text: Path, folder: Path, workers: int) -> tuple[float, float, float]:
    """Wall seconds, and processor seconds of the busiest process (of several started ones their mean) and of all."""
    tokenizer = Tokenizer.load(folder)
    with TemporaryDirectory() as name:
        if task == "encode_file":
            clock = Clock()
            tokenizer.encode_file(text, Path(name) / "ids.bin", num_workers=workers)
        else:
            with text.open(encoding="utf-8", errors="replace", newline="") as file:
                whole = file.read(MEGABYTES * 1_000_000)
            texts = [whole[i : i + CHARACTERS] for i in range(0, len(whole), CHARACTERS)]
            clock = Clock()
            tokenizer.encode_batch(texts, num_workers=workers)
        wall, own, others = clock.read_apart()
    return wall, max(own, others / max(1, workers - 1)), own + others


def main(text: str, tokenizer: str, workers: str = "2", repeats: str = "5", task: str = "") -> None:
    if task:  # one run, in a process of its own
        print(json.dumps(measure(task, Path(text), Path(tokenizer), int(workers))))
        return
    if not workers.isdecimal() or int(workers) < 2:
        sys.exit(f"WORKERS: expected a number from 2 on, got {workers}")
    for name in TASKS:
        runs: dict[str, list[list[float]]] = {"1": [], workers: []}
        for _ in range(int(repeats)):
            for n, found in runs.items():
                command = [sys.executable, "-m", __spec__.name, text, tokenizer, n, "1", name]
                found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
        one, several = ([min(column) for column in zip(*found, strict=True)] for found in runs.values())
        gain = [one[0] / several[0], one[1] / several[1], int(workers) * one[2] / several[2]]
        print(f"{name:<14}{'wall':>8}{'busiest':>9}{'all':>8}")
        for label, row in (("1 process", one), (f"{workers} processes", several), ("times as fast", gain)):
            print(f"{label:<14}{row[0]:8.2f}{row[1]:9.2f}{row[2]:8.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
