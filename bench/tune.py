"""`rooflight bench tune`: time attention's tiles, and its paths, on this GPU, and keep the fastest for this user.

A candidate is checked before it is timed; one that does not fit the GPU is left out. What wins goes into the user's own
table (kernels/attention/tuned.py), which the launchers read before the tiles that ship. Nothing is ever tuned by
itself: a first step is never slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .. import kernels
from ..kernels.attention import paths
from ..kernels.attention.portable import tiles
from ..kernels.attention.tuned import KERNELS, PASSES, PATHS, Identity, Tile, UserTable, architecture, read
from ..training.files import write_json
from .cases.kernels import HOPPER, Case, attention_case
from .measure.clock import median_seconds
from .measure.harness import Checker, WrongResult, task
from .measure.worker import STEP, command, right_kinds, run

# What a candidate must save for the one that ships to be given up: less is noise.
MARGIN = 0.02
PROBING = 300.0  # seconds, for the hopper path's first results in a process of their own
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Shape = tuple[int, int, int, int]  # B, H, K, T
Timer = Callable[[Callable[[], object], torch.device], float]
Candidates = Callable[[str, int, torch.dtype, torch.device], Sequence[Tile]]
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Trial:
    """One candidate's time in milliseconds; None with the reason where there is none."""

    kernel: str  # or the pass, of a path
    dtype: str
    head_dim: int
    candidate: Tile | str
    milliseconds: float | None
    note: str = ""
    kept: bool = False


def this_gpu(device: torch.device) -> Identity:
    """Whom a measurement on this GPU holds for."""
    return Identity(torch.cuda.get_device_name(device), architecture())


def require_gpu(device: torch.device) -> None:
    """Raise ValueError, one sentence, where there is no GPU."""
    if device.type != "cuda":
        raise ValueError("bench tune: expected a GPU to time on, found none; the tiles that ship work without")


def read_dtypes(names: Sequence[str]) -> list[torch.dtype]:
    """Raises ValueError on a name that no kernel takes."""
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return [DTYPES[name] for name in names]


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    return median_seconds([call], device, seconds=0.1)[0] * 1e3


def tune(
    device: torch.device,
    *,
    names: Sequence[str] = KERNELS,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    shape: Shape = (4, 16, 16, 4096),
    timer: Timer = median_ms,
    candidates: Candidates = tiles.candidates,
    progress: Progress = lambda what: None,
) -> list[Trial]:
    """Time every candidate of every kernel, then the paths, on a causal batch of this shape.

    A backward kernel is timed as the whole backward pass, its other kernels as they ship.
    Raises ValueError on a kernel without tiles and on a head size out of range.
    """
    for kernel in names:
        if kernel not in KERNELS:
            raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    for head_dim in head_dims:
        if not 1 <= head_dim <= 512:
            raise ValueError(f"head-dim: expected 1 to 512, got {head_dim}")
    right = _probed(progress) if device.type == "cuda" and architecture() == "sm_90" else set()
    trials: list[Trial] = []
    for dtype in dtypes:
        for head_dim in head_dims:
            large = _case(shape, head_dim, dtype, device)
            for kernel in names:
                with paths.use("portable"):
                    small = _case((1, 4, 2, 300 if device.type == "cuda" else 40), head_dim, dtype, device)
                    found = candidates(kernel, head_dim, dtype, device)
                    trials += _time_tiles(kernel, found, Checker(small, device), large, device, timer, progress)
            if (head_dim, False, False) in right:
                trials += _time_paths(large, trials, device, timer, progress)
    return trials


def _probed(progress: Progress) -> set[tuple]:
    """The kinds of case that the hopper path was seen to serve rightly here, in a process that could hang."""
    progress("the hopper path's results")
    deadline = time.monotonic() + PROBING
    return right_kinds(run(command("cuda", "probes"), step=STEP["probes"], deadline=deadline), HOPPER)


