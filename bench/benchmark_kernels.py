"""`pytest --benchmark`: every kernel case, forward and backward, ours beside its peers."""

from __future__ import annotations

import pytest
import torch

from rooflight.bench.cases.kernels import Case, cases
from rooflight.bench.measure.harness import check, check_flops, running, task
from rooflight.bench.rates.ceilings import ceilings_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(DEVICE)
_checked: set[str] = set()


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.providers],
)
def test_kernel(benchmark, case: Case, provider: str, mode: str) -> None:
    """Fails when the result is wrong or the FLOPs are not those of the closed form, never because a machine is slow."""
    if case.name not in _checked:  # one check serves every provider and mode of a case
        check(case, DEVICE)
        check_flops(case, DEVICE)
        _checked.add(case.name)
    with running(case, provider):
        _time(benchmark, case, provider, mode)


def _time(benchmark, case: Case, provider: str, mode: str) -> None:
    call = task(case, case.providers[provider], mode, DEVICE)

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {mode}"
    benchmark(finished)
    work, dtype = case.work(mode == "backward"), str(case.dtype).removeprefix("torch.")
    ceilings = ceilings_of(DEVICE, dtype)
    predicted, bound_by = work.seconds(ceilings, dtype)
    benchmark.extra_info |= {
        "provider": provider,
        "flops": work.cost.flops,
        "bytes": work.cost.bytes,
        "bound by": bound_by,
        "predicted_seconds": predicted,  # of ours: the rate that the ceilings hold for this kernel
    }
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "TFLOP/s": work.cost.flops / median / 1e12,
            "GB/s": work.cost.bytes / median / 1e9,
            "share of ceiling": work.roof(ceilings, dtype)[0] / median,
            "predicted / measured": predicted / median,
        }
