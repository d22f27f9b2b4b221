"""RMSNorm's tiles beside others that may be faster, on a GPU, in under a minute.

    python -m rooflight.bench.measure.norms [SECONDS]

CANDIDATES says what each is predicted to do (bench/NOTES.md has the reasons). Every one is checked against fp32 and
timed beside the tile that ships: device time of CUDA graphs on a cold L2, GB/s of the tensors that must move. Without a
GPU the table alone is printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.rms_norm import rms_norm_bwd, rms_norm_fwd
from ...kernels.rms_norm_tiles import Tile, use
from .clock import timings

__all__ = ["CANDIDATES", "Candidate", "check", "main", "table"]

EPS = 1e-6
SECONDS = 50.0  # of a run, compiling included
SHARE = 0.1  # seconds that each call is timed for
WRONG = 8e-3  # of the largest value: two bf16 roundings


class Candidate(NamedTuple):
    """tile: None for the one that ships.  predicted: GB/s; measured in place of it where hardware has said so."""

    pass_: str
    rows: int
    N: int
    tile: Tile | None
    predicted: str


CANDIDATES = [
    Candidate("forward", 16384, 4096, None, "3,816 measured 2026-11-27"),
    Candidate("forward", 16384, 4096, Tile(1, 4096, 8, 1, scale_first=True, once=False), "4,050"),
    Candidate("forward", 16384, 4096, Tile(1, 4096, 8, 1, scale_first=True), "4,000"),
    Candidate("forward", 16384, 4096, Tile(1, 4096, 16, 1, scale_first=True, once=False), "4,000"),
    Candidate("forward", 16384, 4096, Tile(1, 4096, 4, 1, scale_first=True, once=False), "4,000"),
    Candidate("forward", 8192, 8192, None, "3,863 measured 2026-11-27"),
    Candidate("forward", 8192, 8192, Tile(1, 8192, 32, 1, scale_first=True, once=False), "3,950"),
    Candidate("forward", 8192, 8192, Tile(1, 8192, 16, 1, scale_first=True, once=False), "3,900"),
    Candidate("forward", 8192, 8192, Tile(1, 8192, 8, 1, scale_first=True, once=False), "4,000"),
    Candidate("backward", 16384, 1600, None, "3,191 measured 2026-11-27"),
    Candidate("backward", 16384, 1600, Tile(2, 2048, 8, 3), "3,600"),
    Candidate("backward", 16384, 1600, Tile(1, 2048, 4, 3), "3,500"),
    Candidate("backward", 16384, 1600, Tile(1, 2048, 8, 3, resident=32), "3,600"),
    Candidate("backward", 4096, 2048, None, "2,900"),
    Candidate("backward", 4096, 2048, Tile(2, 2048, 8, 3), "3,050"),
    Candidate("backward", 4096, 2048, Tile(1, 2048, 8, 3, resident=32), "2,900"),
    Candidate("backward", 16384, 4096, None, "4,023 measured 2026-11-27"),
    Candidate("backward", 16384, 4096, Tile(1, 4096, 8, 3), "4,000"),
]

Results = dict[str, Tensor]


def table() -> list[str]:
    """The candidates, a line each."""
    return [f"{c.pass_:8} {c.rows:5} x {c.N:5}  {_named(c.tile):60} predicted {c.predicted}" for c in CANDIDATES]


def _named(tile: Tile | None) -> str:
    if tile is None:
        return "as it ships"
    changed = [f"{name}={x}" for name, x in tile._asdict().items() if x != Tile._field_defaults.get(name)]
    return ", ".join(changed)


def _inputs(rows: int, N: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((rows, N), (rows, N), (N,))
    x, dy, weight = (torch.randn(s, device=device, generator=generator).bfloat16() for s in shapes)
    return x, dy, weight


def _exact(x: Tensor, dy: Tensor, weight: Tensor) -> Results:
    """Both passes in fp32."""
    h, g, w = x.float(), dy.float(), weight.float()
    rstd = (h.square().mean(1) + EPS).rsqrt()
    xhat, wg = h * rstd[:, None], g * w
    dh = (wg - xhat * (xhat * wg).mean(1, keepdim=True)) * rstd[:, None]
    return {"y": xhat * w, "rstd": rstd, "dh": dh, "dw": (g * xhat).sum(0)}


def _call(candidate: Candidate, x: Tensor, dy: Tensor, weight: Tensor, rstd: Tensor) -> Callable[[], Results]:
    tile = candidate.tile

    def call() -> Results:
        with nullcontext() if tile is None else use(candidate.pass_, tile):
            if candidate.pass_ == "forward":
                y, _, found = rms_norm_fwd(x, weight, EPS, None, 0.0)
                return {"y": y, "rstd": found}
            dh, dw = rms_norm_bwd(dy, None, x, weight, rstd, 0.0, True)
            assert dw is not None
            return {"dh": dh, "dw": dw}

    return call


def check(found: Results, exact: Results) -> str | None:
    """What is wrong, or None."""
    for name, x in found.items():
        error = ((x.float() - exact[name]).abs().max() / exact[name].abs().max()).item()
        if not error < WRONG:  # NaN too
            return f"{name} is off by {error:.1e} of the largest"
    return None


def main(seconds: float = SECONDS, device: torch.device | None = None) -> int:
    """The number of candidates that were wrong or that time did not suffice for."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("\n".join(table()))
        return 0
    print(torch.cuda.get_device_name(device), torch.__version__, flush=True)
    end = time.monotonic() + seconds
    n_bad = 0
    for shape in dict.fromkeys((c.rows, c.N) for c in CANDIDATES):
        inputs = _inputs(*shape, device)
        exact = _exact(*inputs)
        calls, right = [], []
        for candidate in (c for c in CANDIDATES if (c.rows, c.N) == shape):
            label = f"{candidate.pass_:8} {shape[0]:5} x {shape[1]:5}  {_named(candidate.tile):60}"
            if time.monotonic() > end:
                n_bad += 1
                print(label, "no time left", flush=True)
                continue
            call = _call(candidate, *inputs, exact["rstd"])
            try:
                wrong = check(call(), exact)
            except Exception as error:  # a tile that does not compile or launch is a result too
                wrong = f"{type(error).__name__}: {str(error)[:100]}"
            if wrong:
                n_bad += 1
                print(label, wrong, flush=True)
            else:
                calls.append(call)
                right.append((label, candidate))
        times = timings(calls, device, seconds=SHARE * len(calls), rounds=(5, 50)) if calls else []
        for (label, candidate), timing in zip(right, times, strict=True):
            moved = (2 if candidate.pass_ == "forward" else 3) * inputs[0].nbytes
            print(
                f"{label} {moved / timing.median / 1e9:6.0f} GB/s, best {moved / timing.least / 1e9:6.0f}"
                f" ({timing.median * 1e6:.1f} us); predicted {candidate.predicted}",
                flush=True,
            )
    return n_bad


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if sys.argv[1:] else SECONDS) > 0)
