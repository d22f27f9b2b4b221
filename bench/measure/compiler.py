"""torch.compile held to its word: a peer that it leaves to eager PyTorch is no measurement of a compiler.

On its own torch.compile runs a function eagerly, with no more than a warning, once the function was compiled for as
many shapes as its limit allows, and what follows a graph break likewise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# What a library says that does something else than it was asked for: FlexAttention, the compiler, our own paths.
FALLBACK = r"(?s).*\b(eager|eagerly|unfused|fallback|falling back|falls back|used from now on)\b"


class NotCompiled(RuntimeError):  # noqa: N818 - it is a verdict
    """A part of the call ran outside the compiled code."""


@contextmanager
def no_fallback() -> Iterator[None]:
    """Within the block a warning that speaks of a fallback is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", FALLBACK)
        yield


@contextmanager
def compiled() -> Iterator[None]:
    """Within the block nothing is compiled yet, and whatever does not compile raises.

    The limit on recompilations raises at once; a graph break, and that nothing was compiled, raise NotCompiled at the
    end of the block.
    """
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield
    if counters["graph_break"]:
        reason = next(iter(counters["graph_break"])).splitlines()[0]
        raise NotCompiled(f"a graph break: {reason}")
    # torch 2.11 counts no frames where fullgraph is asked for, but graphs
    if not counters["frames"]["ok"] and not counters["stats"]["unique_graphs"]:
        raise NotCompiled("nothing was compiled")
