"""`pytest --benchmark`: one training step of a small model, with its closed form beside the measurement."""

from __future__ import annotations

import pytest
import torch

from rooflight.bench.predict.benchmarks import CEILING_SECONDS, record
from rooflight.bench.predict.step import Step, count_flops
from rooflight.bench.rates.ceilings import ceilings_of
from rooflight.bench.rates.kernel_rates import ops_on
from rooflight.model import PRESETS, estimate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# GPT-2's shape on a GPU; on a CPU, the million parameters of the demo
PRESET, BATCH = ("gpt2-small", 16) if DEVICE.type == "cuda" else ("tiny", 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_step(benchmark, dtype: str) -> None:
    """Forward, backward and update; fails when the FLOPs torch counts are not those of the estimate."""
    config = PRESETS[PRESET]
    ceilings, ops = ceilings_of(DEVICE, dtype, CEILING_SECONDS), ops_on(DEVICE)[0]
    predicted = estimate(config, batch_size=BATCH, dtype=dtype, causal="full", ceilings=ceilings, ops=ops)
    assert (predicted.parameters, predicted.flops) == count_flops(config, BATCH)
    step = Step(config, BATCH, config.context_length, getattr(torch, dtype), DEVICE)
    peak = step.peak_bytes()
    assert predicted.seconds is not None
    moved = sum(component.bytes for component in predicted.components)
    benchmark.group = f"train step, {PRESET}, batch {BATCH} x {config.context_length}, {dtype}"
    benchmark(step)
    median = None if benchmark.stats is None else benchmark.stats.stats.median  # None under --benchmark-disable
    least = predicted.flops / ceilings.gemm_rate(dtype)
    benchmark.extra_info |= {"memory: predicted / measured": predicted.memory_bytes / peak}
    benchmark.extra_info |= record(predicted.flops, moved, predicted.seconds, least, median)
