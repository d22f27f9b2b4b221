"""`pytest --benchmark`: one training step of a small model, with its closed form beside the measurement."""

from __future__ import annotations

import pytest
import torch

from rooflight.bench.ceilings import ceilings_of
from rooflight.bench.step import count_flops
from rooflight.model import PRESETS, Transformer, estimate
from rooflight.training.optim import build_optimizers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# GPT-2's shape on a GPU; on a CPU, the million parameters of the demo
PRESET, BATCH = ("gpt2-small", 16) if DEVICE.type == "cuda" else ("tiny", 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_step(benchmark, dtype: str) -> None:
    """Forward, backward and update; fails when the FLOPs torch counts are not those of the estimate."""
    config = PRESETS[PRESET]
    with torch.device(DEVICE):
        model = Transformer(config)
        tokens = torch.randint(config.vocab_size, (BATCH, config.context_length + 1))
    optimizers = build_optimizers(model, optimizer="adamw", lr=1e-3)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(inputs, targets=targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    predicted = estimate(config, batch_size=BATCH, dtype=dtype, causal="full", ceilings=ceilings_of(DEVICE, dtype))
    assert (predicted.parameters, predicted.flops) == count_flops(config, BATCH)
    benchmark.group = f"train step, {PRESET}, batch {BATCH} x {config.context_length}"
    benchmark(step)
    benchmark.extra_info |= {"flops": predicted.flops, "predicted_seconds": predicted.seconds}
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["TFLOP/s"] = predicted.flops / median / 1e12
        benchmark.extra_info["predicted / measured"] = predicted.seconds / median