def _case(shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A causal case with no provider but ours."""
    case = attention_case(*shape, head_dim, True, dtype, device)
    return replace(case, providers={"rooflight": kernels.flash_attention})


def _time_tiles(
    kernel: str,
    candidates: Sequence[Tile],
    checker: Checker,
    case: Case,
    device: torch.device,
    timer: Timer,
    progress: Progress,
) -> list[Trial]:
    """A kernel's candidates, the one that ships first; the fastest is marked as kept."""
    found: list[Trial] = []
    for tile in candidates:
        progress(f"{kernel} {_shown(tile)}, head size {case.shape['D']}")
        trial = partial(Trial, kernel, _name(case.dtype), int(case.shape["D"]), tile)
        with tiles.use(kernel, tile):
            try:
                checker.check("rooflight")
                mode = "forward" if kernel == "fwd" else "backward"
                found.append(trial(timer(task(case, case.providers["rooflight"], mode, device), device)))
            except WrongResult as error:
                found.append(trial(None, f"wrong: {error}"))
            except (OutOfResources, CompilationError, PTXASError) as error:
                found.append(trial(None, f"does not fit: {str(error).strip().splitlines()[0]}"))
            except RuntimeError as error:
                if "PassManager" not in str(error):  # the compiler gave up; anything else is no candidate's fault
                    raise
                found.append(trial(None, "does not compile"))
    return _marked(found)


def _time_paths(
    case: Case, trials: Sequence[Trial], device: torch.device, timer: Timer, progress: Progress
) -> list[Trial]:
    """The paths of a case, forward and backward, the portable one first and with the tiles that won."""
    dtype, head_dim = _name(case.dtype), int(case.shape["D"])
    found: list[Trial] = []
    for pass_ in PASSES:
        timed = []
        for path in reversed(PATHS):
            progress(f"{pass_} {path}, head size {head_dim}")
            with paths.use(path), ExitStack() as stack:
                for trial in trials:
                    same = (trial.dtype, trial.head_dim) == (dtype, head_dim)
                    if trial.kept and same and isinstance(trial.candidate, Tile):
                        stack.enter_context(tiles.use(trial.kernel, trial.candidate))
                call = task(case, case.providers["rooflight"], pass_, device)
                timed.append(Trial(pass_, dtype, head_dim, path, timer(call, device)))
        found += _marked(timed)
    return found


def _marked(trials: list[Trial]) -> list[Trial]:
    """The trials with the one to keep marked: the first, unless another saves more than MARGIN of its time."""
    timed = [t for t in trials if t.milliseconds is not None]
    if not timed:
        return trials
    best = min(timed, key=lambda t: t.milliseconds or 0.0)
    first = trials[0].milliseconds
    if first is not None and (best.milliseconds or 0.0) > (1 - MARGIN) * first:
        best = trials[0]
    return [replace(t, kept=t is best) for t in trials]


def merged(before: UserTable, trials: Sequence[Trial]) -> UserTable:
    """The user's table with what these trials found in the place of what it said of the same calls."""
    kept = [t for t in trials if t.kept]
    new_tiles = {(t.kernel, t.dtype, t.head_dim): t.candidate for t in kept if isinstance(t.candidate, Tile)}
    new_paths = {(t.kernel, t.dtype, t.head_dim): t.candidate for t in kept if isinstance(t.candidate, str)}
    return UserTable({**before.tiles, **new_tiles}, {**before.paths, **new_paths})


def save(trials: Sequence[Trial], identity: Identity) -> Path:
    """Put what was kept into the user's table for this GPU; returns its file. A broken file there is written anew."""
    try:
        before = read(identity)
    except ValueError:
        before = UserTable()
    write_json(identity.path, merged(before, trials).to_dict(identity))
    tiles.forget()
    paths.forget()
    return identity.path


def trials_table(trials: Sequence[Trial]) -> Table:
    """For rich.print: every candidate and what became of it."""
    out = Table(title="Tiles and paths of attention, causal; a backward kernel's time is the whole pass's")
    for column in ("kernel or pass", "dtype", "head size", "candidate"):
        out.add_column(column)
    out.add_column("ms", justify="right")
    out.add_column("")
    before = None
    for t in trials:
        if before not in (None, (t.kernel, t.dtype, t.head_dim)):
            out.add_section()
        before = (t.kernel, t.dtype, t.head_dim)
        milliseconds = "" if t.milliseconds is None else f"{t.milliseconds:.3f}"
        note = "kept" if t.kept else t.note
        out.add_row(t.kernel, t.dtype, str(t.head_dim), _shown(t.candidate), milliseconds, note)
    return out


def _shown(candidate: Tile | str) -> str:
    if isinstance(candidate, str):
        return candidate
    return f"{candidate.block_m} x {candidate.block_n}, {candidate.num_warps} warps, {candidate.num_stages} stages"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
