"""Which path serves which call, and why: the one table that the launchers ask and `rooflight bench paths` prints.

portable: the Triton kernels of forward.py and backward.py; every call on every GPU, and under the interpreter.
hopper: the Gluon kernels of hopper_forward.py and hopper_backward.py; what OBSTACLES leaves over.
sdpa, eager: a plain CPU tensor runs torch's scaled_dot_product_attention where it has the semantics, else the oracle.

A path is the default only where it was measured to win. The hopper path was not measured yet, so `portable` is the
default everywhere, until a user's own measurement (`rooflight bench tune`) or `use("hopper")` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..dispatch import INTERPRETED
from .tuned import PATHS, architecture, table_of

__all__ = ["OPTIONS", "Call", "Choice", "choose", "decide", "forget", "table", "use"]

OPTIONS = ("window", "packed", "softcap", "sinks")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "cpu")
HOPPER_HEADS, HOPPER_DTYPES = (64, 128), (torch.bfloat16, torch.float16)


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


# What keeps a call from the hopper path, by what it depends on, in the order in which it is looked at.
OBSTACLES: dict[str, tuple[str, Callable[[Call], bool]]] = {
    "architecture": ("its wgmma and TMA are sm_90's alone", lambda call: call.architecture != "sm_90"),
    "dtype": ("no wgmma multiplies in IEEE fp32", lambda call: call.dtype not in HOPPER_DTYPES),
    "head size": ("compiled for head sizes 64 and 128", lambda call: call.head_dim not in HOPPER_HEADS),
    "options": ("softcap and sinks are not in its inner loop", lambda call: bool(call.options & {"softcap", "sinks"})),
}

_asked: str | None = None


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


def decide(call: Call, *, asked: str | None = None, measured: str | None = None) -> Choice:
    """The rule. asked: by `use`.  measured: the path that a user's own table names for this call."""
    if call.architecture == "cpu":
        if call.options:
            return Choice("eager", "torch's scaled_dot_product_attention has no window, packing, softcap or sinks")
        return Choice("sdpa", "torch's own, where causal lengths agree and no log-sum-exp is asked for; else eager")
    obstacle = next((why for why, stands in OBSTACLES.values() if stands(call)), None)
    if asked == "hopper" and obstacle:
        raise ValueError(f"use('hopper'): expected a call that path serves, but {obstacle}; got {call}")
    if asked:
        return Choice(asked, f"asked for by use({asked!r})")
    if obstacle:
        return Choice("portable", f"hopper does not serve it: {obstacle}")
    if measured:
        return Choice(measured, "measured fastest on this GPU by `rooflight bench tune`")
    return Choice("portable", "hopper serves it too, but was not measured yet")


@cache
def _decided(asked: str | None, pass_: str, head_dim: int, dtype: torch.dtype, device: torch.device, options: frozenset[str]) -> str:  # fmt: skip # noqa: E501
    measured = table_of(device).paths.get((pass_, str(dtype).removeprefix("torch."), head_dim))
    return decide(Call(pass_, architecture(), head_dim, dtype, options), asked=asked, measured=measured).path


def forget() -> None:
    """Read the user's table anew at the next launch."""
    table_of.cache_clear()
    _decided.cache_clear()


def choose(pass_: str, q: Tensor, *, window: bool, packed: bool, softcap: bool, sinks: bool) -> str:
    """The path of a call on a GPU: "hopper" or "portable"."""
    if INTERPRETED:
        return "portable"
    used = frozenset(name for name, is_used in zip(OPTIONS, (window, packed, softcap, sinks), strict=True) if is_used)
    return _decided(_asked, pass_, q.shape[-1], q.dtype, q.device, used)


def table(target: str, device: torch.device | None = None) -> list[tuple[str, str, str, str, Choice]]:
    """Every choice on a GPU of this architecture: (passes, head sizes, dtypes, options, choice).

    Calls with the same choice share a row. device: a GPU whose user's table counts.
    Raises ValueError on an architecture that nothing is known of.
    """
    if target not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {target!r}")
    heads, dtypes = (64, 128, 0), (torch.bfloat16, torch.float16, torch.float32)  # 0: any other
    options = [
        frozenset[str](),
        frozenset({"window"}),
        frozenset({"packed"}),
        frozenset({"softcap"}),
        frozenset({"sinks"}),
    ]
    measured = table_of(device).paths if device is not None else {}
    grouped: dict[Choice, list[Call]] = {}
    for pass_ in ("forward", "backward"):
        for head_dim in heads:
            for dtype in dtypes:
                key = (pass_, str(dtype).removeprefix("torch."), head_dim)
                for used in options:
                    call = Call(pass_, target, head_dim, dtype, used)
                    grouped.setdefault(decide(call, measured=measured.get(key)), []).append(call)
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
