"""The most memory that a call holds at once, as torch's allocators hand it out."""

from __future__ import annotations

import os

import torch

from .clock import Call

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on standard error otherwise


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes beyond those held before the call, at the worst moment of it.

    On a GPU the caching allocator's own maximum; on a CPU the running sum of every allocation and release that the
    profiler records, temporaries inside an operator included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    # acc_events: there is one cycle to keep, and without it torch 2.11 warns that a cycle's events go
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak
