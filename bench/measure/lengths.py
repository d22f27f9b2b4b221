"""The Hopper attention kernels at every length, both passes, each schedule of the forward: right or wrong, on a GPU.

    python -m rooflight.bench.measure.lengths SECONDS

A process for each head size and kind of mask takes lengths 1 to 300 in drawn order, then longer ones, for as long as
there is time: queries and keys of other lengths, grouped heads, few and many programs. One that loses its device goes
on in a new process behind the case that lost it. Everything that was wrong is printed, and the exit status tells it.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KINDS = ("causal", "full", "window", "packed")
HEAD_DIMS = (128, 64)
FIRST = (17, 130, 256, 513, 129, 2049, 300, 128)  # that were wrong once, of a tile, a block, or one row more
LONGEST = 5000
ULPS = 4.0

Results = tuple["Tensor", ...]  # out, lse, dq, dk, dv


class Problem(NamedTuple):
    """lengths of queries and of keys: of each packed sequence, or one of either."""

    T: list[int]
    S: list[int]
    H: int
    K: int
    D: int
    kind: str
    left: int | None
    schedule: tuple[str, int | None]  # of the forward


def problems(kind: str, D: int) -> Iterator[Problem]:
    draws = random.Random(f"{kind} {D}")
    short = [T for T in range(1, 301) if T not in FIRST]
    draws.shuffle(short)
    schedules = [("dynamic", None), ("dynamic", 3), ("tile", None), ("dynamic", 7), ("static", 3)]
    for n, T in enumerate(itertools.chain(FIRST, short, (draws.randint(301, LONGEST) for _ in itertools.count()))):
        K = 1 + n % 2
        H = K * (draws.choice((1, 2, 3)) if T < 1500 else 1)
        if kind == "packed":
            lengths = [draws.choice((0, 1, 7, 64, 128, draws.randint(1, 300))) for _ in range(draws.randint(1, 3))]
            lengths.insert(draws.randint(0, len(lengths)), T)
            keys = [draws.choice((x, x + draws.randint(0, 200), 0, max(1, x // 2))) for x in lengths]
            keys = keys if n % 3 == 0 and sum(keys) else lengths
        else:
            lengths, keys = [T], [T if n % 3 else max(1, T + draws.choice((-T // 2, -70, -1, 1, 200)))]
        left = draws.choice((0, 1, 63, 100, 128, 200, 300)) if kind == "window" else None
        yield Problem(lengths, keys, H, K, D, kind, left, schedules[n % len(schedules)])


# ---------------------------------------------------------------- one problem


def inputs(problem: Problem, device: torch.device) -> tuple[Results, tuple[Any, ...]]:
    """(q, k, v, dout), and (cu_seqlens_q, cu_seqlens_k) or none."""
    import torch

    T, S, H, K, D = problem[:5]
    if problem.kind == "packed":
        shapes = [(sum(T), H, D), (sum(S), K, D), (sum(S), K, D), (sum(T), H, D)]
        ends = tuple(torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (T, S))
    else:
        shapes, ends = [(1, H, T[0], D), (1, K, S[0], D), (1, K, S[0], D), (1, H, T[0], D)], ()
    return tuple(torch.randn(shape, device=device).bfloat16() for shape in shapes), ends


def hopper(problem: Problem, tensors: Results, ends: tuple[Any, ...]) -> Results:
    """The kernels' results; what they leave unwritten is NaN."""
    import torch

    from ...kernels.attention.hopper.backward import launch_backward
    from ...kernels.attention.hopper.forward import launch_forward
    from ...kernels.attention.hopper.schedule import Schedule

    q, k, v, dout = tensors
    out, dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, q, k, v))
    rows = (q.shape[1], q.shape[0]) if ends else q.shape[:3]
    padded = -(-rows[-1] // 16) * 16  # as launch.py allocates it
    lse = torch.full((*rows[:-1], padded), torch.nan, device=q.device)[..., : rows[-1]]
    where = (*(ends or (None, None)), max(problem.T), max(problem.S), problem.left)
    where = (*where, None if problem.kind == "full" else 0, problem.D**-0.5)
    launch_forward(q, k, v, out, lse, *where, schedule=Schedule(*problem.schedule))
    launch_backward(q, k, v, out, dout, lse, None, dq, dk, dv, None, *where)
    return out, lse, dq, dk, dv


def oracle(problem: Problem, tensors: Results, ends: tuple[Any, ...], dtype: torch.dtype) -> Results:
    """Eager PyTorch's, computed in this dtype."""
    import torch

    from ...kernels import reference

    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in tensors[:3])
    window = None if problem.left is None else (problem.left, 0)
    options: dict[str, Any] = {"causal": problem.kind != "full", "window": window, "return_lse": True}
    if ends:
        found = reference.flash_attention_varlen(q, k, v, *ends, max(problem.T), max(problem.S), **options)
    else:
        found = reference.flash_attention(q, k, v, **options)
    out, lse = found
    gradients = torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype), materialize_grads=True)
    return (out.detach(), lse.detach(), *gradients)


