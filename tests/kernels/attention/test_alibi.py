"""ALiBi: the slopes themselves, and attention biased by them against the oracle in fp64 and against a plain mask.

Tiles are 16 x 16, so that 24 rows make a whole tile and a partial one.
"""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels import alibi_slopes, flash_attention, flash_attention_varlen
from rooflight.kernels.attention import FlashAttentionFunction
from support.attention import draw, draw_packed, draw_sinks, draw_slopes, judge_attention, tile
from support.marks import on_cpu


@pytest.fixture(autouse=True)
def small_tiles():
    with tile(16, 16):
        yield


@pytest.mark.cpu
@pytest.mark.parametrize("n_head", [1, 2, 8, 64])
def test_slopes_of_a_power_of_two_are_a_geometric_sequence(n_head):
    slopes = alibi_slopes(n_head)
    assert (slopes.dtype, slopes.shape) == (torch.float32, (n_head,))
    expected = torch.tensor([2.0 ** (-8 * (i + 1) / n_head) for i in range(n_head)])
    torch.testing.assert_close(slopes, expected, rtol=0, atol=0)


@pytest.mark.cpu
def test_slopes_of_another_number_of_heads_fill_up_from_twice_the_power_below():
    """12 heads: those of 8, then the first 4 of every other one of 16."""
    assert torch.equal(alibi_slopes(12), torch.cat((alibi_slopes(8), alibi_slopes(16)[::2][:4])))


@pytest.mark.cpu
@pytest.mark.parametrize("n_head", [0, 2.0, True, None])
def test_no_number_of_heads_is_refused(n_head):
    with pytest.raises(ValueError, match=r"^n_head: expected a"):
        alibi_slopes(n_head)


MASKS = {"causal": {}, "full": {"causal": False}, "window": {"causal": False, "window": (9, 5), "softcap": 2.0}}


# fewer and more keys than queries, a decoding step
@pytest.mark.parametrize("lengths", [(24, 24), *on_cpu((1, 33), (20, 17)), (17, 40)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_against_the_oracle(mask, lengths, device):
    """Grouped queries, whose heads have slopes of their own."""
    inputs = draw(1, 2, 1, *lengths, 16, torch.float32, device)
    judge_attention(inputs | {"alibi_slopes": alibi_slopes(2, device=device)}, **MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slopes_by_sequence_of_any_strides_beside_sinks(dtype, device):
    inputs = draw(2, 2, 1, 17, 20, 24, dtype, device) | {"sinks": draw_sinks(2, torch.float32, device)}
    inputs |= {"alibi_slopes": draw_slopes(2, 2, device=device).T}
    judge_attention(inputs, frozen=("sinks",))


@pytest.mark.parametrize("by_sequence", [False, True])
def test_packed_sequences(by_sequence, device):
    """Distances are within each sequence."""
    packed = draw_packed([3, 0, 17, 2], [3, 5, 20, 0], 2, 2, 16, torch.float32, device)
    slopes = draw_slopes(4, 2, device=device)
    judge_attention(packed | {"alibi_slopes": slopes if by_sequence else slopes[0]}, varlen=True)


@pytest.mark.parametrize("options", [{}, {"causal": False, "softcap": 3.0}], ids=str)
def test_the_sign_and_the_place_of_the_bias(options, device):
    """Written out, since kernel and oracle might be wrong alike."""
    q, k, v = draw(1, 2, 2, 5, 7, 8, torch.float32, device).values()
    z = q @ k.mT / 8**0.5
    z = 3 * torch.tanh(z / 3) if "softcap" in options else z
    for h, slope in enumerate((0.5, 0.25)):
        for i in range(5):
            for j in range(7):
                z[0, h, i, j] -= slope * abs(i + 2 - j)
                if not options and j > i + 2:
                    z[0, h, i, j] = -torch.inf
    slopes = torch.tensor([0.5, 0.25], device=device)
    out = flash_attention(q, k, v, alibi_slopes=slopes, **options)
    torch.testing.assert_close(out, z.softmax(-1) @ v)
    masked = flash_attention(q, k, v, alibi_slopes=slopes, mask=torch.ones_like(z, dtype=torch.bool), **options)
    torch.testing.assert_close(masked, out)


def test_gradcheck(device):
    if device.type != "cpu":
        pytest.skip("fp64 is for the interpreter")
    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 7, 18, 3, torch.float64).values()]
    slopes = alibi_slopes(2)

    def op(q, k, v):
        return flash_attention(q, k, v, alibi_slopes=slopes, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


def test_compile_without_a_graph_break(device):
    torch._dynamo.reset()

    def loss(q, k, v, slopes):
        return flash_attention(q * 1.5, k, v, alibi_slopes=slopes).square().sum()

    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 20, 24, 16, torch.float32, device).values()]
    slopes = alibi_slopes(2, device=device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [(x, *torch.autograd.grad(x, leaves)) for x in (f(*leaves, slopes) for f in (compiled, loss))]
    torch.testing.assert_close(*results)


def test_the_function_itself(device):
    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 20, 20, 16, torch.float32, device).values()]
    slopes = alibi_slopes(2, device=device)
    out, _ = FlashAttentionFunction.apply(*leaves, None, None, None, 20, 20, None, 0, 0.25, 0.0, slopes)
    expected = flash_attention(*leaves, alibi_slopes=slopes)
    assert torch.equal(out, expected)
    found, wanted = (torch.autograd.grad(x.sum(), leaves) for x in (out, expected))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


REFUSED = {
    "shape": (torch.zeros(3), r"float32 of shape \(2,\) or \(1, 2\), got torch.float32\(3,\)"),
    "batch": (torch.zeros(2, 2), r"got torch.float32\(2, 2\)"),
    "dtype": (torch.zeros(2, dtype=torch.float16), r"float32 .*, got torch.float16\(2,\)"),
    "gradient": (torch.zeros(2, requires_grad=True), "a tensor that requires no gradient"),
    "device": (torch.zeros(2, device="meta"), "device cpu, as q, got meta"),
    "number": (0.5, "a tensor, got float 0.5"),
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", REFUSED)
def test_other_slopes_are_refused_by_name(case):
    slopes, message = REFUSED[case]
    q, packed = torch.zeros(1, 2, 4, 8), torch.zeros(4, 2, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    for _ in range(2):  # a call of this kind that passed before lets no other pass
        with pytest.raises(ValueError, match=f"^alibi_slopes: expected {message}" if case != "batch" else message):
            flash_attention(q, q, q, alibi_slopes=slopes)
        flash_attention(q, q, q, alibi_slopes=torch.zeros(2))
    with pytest.raises(ValueError, match=r"^alibi_slopes: expected"):
        flash_attention_varlen(packed, packed, packed, ends, ends, 4, 4, alibi_slopes=slopes)
