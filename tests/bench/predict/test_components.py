"""What is measured as a component is that component: its products are the estimate's, to the last FLOP."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rooflight.bench.predict import components
from rooflight.bench.predict.components import Bench, measure_components
from rooflight.bench.predict.validate import JOINED
from rooflight.model import ModelConfig, estimate

CPU = torch.device("cpu")
# grouped heads, a head size of its own, q/k norms, an odd number of layers
SWIGLU = ModelConfig(61, 32, 3, 6, n_kv_head=2, d_model=40, d_ff=56, head_dim=10, qk_norm=True)
GELU = replace(SWIGLU, ffn="gelu", tie_embeddings=True, window=9)
B, T = 2, 24


EVEN = replace(SWIGLU, d_model=48, head_dim=8, rope_dim=8)  # `up` and the attention's can be in fp8, `down` not


@pytest.mark.parametrize(
    ("config", "fp8"), [(SWIGLU, False), (GELU, False), (EVEN, True)], ids=["swiglu", "gelu", "fp8"]
)
def test_every_component_does_the_estimates_products(config: ModelConfig, fp8: bool):
    e = estimate(config, batch_size=B, context_length=T, causal="full", fp8=fp8)
    counted: dict[tuple[str, str], int] = defaultdict(int)
    with torch.device("cpu"):
        for tasks in Bench(config, B, T, torch.float32, CPU, fp8=fp8).tasks():
            for task in tasks:
                with FlopCounterMode(display=False) as counter:
                    task.call()
                counted[task.component, task.pass_] += task.times * counter.get_total_flops()
    for component in e.components:
        if component.name in ("casts", *JOINED):
            continue
        passes = component.forward, component.backward, component.update
        for name, work in zip(("forward", "backward", "update"), passes, strict=True):
            assert counted[component.name, name] == work.flops, (component.name, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_of_the_estimate_is_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []

    def medians(calls, device, seconds):
        return [(call(), 2.0)[1] for call in calls]

    monkeypatch.setattr(components, "median_seconds", medians)
    measured = measure_components(SWIGLU, B, T, dtype, CPU, progress=told.append)
    e = estimate(SWIGLU, batch_size=B, dtype=str(dtype).removeprefix("torch."), ops="cpu")
    assert list(measured) == told == [c.name for c in e.components if c.name not in JOINED]
    # every call took 2 s: as many as the step has of them
    L = SWIGLU.n_layer
    assert measured["QKV"].forward == measured["QKV"].backward == 2 * L
    assert measured["norms"].forward == 2 * (L + 1)  # the first norm stands alone: it sums nothing
    assert (measured["residual sums"].forward, measured["residual sums"].backward) == (0, 2)
    assert measured["logits"].seconds == 4
    assert (measured["AdamW"].forward, measured["AdamW"].update) == (0, 2)


def test_inputs_rotate_until_they_outgrow_the_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(components.COLD_BYTES, "cpu", 2 * B * T * SWIGLU.d_model * 4)
    made = []

    def make_call(make):
        made.append(make(B, T, SWIGLU.d_model))
        x, turn = made[-1], len(made)
        return lambda: x * turn

    bench = Bench(SWIGLU, B, T, torch.float32, CPU)
    forward, _ = bench._layers("some", SWIGLU.d_model, make_call)
    assert len(made) == 2
    assert [(forward.call() / made[i % 2]).unique().tolist() for i in range(4)] == [[1.0], [2.0], [1.0], [2.0]]
