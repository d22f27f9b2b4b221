"""`pytest --benchmark`: every kernel case, forward and backward, ours beside its peers."""

from __future__ import annotations

import pytest
import torch

from rooflight.bench.cases.kernels import Case, cases
from rooflight.bench.measure.harness import check, check_flops, running, task
from rooflight.bench.predict.benchmarks import CEILING_SECONDS, record
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
    ceilings = ceilings_of(DEVICE, dtype, CEILING_SECONDS)
    predicted, bound_by = work.seconds(ceilings, dtype)  # of ours: the rate that the ceilings hold for this kernel
    median = None if benchmark.stats is None else benchmark.stats.stats.median  # None under --benchmark-disable
    benchmark.extra_info |= {"provider": provider, "bound by": bound_by}
    benchmark.extra_info |= record(work.cost.flops, work.cost.bytes, predicted, work.roof(ceilings, dtype)[0], median)
