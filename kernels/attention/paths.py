"""Which path serves which call, and why: the one table that the launchers ask and `rooflight bench paths` prints.

portable: the Triton kernels of portable/; every call on every GPU, and under the interpreter.
hopper: the Gluon kernels of hopper/; what `_obstacle` leaves to them.
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
HOPPER_HEADS = {"forward": (64, 128, 256), "backward": (64, 128)}
HOPPER_DTYPES = (torch.bfloat16, torch.float16)
NOT_IN_HOPPER = {"forward": {"softcap", "sinks"}, "backward": {"softcap"}}  # a sink is in the log-sum-exp by then


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
    obstacle = _obstacle(call)
    if asked == "hopper" and obstacle:
        raise ValueError(f"use('hopper'): expected a call that path serves, but {obstacle}; got {call}")
    if asked:
        return Choice(asked, f"asked for by use({asked!r})")
    if obstacle:
        return Choice("portable", f"hopper does not serve it: {obstacle}")
    if measured:
        return Choice(measured, "measured fastest on this GPU by `rooflight bench tune`")
    return Choice("portable", "hopper serves it too, but was not measured yet")


def forget() -> None:
    """Read the user's table anew at the next launch."""
    table_of.cache_clear()
    _decided.cache_clear()


@cache
def _decided(
    asked: str | None, pass_: str, head_dim: int, dtype: torch.dtype, device: torch.device, used: tuple[bool, ...]
) -> str:
    measured = table_of(device).paths.get((pass_, str(dtype).removeprefix("torch."), head_dim))
    options = frozenset(name for name, is_used in zip(OPTIONS, used, strict=True) if is_used)
    return decide(Call(pass_, architecture(), head_dim, dtype, options), asked=asked, measured=measured).path


def choose(
    pass_: str,
    q: Tensor,
    k: Tensor,
    obstacle: Callable[[], str | None],
    *,
    window: bool,
    packed: bool,
    softcap: bool,
    sinks: bool,
) -> str:
    """The path of a call on a GPU: "hopper" or "portable".

    obstacle: what in these very tensors (alignment, strides) keeps the hopper path from them, or None; asked last.
    Raises ValueError where `use` asked for a path that does not serve the call.
    """
    if INTERPRETED or q.numel() == 0 or k.numel() == 0:
        return "portable"
    path = _decided(_asked, pass_, q.shape[-1], q.dtype, q.device, (window, packed, softcap, sinks))
    if path == "hopper" and (why := obstacle()):
        if _asked == "hopper":
            raise ValueError(f"use('hopper'): expected tensors that path serves, but {why}")
        return "portable"
    return path


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
