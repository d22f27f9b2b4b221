"""Which path serves which call, and why: the one table that the launchers ask and `rooflight bench paths` prints.

portable: the Triton kernels of portable/; every call on every GPU, and under the interpreter.
hopper: the Gluon kernels of hopper/; what `_obstacle` leaves to them.
sdpa, eager: a plain CPU tensor runs torch's scaled_dot_product_attention where it has the semantics, else the operator
in eager fp32 products (plain.py).

A path is the default only where it was measured to win (MEASURED). A user's own measurement (`rooflight bench tune`)
goes before that, and `use` before both. Where the hopper path cannot run on a machine after all (a triton without
Gluon, a compile or a launch that fails), one warning says so and the portable one serves from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from ..dispatch import INTERPRETED
from .tuned import PATHS, architecture, table_of

__all__ = [
    "MEASURED", "OPTIONS", "Call", "Choice", "choose", "decide", "forget", "give_up", "state", "step_back", "table",
    "use",
]  # fmt: skip

OPTIONS = ("window", "packed", "softcap", "sinks", "alibi", "short")
SHORT = 512  # fewer queries than that are "short": the least that was measured
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "cpu")
HOPPER_HEADS = {"forward": (64, 128, 256), "backward": (64, 128)}
HOPPER_DTYPES = (torch.bfloat16, torch.float16)
# in the backward a sink is in the log-sum-exp by then
NOT_IN_HOPPER = {"forward": {"softcap", "sinks", "alibi"}, "backward": {"softcap", "alibi"}}

# Where the hopper path is the default: its and the portable path's TFLOP/s of device time by length, on one H200,
# 2026-11-27, bf16, causal, torch 2.11, triton 3.6.0 (bench/results). Head size 256 was not measured.
HARDWARE = "one H200, 2026-11-27, triton 3.6.0"
MEASURED: dict[tuple[str, int], dict[str, tuple[int, int]]] = {
    ("forward", 128): {"8k": (671, 456), "2k": (505, 354), "512": (240, 194)},
    ("forward", 64): {"8k": (454, 348), "1k": (312, 211)},
    ("backward", 128): {"8k": (526, 320), "2k": (419, 260), "512": (241, 158)},
    ("backward", 64): {"8k": (462, 236), "1k": (232, 159)},
}
# The options under which that holds. Packed sequences: the forward was timed (516 TFLOP/s beside 344, 12 documents in
# 16k), but too few of its results were checked on hardware: add "packed" once they are.
MEASURED_OPTIONS = frozenset({"window"})
# The triton versions whose code of the hopper path ran on hardware; with others it was compiled only.
RAN_ON_HARDWARE = ("3.6.0",)


@dataclass(frozen=True)
class Call:
    """What the choice depends on. pass_: "forward" or "backward".  options: those of OPTIONS that the call uses."""

    pass_: str
    architecture: str  # "sm_90", "gfx942", or "cpu" for a plain CPU tensor
    head_dim: int
    dtype: torch.dtype
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    path: str
    why: str


def _obstacle(call: Call) -> str | None:
    """What keeps a call from the hopper path, or None."""
    if call.architecture != "sm_90":
        return "its wgmma and setmaxnreg are sm_90's alone"
    if call.dtype not in HOPPER_DTYPES:
        return "no wgmma multiplies in IEEE fp32"
    if call.head_dim not in HOPPER_HEADS[call.pass_]:
        return f"its {call.pass_} has tiles for head sizes {', '.join(map(str, HOPPER_HEADS[call.pass_]))}"
    if missing := call.options & NOT_IN_HOPPER[call.pass_]:
        return f"no {' and '.join(sorted(missing))} in its inner loop"
    return None


def _win(call: Call) -> str | None:
    """The measurement that makes the hopper path the default for a call that it serves, or None."""
    rates = MEASURED.get((call.pass_, call.head_dim))
    if rates is None or not call.options <= MEASURED_OPTIONS:
        return None
    rates_of = ", ".join(f"{hopper}/{portable} at {length}" for length, (hopper, portable) in rates.items())
    return f"measured to win: {rates_of} TFLOP/s beside portable, bf16, causal ({HARDWARE})"


_asked: str | None = None
_failed: dict[str, str] = {}  # by pass: why the hopper path cannot run here
_n_changes = 0  # of what failed, and of the user's table


def state() -> tuple[str | None, int]:
    """Another one whenever `choose` may answer otherwise than before."""
    return _asked, _n_changes


@contextmanager
def use(path: str | None) -> Iterator[None]:
    """Within the block every call on a GPU takes this path; None lifts an outer block's choice.

    For the whole process, since a backward pass runs on a thread of its own. Under use("hopper") a call that the path
    does not serve raises ValueError. Raises ValueError on another name.
    """
    global _asked
    if path is not None and path not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(PATHS)} or None, got {path!r}")
    before, _asked = _asked, path
    try:
        yield
    finally:
        _asked = before


def decide(call: Call, *, asked: str | None = None, measured: str | None = None, failed: str | None = None) -> Choice:
    """The rule. asked: by `use`.  measured: the path that a user's own table names for this call.  failed: why the
    hopper path cannot run on this machine.
    """
    if call.architecture == "cpu":
        if call.options - {"short"}:
            return Choice(
                "eager", "torch's scaled_dot_product_attention has no window, packing, softcap, sinks or ALiBi"
            )
        return Choice("sdpa", "torch's own, unless a log-sum-exp is asked for or causal lengths differ (then eager)")
    obstacle = _obstacle(call)
    if asked == "hopper" and obstacle:
        raise ValueError(f"use('hopper'): expected a call that path serves, but {obstacle}; got {call}")
    if asked:
        return Choice(asked, f"asked for by use({asked!r})")
    if obstacle:
        return Choice("portable", f"hopper does not serve it: {obstacle}")
    if failed:
        return Choice("portable", f"hopper failed on this machine: {failed}")
    if measured:
        return Choice(measured, "measured fastest on this GPU by `rooflight bench tune`")
    if won := _win(call):
        return Choice("hopper", won)
    return Choice("portable", "hopper serves it too, but was not measured there yet")


def give_up(pass_: str, error: Exception) -> None:
    """Called where the hopper path raised `error`: warn once, and take the portable path from then on.

    Raises the error itself where it says nothing of the path (out of memory), and under use("hopper").
    """
    if isinstance(error, torch.OutOfMemoryError) or _asked == "hopper":
        raise error
    why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    # without the module neither pass runs
    for name in ("forward", "backward") if isinstance(error, ImportError) else (pass_,):
        _failed[name] = why
    _decide_anew()
    warnings.warn(
        f"attention's hopper {pass_} cannot run here with triton {triton.__version__} ({why}); the portable kernels"
        " are used from now on",
        stacklevel=2,
    )


def step_back(why: str) -> None:
    """Called where these very tensors keep the hopper path from a call. Raises ValueError where `use` asked for it."""
    if _asked == "hopper":
        raise ValueError(f"use('hopper'): expected tensors that path serves, but {why}")


def forget() -> None:
    """Read the user's table anew at the next launch, and try again what failed."""
    _failed.clear()
    table_of.cache_clear()
    _decide_anew()


