"""The host's part of a step on a GPU: the calls of the estimate's kernels, at what a call of each takes the host.

Eager, the device waits wherever the host is behind: the step takes the longer of the two. In a CUDA graph the host has
no part in it.
"""

from __future__ import annotations

from ...model.estimate import Estimate
from ...model.memory import in_low_precision
from ...model.parts import parts


def host_seconds(e: Estimate) -> float | None:
    """Seconds until the host has issued an eager step; None where its calls were not measured, as on a CPU."""
    if e.ceilings is None or not e.ceilings.host:
        return None
    copies, low = in_low_precision(e.dtype, e.ops, e.optimizer, e.gpus, e.parallel)
    rows = parts(
        e.config, e.batch_size, e.context_length, e.dtype,
        checkpointing=e.checkpointing, gpus=e.gpus, parallel=e.parallel, optimizer=e.optimizer,
        copies=copies, low_gradients=low, fp8=e.in_fp8.how if e.in_fp8 else "",
    )  # fmt: skip
    works = [work for row in rows for work in (*row.forward, *row.backward, *row.update)]
    # the softmax stands beside the products of the operation that computes it: one call, not two
    return sum(work.calls * e.ceilings.host.get(f"{work.kernel} {e.dtype}", 0.0) for work in works if work.work)


def eager_seconds(e: Estimate) -> float | None:
    """Seconds of an eager step: the kernels' or the host's, whichever is longer; None without ceilings."""
    return None if e.seconds is None else max(e.seconds, host_seconds(e) or 0.0)
