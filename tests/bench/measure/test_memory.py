"""Peak memory is the most held at once, temporaries included, and nothing of what was there before."""

import pytest
import torch

from rooflight.bench.measure.memory import peak_bytes

CPU = torch.device("cpu")
N = 1 << 20  # elements; 4 bytes each
EXTRA = 4096  # bytes that torch may take for itself


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(N)


def test_what_is_freed_is_not_counted_twice(x: torch.Tensor):
    def call() -> None:
        for _ in range(3):
            (x + 1).exp()  # two tensors at once

    assert 8 * N <= peak_bytes(call, CPU) < 8 * N + EXTRA


def test_memory_inside_an_operator_counts(x: torch.Tensor):
    def call() -> None:
        x.sort()  # values and indices, and whatever the sort needs

    assert peak_bytes(call, CPU) >= 12 * N


def test_a_call_that_only_frees_has_no_peak():
    held = [torch.ones(N)]
    assert peak_bytes(held.clear, CPU) < EXTRA
