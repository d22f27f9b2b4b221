"""Products in fp8 in the estimate: the oracle's FLOPs, a machine whose rates make every term a round number, words."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import reference
from rooflight.model import PRESETS, Ceilings, ModelConfig, Transformer, estimate
from rooflight.model.estimate import Component, largest_batch
from rooflight.model.layers import use_fp8

XL = PRESETS["gpt2-xl"]
CONFIG = ModelConfig(64, 64, 3, 6, n_kv_head=2, d_model=48, d_ff=64, head_dim=8, window=9, qk_norm=True)
FAST = Ceilings({"bfloat16": 1e9, "float32": 5e8}, 1e15)  # products are the bound
SLOW = replace(FAST, copy_bandwidth=1e3)  # memory is


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("d_ff", [64, 56])
def test_the_products_are_those_that_torch_counts(d_ff: int, checkpointing: bool) -> None:
    """Forward and backward; checkpointing runs those of the blocks once more, in fp8 the last one too."""
    config = replace(CONFIG, d_ff=d_ff)  # of 56 columns `down` is left out
    with torch.device("meta"):
        model = Transformer(config, reference, checkpointing=checkpointing)
        tokens = torch.zeros(2, 64, dtype=torch.int64)
    _, left = use_fp8(model.layers, reference.fp8_linear)
    assert len(left) == (d_ff == 56)
    counted = []
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, tokens)
    counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    counted.append(counter.get_total_flops())
    e = estimate(config, batch_size=2, causal="full", checkpointing=checkpointing, fp8=True)
    again = 0
    if checkpointing:
        executed = [c.backward.executed_flops for c in e.components if c.name in ("QKV", "output projection", "FFN")]
        plain = [c.backward.full_flops for c in e.components if c.name in ("QKV", "output projection", "FFN")]
        again = sum(executed) - sum(plain)
        # the oracle's attention computes every pair
        again += next(c for c in e.components if c.name.startswith("scores")).forward.full_flops
    assert [e.forward_flops, e.backward_flops + again] == counted
    assert e.ledgers["full"] == estimate(config, batch_size=2, causal="full").ledgers["full"]
    taken = sum(m.weight.numel() for m in model.modules() if getattr(m, "fp8", None))
    assert e.in_fp8 is not None
    assert e.in_fp8.flops == 6 * tokens.numel() * taken


def component(name: str, ceilings: Ceilings | None, **options) -> Component:
    e = estimate(CONFIG, batch_size=2, ceilings=ceilings, fp8=True, **options)
    return next(c for c in e.components if c.name == name)


def test_a_product_takes_its_share_of_the_fp8_peak() -> None:
    flops = 3 * 2 * 128 * 48 * 48
    assert component("output projection", FAST).seconds == pytest.approx(3 * flops / 2e9)  # not measured: twice
    measured = replace(FAST, fp8_flops={"forward": 4e9, "backward": 3e9})
    assert component("output projection", measured).seconds == pytest.approx(flops / 4e9 + 2 * flops / 3e9)
    # a product of these sizes has half of bfloat16's peak, forward, and a quarter, backward
    rates = {"gemm bfloat16": {(128, 48, 48): 5e8}, "gemm backward bfloat16": {(128, 48, 48): 2.5e8}}
    shares = replace(measured, kernels=rates)
    assert component("output projection", shares).seconds == pytest.approx(flops / 2e9 + 2 * flops / 0.75e9)
    # fp32's products, by a rate of their own, say nothing of fp8's
    assert component("output projection", measured, dtype="float32").seconds == pytest.approx(
        component("output projection", measured).seconds
    )


def test_a_cpus_products_are_fp32s() -> None:
    flops = 3 * 2 * 128 * 48 * 48
    imitated = component("output projection", replace(FAST, fp8_flops={"forward": 4e9}), ops="cpu")
    assert imitated.seconds == pytest.approx(3 * flops / 5e8)
    # what its operators cast is the time of a slow memory, with the products' own rates too
    x, w = 128 * 48, 48 * 48
    casts = (2 * x) * (3 * 2 + 6 + 12 + 1) + w * (3 * 4 + 12 + 1)
    to_fp32, scaled = 5 * (2 * (x + w) + 2 * x), (8 + 6) * 2 * x + 8 * w
    rates = {f"gemm{suffix} float32": {(128, 48, 48): 1e15} for suffix in ("", " backward")}
    slow = component("output projection", replace(SLOW, kernels=rates), ops="cpu")
    assert slow.seconds == pytest.approx(3 * (casts + to_fp32 + scaled) / 1e3)


def test_the_casts_of_gpt2_xl() -> None:
    """2 + 2 + 1 + 1 bytes an element of inputs, gradients and weights, as in bench/NOTES.md; each has a rate of its
    own where that was measured."""
    e = estimate(XL, batch_size=16, fp8=True, ceilings=Ceilings({"bfloat16": 763e12}, 3.87e12))
    elements = 48 * (16384 * (11200 + 14400) + 30_720_000)
    assert e.in_fp8 is not None
    assert e.in_fp8.flops == 6 * 16384 * 48 * 30_720_000
    assert e.in_fp8.cast_bytes == 6 * elements
    assert e.in_fp8.cast_seconds == pytest.approx(6 * elements / 3.87e12)
    assert e.in_fp8.product_seconds == pytest.approx(e.in_fp8.flops / 1526e12)
    own = Ceilings({"bfloat16": 763e12}, 3.87e12, kernels={"fp8_cast bfloat16": {(1,): 1e12}})
    timed = estimate(XL, batch_size=16, fp8=True, ceilings=own)
    assert timed.in_fp8 is not None
    assert timed.in_fp8.cast_seconds == pytest.approx(elements / 1e12)


def test_the_table_and_json_tell_it() -> None:
    def told(ceilings: Ceilings | None, **options) -> str:
        e = estimate(XL, batch_size=16, fp8=True, ceilings=ceilings, **options)
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(e.table())
        assert json.loads(json.dumps(e.to_dict()))["in_fp8"]["flops"] == 6 * 16384 * 48 * 30_720_000
        return console.export_text()

    assert "in fp8: products of 145 TFLOP (90%); casts of 130 GB" in told(None)
    unmeasured = told(FAST)
    assert "fp8's rate is not measured on this machine: 2.00 GFLOP/s is 2 times bfloat16's" in unmeasured
    measured = told(replace(FAST, fp8_flops={"forward": 4e9, "backward": 3e9}))
    assert "fp8's rate, measured: forward 4.00 GFLOP/s, backward 3.00 GFLOP/s" in measured
    assert "a CPU imitates them: products in fp32" in told(FAST, ops="cpu")
    assert "fp8" not in "".join(estimate(XL, batch_size=16).summary())


def test_the_largest_batch_is_fp8s() -> None:
    limit = 141 * 10**9
    n = largest_batch(XL, limit, fp8=True)
    sizes = [estimate(XL, batch_size=b, fp8=True).memory_bytes for b in (n, n + 1)]
    assert sizes[0] <= limit < sizes[1]
    assert n > largest_batch(XL, limit)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (XL, {"gpus": 2}, "fp8: expected False over several gpus, of which training has none in fp8, got 2 gpus"),
        (XL, {"context_length": 17}, "fp8: expected a multiple of 16 tokens, got 17"),
        (
            ModelConfig(64, 16, 1, 2, d_model=40, d_ff=56), {},
            "fp8: expected a matrix whose sides are multiples of 16, got 120 x 40, 40 x 40, 112 x 40, 40 x 56",
        ),
    ],
)  # fmt: skip
def test_what_no_run_could_be_is_refused(config: ModelConfig, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(config, batch_size=1, fp8=True, **options)


def test_what_it_keeps_of_a_ceilings_file() -> None:
    c = replace(FAST, fp8_flops={"forward": 4e9, "backward": 3e9})
    assert Ceilings.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    with pytest.raises(ValueError, match=r"fp8_flops\['forward'\]: expected a finite rate > 0, got -1"):
        replace(FAST, fp8_flops={"forward": -1})
