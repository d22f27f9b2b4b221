"""flash_attention_varlen: against the oracle, and bit for bit against the dense batch."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels.attention import flash_attention, flash_attention_varlen
from support.attention import draw_packed, draw_sinks, judge_attention, tile
from support.marks import on_cpu


@pytest.fixture(autouse=True)
def small_tiles():
    with tile(16, 16):
        yield


# Ragged, with empty sequences on either side, first, last and in the middle
RAGGED = ([17, 0, 40, 3, 0], [17, 5, 40, 0, 0])
LONGER_KEYS = ([1, 1, 20, 7], [33, 1, 47, 64])  # decoding and chunked prefill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 9}, *on_cpu({"causal": False}, {"softcap": 2.0})], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, LONGER_KEYS], ids=["ragged", "longer keys"])
def test_against_the_oracle(lengths, options, dtype, device):
    packed = draw_packed(*lengths, 2, 1, 24, dtype, device)
    judge_attention(packed | {"sinks": draw_sinks(2, dtype, device)}, varlen=True, **options)


def test_without_sinks_empty_sequences_give_zeros(device):
    judge_attention(draw_packed(*RAGGED, 4, 2, 16, torch.float16, device), varlen=True)


@pytest.mark.parametrize("lengths", [([0], [0]), ([0, 0], [3, 4]), ([3, 4], [0, 0])], ids=str)
def test_nothing_to_attend(lengths, device):
    judge_attention(draw_packed(*lengths, 2, 1, 16, torch.float32, device), varlen=True)


def test_no_sequence(device):
    packed = draw_packed([], [], 2, 1, 16, torch.float32, device)
    leaves = [packed[name].requires_grad_() for name in "qkv"]
    out, lse = flash_attention_varlen(**packed, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 2, 16), (2, 0))
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [(0, 2, 16), (0, 1, 16), (0, 1, 16)]


def test_equals_the_dense_batch_bit_for_bit(device):
    """The same tiles in the same order, whatever stands before them in memory."""
    lengths_q, lengths_k = [20, 33], [40, 33]
    packed = draw_packed(lengths_q, lengths_k, 4, 2, 16, torch.bfloat16, device)
    leaves = [packed[name].requires_grad_() for name in "qkv"]
    out, lse = flash_attention_varlen(**packed, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for (q0, q1), (k0, k1) in zip([(0, 20), (20, 53)], [(0, 40), (40, 73)], strict=True):
        spans = [slice(q0, q1), slice(k0, k1), slice(k0, k1)]
        alone = [x.detach()[s].transpose(0, 1)[None].requires_grad_() for x, s in zip(leaves, spans, strict=True)]
        one, one_lse = flash_attention(*alone, return_lse=True)
        assert torch.equal(one[0].transpose(0, 1), out[q0:q1])
        assert torch.equal(one_lse[0], lse[:, q0:q1])
        given = dout[q0:q1].transpose(0, 1)[None], dlse[None, :, q0:q1]
        for g, whole, s in zip(torch.autograd.grad((one, one_lse), alone, given), grads, spans, strict=True):
            assert torch.equal(g[0].transpose(0, 1), whole[s])


def test_a_longer_max_seqlen_changes_nothing(device):
    packed = draw_packed([20, 5], [20, 5], 2, 1, 16, torch.float32, device)
    out = flash_attention_varlen(**packed)
    assert torch.equal(out, flash_attention_varlen(**packed | {"max_seqlen_q": 100, "max_seqlen_k": 70}))


def test_strided_inputs_and_bounds(device):
    packed = draw_packed([20, 5], [20, 5], 2, 2, 16, torch.float32, device)
    buffer = torch.cat([packed[name] for name in "qkv"], 1)  # (total, 6, 16), as a fused projection gives
    packed |= dict(zip("qkv", buffer.split(2, 1), strict=True))
    packed["cu_seqlens_q"] = packed["cu_seqlens_q"].repeat_interleave(2)[::2]
    judge_attention(packed, varlen=True)
