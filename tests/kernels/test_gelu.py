"""GELU against torch's own in fp64."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels import gelu, reference
from rooflight.kernels.gelu import TILE
from support.tolerance import judge


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (70, 100), (2, TILE + 3), (0, 8), (3, 0)], ids=str)
def test_shapes(device, dtype, shape):
    judge(gelu, reference.gelu, {"x": draw(*shape, dtype=dtype, device=device)})


def test_strided_and_expanded(device):
    def one(out, generator):
        return torch.ones_like(out[:1]).expand(out.shape)

    judge(gelu, reference.gelu, {"x": draw(5, 3, 4, 16, device=device).permute(2, 1, 3, 0)}, grad=one)
    judge(gelu, reference.gelu, {"x": draw(16, 1, device=device, dtype=torch.float16).expand(4, 3, 16, 5)})


def test_tails_are_zero_or_the_line_and_keep_their_digits(device):
    """Far below 0 the value is as small as exp(-x^2 / 2): relative digits, where 1 + tanh would have none."""
    x = torch.tensor([-1e4, -30.0, -6.0, -0.0, 0.0, 6.0, 30.0, 1e4], device=device)
    y = gelu(x)
    assert y[[0, 1, 3, 4]].abs().max() == 0
    assert torch.equal(y[-2:], x[-2:])
    wide = x.double()
    exact = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    torch.testing.assert_close(y[2].double(), exact[2], rtol=2e-5, atol=0)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(gelu(x).sum(), x)
    assert torch.equal(dx[[0, 1, -2, -1]], torch.tensor([0.0, 0.0, 1.0, 1.0], device=device))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(()), r"x: expected shape \(\.\.\., N\), got \(\)"),
        (torch.ones(3).int(), "x: expected dtype .* got int32"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        gelu(x)