def _decide_anew() -> None:
    global _n_changes
    _n_changes += 1
    _decided.cache_clear()


@cache
def _decided(
    asked: str | None, pass_: str, head_dim: int, dtype: torch.dtype, device: torch.device, used: tuple[bool, ...]
) -> str:
    measured = table_of(device).paths.get((pass_, str(dtype).removeprefix("torch."), head_dim))
    options = frozenset(name for name, is_used in zip(OPTIONS, used, strict=True) if is_used)
    call = Call(pass_, architecture(), head_dim, dtype, options)
    return decide(call, asked=asked, measured=measured, failed=_failed.get(pass_)).path


def choose(pass_: str, q: Tensor, k: Tensor, used: tuple[bool, ...]) -> str:
    """The path of a call on a GPU, "hopper" or "portable"; the tensors themselves may still keep it from hopper.

    used: which of OPTIONS the call uses.  Raises ValueError where `use` asked for a path that does not serve the call.
    """
    if INTERPRETED or q.numel() == 0 or k.numel() == 0:
        return "portable"
    return _decided(_asked, pass_, q.shape[-1], q.dtype, q.device, used)


def table(target: str, device: torch.device | None = None) -> list[tuple[str, str, str, str, Choice]]:
    """Every choice on a GPU of this architecture: (passes, head sizes, dtypes, options, choice).

    Calls with the same choice share a row. device: a GPU whose user's table counts.
    Raises ValueError on an architecture that nothing is known of.
    """
    if target not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {target!r}")
    heads, dtypes = (64, 128, 256, 0), (torch.bfloat16, torch.float16, torch.float32)  # 0: any other
    options = [
        frozenset[str](),
        frozenset({"window"}),
        frozenset({"packed"}),
        frozenset({"softcap"}),
        frozenset({"sinks"}),
        frozenset({"alibi"}),
        frozenset({"short"}),
    ]
    measured = table_of(device).paths if device is not None else {}
    grouped: dict[Choice, list[Call]] = {}
    for pass_ in ("forward", "backward"):
        for head_dim in heads:
            for dtype in dtypes:
                key = (pass_, str(dtype).removeprefix("torch."), head_dim)
                for used in options:
                    call = Call(pass_, target, head_dim, dtype, used)
                    failed = _failed.get(pass_) if device is not None else None
                    choice = decide(call, measured=measured.get(key), failed=failed)
                    grouped.setdefault(choice, []).append(call)
    return [(*_described(calls), choice) for choice, calls in grouped.items()]


def _described(calls: list[Call]) -> tuple[str, str, str, str]:
    """The passes, head sizes, dtypes and options of calls that share a choice."""
    columns: tuple[list[str], ...] = ([], [], [], [])
    for call in calls:
        cells = (
            call.pass_,
            str(call.head_dim) if call.head_dim else "other",
            str(call.dtype).removeprefix("torch."),
            ", ".join(call.options) or "none",
        )
        for column, cell in zip(columns, cells, strict=True):
            if cell not in column:
                column.append(cell)
    return tuple(", ".join(column) for column in columns)  # type: ignore[return-value]
