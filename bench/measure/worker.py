"""Kernel cases in a process of their own, so that one that hangs or crashes costs itself and nothing else.

    python -m rooflight.bench.measure.worker DEVICE GROUP SKIPPED [I/N]

GROUP is "probes", "sanitized" (the smallest of them), "checks" (the probes, then every case untimed: what they compile
is in the caches afterwards) or "cases" (the machine's ceilings, then every case timed).  SKIPPED: [[case, provider],
...].  I/N: of the group, the I-th of N shares.  The worker says as lines of JSON what it is at and what came out; `run`
starts it, gives every step a time limit, ends a worker that passes it, and goes on with the next case in a new one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..cases.case import Case

START = 60.0  # seconds for a process to import torch and set a GPU up
STEP = {"probes": 40.0, "checks": 60.0, "cases": 60.0}  # for one provider of one case, compilation included
BARREN = 2  # processes in a row that end before they did anything: one more would not either
WORKERS = 12  # that compile and check at once, at most
CEILINGS = "ceilings"  # the step that comes before all cases
CHECKING = 0.5  # of the time: what is not checked by then is checked when it is timed
LOST = 3  # the exit status of a process whose device answers no more


def work(device: str, group: str, skipped: list[list[str]], share: str = "0/1") -> None:
    """Check and time the group's cases, without the (case, provider) pairs skipped; a provider "" skips a case."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a graph has one kernel or two: a pool starts slower
    import torch

    from ..cases.kernels import cases, probes
    from .harness import ContextLost

    place = torch.device(device)
    if group == "cases":
        found = [(case, True) for case in cases(place)]
        if [CEILINGS, ""] not in skipped:
            say(begun=CEILINGS)
            say(ceilings=ceilings(place))
            say(done=CEILINGS)
    else:
        found = [(case, True) for case in probes(place)]
        if group == "sanitized":  # the sanitizer slows everything by a hundred times
            found = [(case, True) for case, _ in found if case.shape["T"] <= 256]
        if group == "checks":
            found += [(case, False) for case in cases(place)]
    first, step = map(int, share.split("/"))
    for case, told in found[first::step]:
        without = {provider for name, provider in skipped if name == case.name}
        if "" not in without:
            try:
                _go_through(case, place, without, told)
            except ContextLost as error:
                say(lost=str(error))
                os._exit(LOST)  # nothing that needs the device can be cleaned up
    say(finished=group)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _go_through(case: Case, device: torch.device, without: set[str], told: bool) -> None:
    """One case. told: its results are said; otherwise it is only run, untimed, for the caches of a later worker."""
    import torch

    from .harness import ContextLost, Failure, alive, measure, sentence

    say(begun=case.name, **({"kind": list(case.kind)} if told else {}))

    def progress(provider: str) -> None:
        say(at=[case.name, provider])

    try:
        for one in measure(case if told else replace(case, timed=False), device, without=without, progress=progress):
            if told:
                say(**{"failure" if isinstance(one, Failure) else "measurement": asdict(one)})
        say(at=[case.name, ""])
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize(device)
    except ContextLost:
        raise
    except Exception as error:  # of the truth or the inputs: out of memory, say
        if not alive(device):
            raise ContextLost(sentence(error)) from error
        if told:
            say(failure=asdict(Failure(case.name, "", sentence(error))))
    say(done=case.name)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine reaches: a bf16 product of square matrices of random numbers, and a copy."""
    import torch

    from .clock import median_seconds

    size, n_byte = (8192, 2**32) if device.type == "cuda" else (512, 2**28)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    (product,) = median_seconds([lambda: a @ b], device, seconds=0.3)
    source = torch.empty(n_byte, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # as it is called: in a CUDA graph the copy engine does it, at two thirds of the rate
    (copied,) = median_seconds([lambda: target.copy_(source)], device, seconds=0.3, capture=False)
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
    A step that hangs, or in which the process dies, becomes a failure of its (case, provider), marked "died"; a new
    worker does what is left. One that dies between two cases, or before it begins, has a successor too: only when
    BARREN in a row did nothing is the rest given up.
    """
    heard: list[dict[str, Any]] = []
    skip = [list(pair) for pair in skipped]
    barren = 0
    while barren < BARREN and time.monotonic() < deadline:
        at: list[str] | None = None
        lost: str | None = None
        last = ""

        def tell(said: dict[str, Any]) -> None:
            nonlocal at, lost, last, barren
            hear(said)
            barren = 0
            if "at" in said:
                if at is not None and at[1]:
                    skip.append(at)  # what it had before is done
                at = said["at"]
                return
            heard.append(said)
            if "begun" in said:
                at = [said["begun"], ""]
            elif "done" in said:
                at, last = None, said["done"]
                skip.append([last, ""])
            lost = said.get("lost")

        barren += 1
        ending = _live(start_with(skip), step=step, start=start, deadline=deadline, tell=tell)
        if ending is None:
            break
        case, provider = at or (last, "")
        failure = {"case": case, "provider": provider, "error": lost or ending}
        heard.append({"failure": failure, "died": True})
        hear(heard[-1])
        if at is not None:
            skip.append(at)
    return heard


def _live(
    command: Sequence[str], *, step: float, start: float, deadline: float, tell: Callable[[dict[str, Any]], object]
) -> str | None:
    """Run one worker to its end, told every line it says; why it ended, or None when it was done or time was up."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    follower = threading.Thread(target=_follow, args=(process.stdout, lines), daemon=True)
    follower.start()
    limit = start
    try:
        while True:
            left = min(limit, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(0.0, left))
            except queue.Empty:
                return f"no end within {limit:.0f} s" if left == limit else None
            if line is None:
                status = process.wait()
                return f"its process ended with status {status}" if status else None
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a library's own output
            tell(said)
            if "finished" in said:
                return None
            limit = step
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver may hold on to it for a while
            process.wait(timeout=10)
            follower.join(timeout=10)
            process.stdout.close()


def run_shares(
    start_with: Callable[[list[list[str]], str], Sequence[str]], n_worker: int, **options: Any
) -> list[dict[str, Any]]:
    """`run` for the shares of a group, all at once: for results, whose time does not matter."""
    hear, lock = options.pop("hear", lambda line: None), threading.Lock()

    def locked(line: dict[str, Any]) -> None:
        with lock:
            hear(line)

    def share(index: int) -> list[dict[str, Any]]:
        return run(lambda skipped: start_with(skipped, f"{index}/{n_worker}"), hear=locked, **options)

    with ThreadPoolExecutor(n_worker) as pool:
        return [line for heard in pool.map(share, range(n_worker)) for line in heard]


def command(device: str, group: str) -> Callable[..., list[str]]:
    """How a worker is started, given the pairs to skip and, where there are several, its share."""
    return lambda skipped, share="0/1": [
        sys.executable, "-P", "-m", __name__, device, group, json.dumps(skipped), share,
    ]  # fmt: skip


def right_kinds(heard: Sequence[dict[str, Any]], provider: str) -> set[tuple]:
    """The kinds of which every probe was done and the provider failed none."""
    begun = {line["begun"]: tuple(line["kind"]) for line in heard if "kind" in line}
    done = {line["done"] for line in heard if "done" in line}
    failed = {line["failure"]["case"] for line in heard if line.get("failure", {}).get("provider") in (provider, "")}
    return set(begun.values()) - {kind for case, kind in begun.items() if case in failed or case not in done}


def kernels(device: str, seconds: float, hear: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """On a GPU all checks, in several processes at once; then ceilings and cases: what `run` returns for all of them.

    Within `seconds`. What runs on the hopper path is timed where all probes of its kind (head size, window, packing)
    gave right results, and nowhere else.
    """
    import torch

    from ..cases.kernels import HOPPER, cases

    deadline = time.monotonic() + seconds
    heard: list[dict[str, Any]] = []
    skip: list[list[str]] = []
    if device == "cuda":
        n_worker = max(1, min(WORKERS, (os.cpu_count() or 1) - 2))
        until = time.monotonic() + CHECKING * seconds
        heard += run_shares(command(device, "checks"), n_worker, step=STEP["checks"], deadline=until, hear=hear)
        skip = [[line["failure"]["case"], line["failure"]["provider"]] for line in heard if "died" in line]
        right = right_kinds(heard, HOPPER)
        for case in cases(torch.device(device)):
            for provider in case.providers:
                if "hopper" in (case.taken(provider, mode) for mode in case.modes) and case.kind not in right:
                    skip.append([case.name, provider])
                    reason = "not timed: not every probe of its kind on the hopper path gave a right result"
                    heard.append({"failure": {"case": case.name, "provider": provider, "error": reason}})
                    hear(heard[-1])
    return heard + run(command(device, "cases"), step=STEP["cases"], deadline=deadline, skipped=skip, hear=hear)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:])
