"""Kernel cases in a process of their own, so that one that hangs or crashes costs itself and nothing else.

    python -m rooflight.bench.measure.worker DEVICE ceilings|probes|sanitized|cases SKIPPED    # [[case, provider], ...]

The worker says as lines of JSON what it is at and what came out; `run` starts it, gives every step a time limit, ends a
worker that passes it, and goes on with the next case in a new one.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

START = 120.0  # seconds for a process to import torch and set a GPU up
STEP = {"ceilings": 60.0, "probes": 40.0, "cases": 100.0}  # for one provider of one case, compilation included


def work(device: str, group: str, skipped: list[list[str]]) -> None:
    """Check and time the group's cases, without the (case, provider) pairs skipped; a provider "" skips a case."""
    import torch

    from ..cases.kernels import cases, probes
    from .harness import Failure, measure

    place = torch.device(device)

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    if group == "ceilings":
        say(at=["ceilings", ""])
        say(ceilings=ceilings(place))
        return
    # The sanitizer slows everything by a hundred times: the smallest cases of each head size.
    found = cases(place) if group == "cases" else probes(place)
    if group == "sanitized":
        found = [case for case in found if case.shape["T"] <= 256]
    for case in found:
        without = {provider for name, provider in skipped if name == case.name}
        if "" in without:
            continue
        say(at=[case.name, ""])
        progress = partial(_at, say, case.name)
        try:
            for one in measure(case, place, without=without, progress=progress):
                say(**{"failure" if isinstance(one, Failure) else "measurement": asdict(one)})
        except Exception as error:  # of the truth or the inputs: out of memory, say
            say(failure=asdict(Failure(case.name, "", f"{type(error).__name__}: {str(error).splitlines()[0]}")))
        say(done=case.name, kind=list(case.kind))
        if place.type == "cuda":
            torch.cuda.empty_cache()


def _at(say: Callable[..., None], case: str, provider: str) -> None:
    say(at=[case, provider])


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine reaches: a bf16 product of square matrices of random numbers, and a copy."""
    import torch

    from .harness import seconds

    size, n_byte = (8192, 2**32) if device.type == "cuda" else (1024, 2**28)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = seconds(lambda: a @ b, device)[1]
    source = torch.empty(n_byte, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), device)[1]
    return {
        "gemm_size": size,
        "gemm_teraflops": 2 * size**3 / product / 1e12,
        "copy_bytes": n_byte,
        "copy_gigabytes_per_second": 2 * n_byte / copied / 1e9,
    }


def _follow(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def run(
    start_with: Callable[[list[list[str]]], Sequence[str]],
    *,
    step: float,
    deadline: float,
    skipped: Sequence[Sequence[str]] = (),
    start: float = START,
    hear: Callable[[dict[str, Any]], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Every line of a worker that says more than where it is, from as many processes as it takes.

    start_with(skipped): the command that starts a worker.  step, start: seconds that one step, and the start of a
    process, may take.  deadline: by time.monotonic(); what is not done by then is left out.  hear: told every line.
    A step that hangs, or in which the process dies, becomes a failure of its (case, provider); a new worker does what
    is left.
    """
    heard: list[dict[str, Any]] = []
    skip = [list(pair) for pair in skipped]
    while time.monotonic() < deadline:
        process = subprocess.Popen(start_with(skip), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        follower = threading.Thread(target=_follow, args=(process.stdout, lines), daemon=True)
        follower.start()
        at, limit, ending = None, start, None
        try:
            while True:
                left = min(limit, deadline - time.monotonic())
                try:
                    line = lines.get(timeout=max(0.0, left))
                except queue.Empty:
                    ending = f"no end within {limit:.0f} s" if left == limit else None
                    break
                if line is None:
                    status = process.wait()
                    if status == 0:
                        return heard
                    ending = f"its process ended with status {status}"
                    break
                try:
                    said = json.loads(line)
                except ValueError:
                    continue  # a library's own output
                hear(said)
                limit = step
                if "at" in said:
                    at = said["at"]
                else:
                    heard.append(said)
                    if "done" in said:
                        skip.append([said["done"], ""])
                        at = None
        finally:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may hold on to it for a while
                process.wait(timeout=10)
                follower.join(timeout=10)
                process.stdout.close()
        if ending is None:
            break
        failure = {"case": at[0] if at else "", "provider": at[1] if at else "", "error": ending}
        heard.append({"failure": failure})
        hear(heard[-1])
        if at is None:  # it never began: another process would not either
            break
        skip.append(at)
    return heard


def command(device: str, group: str) -> Callable[[list[list[str]]], list[str]]:
    """How a worker is started."""
    return lambda skipped: [sys.executable, "-P", "-m", __name__, device, group, json.dumps(skipped)]


def right_kinds(heard: Sequence[dict[str, Any]], provider: str) -> set[tuple]:
    """The kinds of which every probe was done and the provider failed none."""
    failed = {line["failure"]["case"] for line in heard if line.get("failure", {}).get("provider") in (provider, "")}
    done = [line for line in heard if "done" in line]
    return {tuple(line["kind"]) for line in done} - {tuple(line["kind"]) for line in done if line["done"] in failed}


def kernels(device: str, seconds: float, hear: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """Ceilings, probes, then cases, within `seconds`: what `run` returns for all of them.

    The hopper path is timed where all probes of its kind (head size, window, packing) gave right results, and nowhere
    else.
    """
    import torch

    from ..cases.kernels import HOPPER, cases

    deadline = time.monotonic() + seconds
    heard: list[dict[str, Any]] = []
    skip: list[list[str]] = []
    for group in ("ceilings", "probes", "cases") if device == "cuda" else ("ceilings", "cases"):
        heard += run(command(device, group), step=STEP[group], deadline=deadline, skipped=skip, hear=hear)
        if group == "probes":
            right = right_kinds(heard, HOPPER)
            skip = [[case.name, HOPPER] for case in cases(torch.device(device)) if case.kind not in right]
    return heard


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