def faults(found: Results, eager: Results, exact: Results) -> list[str]:
    """What is further from the truth than twice eager's error, three times for gradients, and a few ulps."""
    import torch

    wrong = []
    for name, x, rough, truth in zip(("out", "lse", "dq", "dk", "dv"), found, eager, exact, strict=True):
        if truth.numel() == 0:
            continue
        truth = truth.double()
        finite = truth.isfinite()
        if not torch.equal(x.double()[~finite], truth[~finite]):
            wrong.append(f"{name}: infinities differ")
            continue
        truth = truth.where(finite, 0)
        error, peer = ((y.double().where(finite, 0) - truth).abs().max().item() for y in (x, rough))
        # of one key dq and dk are exactly 0, a difference of terms of size 1
        scale = max(truth.abs().max().item(), 2.0**-6)
        limit = (3 if name.startswith("d") else 2) * peer + ULPS * 2.0**-8 * scale
        if not error <= limit:  # nor NaN
            wrong.append(f"{name}: off by {error:.3g}, at most {limit:.3g} is allowed")
    return wrong


def check(
    problem: Problem, device: torch.device, compute: Callable[[Problem, Results, tuple[Any, ...]], Results] = hopper
) -> list[str]:
    import torch

    tensors, ends = inputs(problem, device)
    found = compute(problem, tensors, ends)
    return faults(found, oracle(problem, tensors, ends, torch.bfloat16), oracle(problem, tensors, ends, torch.float64))


# ---------------------------------------------------------------- processes


def child(kind: str, D: int, skipped: int, until: float) -> None:
    """The problems behind the first `skipped`. A line at the beginning of each: who died, died in the last."""
    import torch

    torch.manual_seed(0)
    device = torch.device("cuda")
    for n, problem in enumerate(problems(kind, D)):
        if n < skipped:
            continue
        if time.time() > until:
            return
        print("AT", n, problem, flush=True)
        for fault in check(problem, device):
            print("WRONG", problem, fault, flush=True)
        print("DONE", n, flush=True)


def _follow(kind: str, D: int, until: float, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Processes one after the other, until the time is up."""
    skipped = 0
    while time.time() < until:
        with log.open("ab") as file:
            yield subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, kind, str(D), str(skipped), str(until)], stdout=file, stderr=file
            )
        begun = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("AT ")]
        if len(begun) == 0 or begun[-1] < skipped:  # it never began: another would not either
            return
        skipped = begun[-1] + 1


def main(seconds: float) -> int:
    """Prints what was wrong and, for each process, how many problems were right. The exit status."""
    until = time.time() + seconds
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        logs = {(kind, D): Path(folder) / f"{kind}-{D}" for kind in KINDS for D in HEAD_DIMS}
        waiting = {key: _follow(*key, until, log) for key, log in logs.items()}
        running = {key: next(processes) for key, processes in waiting.items()}
        while running and time.time() < until + 5:
            time.sleep(0.2)
            for key, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                if (following := next(waiting[key], None)) is not None:
                    running[key] = following
        for process in running.values():
            process.kill()
        for (kind, D), log in logs.items():
            lines = log.read_text(errors="replace").splitlines()
            begun = [line for line in lines if line.startswith("AT ")]
            done = {line.split()[1] for line in lines if line.startswith("DONE ")}
            wrong = [line for line in lines if line.startswith("WRONG ")]
            lost = [line for line in begun[:-1] if line.split()[1] not in done]
            print(*wrong, *(f"LOST {line}" for line in lost), sep="\n", end="\n" if wrong or lost else "")
            print(f"{kind} {D}: {len(done)} problems, {len(wrong)} faults, {len(lost)} lost")
            if not done:
                print(*lines[-3:], sep="\n")
            status |= bool(wrong or lost or not done)
    return status


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(main(float(sys.argv[1])))
    kind, D, skipped, until = sys.argv[1:]
    child(kind, int(D), int(skipped), float(until))
    os._exit(0)
