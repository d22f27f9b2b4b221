from __future__ import annotations

import pytest
import torch

from rooflight.training.throughput import PeakMemory, measure_peak_flops, mfu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_a_rate_that_a_machine_can_have(dtype):
    """Above one multiply-add a cycle of the slowest core, below what any CPU core or GPU of today reaches."""
    assert 1e8 < measure_peak_flops("cpu", dtype, seconds=0.05) < 1e16


def test_peak_refuses_no_time():
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        measure_peak_flops(seconds=0)


def test_mfu():
    assert mfu(flops_per_step=3e9, step_seconds=0.5, peak_flops=12e9) == 0.5


def test_peak_memory_sees_what_is_allocated_and_freed(device):
    """256 MiB held for a moment: all of it in the peak, and little else (Linux counts pages per thread, in batches)."""
    torch.ones(1 << 20, device=device).sum().item()  # allocators and libraries at work
    memory = PeakMemory(device)
    before = memory.peak()
    held = torch.ones(64 << 20, device=device)
    del held
    assert 255 << 20 <= memory.peak() - before < 264 << 20
