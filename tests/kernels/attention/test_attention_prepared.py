"""Eager calls of a kind that was seen before: in the interpreter, whose launches take the long way past the plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import reference
from rooflight.kernels.attention import flash_attention, prepared
from rooflight.kernels.attention.portable import tiles
from support.attention import LAYOUTS, draw, lay_out_grad
from support.tolerance import judge

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def remembered(monkeypatch) -> Iterator[list[int]]:
    """Interpreted kernels count as compiled; how often a forward that was known ran."""
    monkeypatch.setattr(prepared, "JITFunction", object)
    calls = []
    forward = prepared.KnownAttention.forward
    monkeypatch.setattr(
        prepared.KnownAttention, "forward", staticmethod(lambda ctx, *args: (calls.append(1), forward(ctx, *args))[1])
    )
    small = tiles.Tile(16, 16)
    with tiles.use("fwd", small), tiles.use("dkdv", small), tiles.use("dq", small):
        yield calls


def judged(inputs: dict[str, torch.Tensor], **options: Any) -> None:
    """The output alone, and its gradients."""
    judge(flash_attention, reference.flash_attention, inputs, **options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}, {"softcap": 2.0, "scale": 0.3}], ids=str)
def test_later_calls_are_right_too(options, remembered):
    for seed in range(3):
        judged(draw(1, 4, 2, 33, 40, 24, torch.bfloat16, seed=seed), **options)
    assert len(remembered) == 3


@pytest.mark.parametrize("name", ["(B, T, H, D)", "odd offset", "every other", "expanded over T"])
def test_layouts_are_kinds_of_their_own(name, remembered):
    """Of the inputs, and of the gradient that arrives."""
    inputs = draw(1, 2, 2, 17, 17, 16, torch.float16)
    judged(inputs)
    judged({key: LAYOUTS[name](x) for key, x in inputs.items()}, grad=lay_out_grad(name))
    assert len(remembered) == 2


def inputs_like(x: torch.Tensor, n: int) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for _ in range(n)]


def test_what_is_refused_is_refused_every_time(remembered):
    x = torch.randn(1, 2, 17, 16, dtype=torch.bfloat16)
    flash_attention(x, x, x, causal=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="causal: expected True or False, got int 1"):
            flash_attention(x, x, x, causal=1)
        with pytest.raises(ValueError, match="k: expected head size 16"):
            flash_attention(x, x[..., :8], x)


def test_saved_tensors_may_come_back_in_another_layout(remembered):
    """As torch.autograd.graph.save_on_cpu brings back what does not lie densely."""
    base = torch.randn(1, 17, 2, 32, dtype=torch.bfloat16)
    q, k, v = (x[..., :16].transpose(1, 2).detach().requires_grad_() for x in (base, base + 1, base - 1))
    expected = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        out = flash_attention(q, k, v)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert len(remembered) == 2
    assert all(map(torch.equal, found, expected))


def test_who_looks_at_the_backward_sees_the_operator(remembered):
    q, k, v = inputs_like(torch.randn(1, 2, 17, 16, dtype=torch.bfloat16), 3)
    out = flash_attention(q, k, v)
    with FlopCounterMode(display=False) as counter:
        (dq,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert counter.get_total_flops() > 0
    assert dq.shape == q.shape
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


def test_without_gradients_nothing_is_saved(remembered):
    x = torch.randn(1, 2, 17, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        out = flash_attention(x, x, x)
    assert remembered == []
    assert not out.requires_grad
    expected = reference.flash_attention(*(x.float() for _ in range(3)))
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def test_a_changed_tile_is_another_kind(remembered):
    x = torch.randn(1, 1, 40, 16, dtype=torch.bfloat16)
    q, k, v = inputs_like(x, 3)
    first = flash_attention(q, k, v)
    with tiles.use("fwd", tiles.Tile(32, 16)):
        other = prepared.find(prepared.state(), q, k, v, None, True, None, None, 0.0, False)
    assert other is not prepared.find(prepared.state(), q, k, v, None, True, None, None, 0.0, False)
    torch.testing.assert_close(first, other[0](q, k, v)[0])
