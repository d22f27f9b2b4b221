"""flash_attention, forward and every gradient, against the oracle in fp64.

Tiles are 16 x 16 unless a test says otherwise, so that 40 rows make two whole tiles and a partial one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.kernels.attention import flash_attention
from support.attention import LAYOUTS, draw, draw_sinks, judge_attention, lay_out_grad, tile
from support.marks import on_cpu
from support.tolerance import gaussian

GROUPED = (1, 2, 1, 40, 40)  # B, H, K, T, S

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},  # narrower than a tile: no block is visible to every row
    "wide window": {"window": 33},  # a row of tiles has partial, whole and partial blocks
    "two-sided window": {"causal": False, "window": (20, 5)},
    "right window": {"causal": False, "window": (100, 3)},
}


@pytest.fixture(autouse=True)
def small_tiles():
    with tile(16, 16):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, *on_cpu(torch.float16), torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, dtype, device):
    judge_attention(draw(*GROUPED, 24, dtype, device), **MASKS[mask])


@pytest.mark.parametrize("blocks", [(16, 32), (32, 16), (64, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("mask", ["causal", *on_cpu("wide window", "two-sided window")])
def test_tiles_that_are_not_square(mask, blocks, device):
    with tile(*blocks):
        judge_attention(draw(1, 1, 1, 70, 70, 16, torch.float32, device), **MASKS[mask])


# One query (decoding), one key, fewer queries than keys and the other way, a shift that is no multiple of the tile
@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (17, 33), (33, 17), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("mask", ["causal", *on_cpu("two-sided window")])
def test_lengths_align_at_the_bottom_right(mask, lengths, device):
    judge_attention(draw(1, 2, 1, *lengths, 16, torch.bfloat16, device), **MASKS[mask])


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (3, 1), (4, 2), (6, 2)], ids=str)
def test_each_query_head_reads_its_own_key_value_head(heads, device):
    judge_attention(draw(1, *heads, 17, 17, 16, torch.float16, device))


# Below, at, above and between powers of two, and odd; 512 is the largest
@pytest.mark.parametrize("head_dim", [1, *on_cpu(8), 16, 40, 64, 80, *on_cpu(96), 111, 128, 256, 512])
def test_head_sizes(head_dim, device):
    judge_attention(draw(1, 2, 1, 20, 20, head_dim, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 0.7, 50.0])  # none, saturated, the linear part
def test_softcap_and_sinks(softcap, sinks, dtype, device):
    inputs = draw(1, 2, 1, 40, 33, 24, dtype, device)  # with rows that see no key
    if sinks:
        inputs["sinks"] = draw_sinks(2, dtype, device)
    judge_attention(inputs, softcap=softcap, window=20)


def test_sinks_in_fp32_beside_bf16_inputs(device):
    inputs = draw(1, 2, 1, 24, 24, 16, torch.bfloat16, device)
    judge_attention(inputs | {"sinks": draw_sinks(4, torch.float32, device)[::2]})


def test_a_sink_of_minus_infinity_is_no_sink(device):
    inputs = draw(1, 2, 1, 24, 20, 16, torch.float32, device)
    inputs["q"].requires_grad_()
    without = flash_attention(**inputs, return_lse=True)
    sinks = torch.full((2,), -torch.inf, device=device, requires_grad=True)
    out, lse = flash_attention(**inputs, sinks=sinks, return_lse=True)
    torch.testing.assert_close((out, lse), without, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert sinks.grad.tolist() == [0, 0]
    assert inputs["q"].grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_scale(scale, device):
    judge_attention(draw(*GROUPED, 16, torch.float32, device), scale=scale)


def test_scores_far_beyond_the_exponents_range(device):
    inputs = draw(*GROUPED, 16, torch.bfloat16, device)  # in fp32 the log-sum-exp itself would round by 1e-4
    inputs["q"] *= 1e3
    judge_attention(inputs)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_length_zero(causal, sinks, lengths, device):
    inputs = draw(2, 2, 1, *lengths, 16, torch.float32, device)
    if sinks:
        inputs["sinks"] = draw_sinks(2, torch.float32, device)
    judge_attention(inputs, causal=causal)


def test_empty_batch(device):
    judge_attention(draw(0, 2, 1, 5, 5, 16, torch.float32, device) | {"sinks": draw_sinks(2, torch.float32, device)})


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_that_sees_no_key_gives_zeros(sinks, device):
    inputs = draw(1, 2, 1, 40, 7, 16, torch.bfloat16, device)  # the first 33 queries stand before every key
    if sinks:
        inputs["sinks"] = draw_sinks(2, torch.float32, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = flash_attention(**inputs, return_lse=True)
    assert (out[:, :, :33] == 0).all()
    expected = inputs["sinks"][None, :, None] if sinks else torch.tensor(-torch.inf, device=device)
    assert torch.equal(lse[:, :, :33], expected.expand(1, 2, 33))
    dq, *others = torch.autograd.grad(out.sum() + out.square().sum(), leaves)
    assert (dq[:, :, :33] == 0).all()
    assert all(x.isfinite().all() for x in (dq, *others))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(layout, device):
    inputs = draw(2, 2, 2, 20, 20, 24, torch.bfloat16, device)
    with tile(32, 32):
        judge_attention({name: LAYOUTS[layout](x) for name, x in inputs.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_output_layouts(layout, device):
    with tile(32, 32):
        judge_attention(draw(2, 2, 1, 20, 20, 16, torch.float32, device), grad=lay_out_grad(layout))


def test_output_and_gradients_keep_the_input_layout(device):
    inputs = {name: LAYOUTS["(B, T, H, D)"](x) for name, x in draw(2, 2, 2, 20, 20, 16, torch.float32, device).items()}
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = flash_attention(**inputs)
    assert out.stride() == inputs["q"].stride()
    assert all(g.stride() == x.stride() for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True))


@pytest.mark.parametrize("used", ["out", "lse"])
def test_the_gradient_of_one_output_alone(used, device):
    def grad(output: Tensor, generator: torch.Generator) -> Tensor:
        is_used = (output.dim() == 4) == (used == "out")
        return gaussian(output, generator) if is_used else torch.zeros_like(output)

    inputs = draw(*GROUPED, 16, torch.float32, device) | {"sinks": draw_sinks(2, torch.float32, device)}
    judge_attention(inputs, grad=grad)
    # and left out of the graph, not merely zero
    leaves = [x.requires_grad_() for x in inputs.values()]
    outputs = flash_attention(**inputs, return_lse=True)
    index = ("out", "lse").index(used)
    alone = torch.autograd.grad(outputs[index].sum(), leaves, retain_graph=True)
    both = torch.autograd.grad(outputs[index].sum() + 0 * outputs[1 - index].sum(), leaves)
    torch.testing.assert_close(alone, both)


def test_the_backward_gives_the_same_bits_every_time(device):
    repeats = 100 if device.type == "cuda" else 3
    sizes = (2, 4, 2, 500, 500, 111) if device.type == "cuda" else (1, 4, 2, 20, 20, 24)
    inputs = draw(*sizes, torch.float16, device) | {"sinks": draw_sinks(4, torch.float32, device)}
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = flash_attention(**inputs, return_lse=True)
    grads = gaussian(out, torch.Generator().manual_seed(1)), gaussian(lse, torch.Generator().manual_seed(2))
    first = torch.autograd.grad((out, lse), leaves, grads, retain_graph=True)
    for _ in range(repeats - 1):
        again = torch.autograd.grad((out, lse), leaves, grads, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_backward_of_fp32_recomputes_rows_that_sum_to_one(device):
    """Each query's p, summed over the keys by way of dv: a log-sum-exp of 30, rounded, alone would shift it by 1e-6."""
    B, H = (2, 32) if device.type == "cuda" else (1, 16)  # of 16 rows half are 4e-7 off without the correction
    inputs = draw(B, H, H, 1, 64, 64, torch.float32, device)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out = flash_attention(q, k, v, scale=1.0)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    sums = dv.double().sum(2)
    assert (sums - 1).abs().max() < 4e-7
