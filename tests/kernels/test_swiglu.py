"""SwiGLU against the oracle in fp64."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels import reference, swiglu
from rooflight.kernels.swiglu import TILE
from support.tolerance import judge


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5, 7), (70, 100), (2, TILE + 3), (0, 8), (3, 0)], ids=str)
def test_shapes(device, dtype, shape):
    inputs = {"gate": draw(*shape, dtype=dtype, device=device), "up": draw(*shape, dtype=dtype, device=device, seed=1)}
    judge(swiglu, reference.swiglu, inputs)


def test_halves_of_one_projection_are_not_copied(device, monkeypatch):
    gate, up = draw(4, 6, 64, device=device).chunk(2, -1)
    judge(swiglu, reference.swiglu, {"gate": gate, "up": up})
    expected = swiglu(gate, up)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a hidden copy"))
    assert torch.equal(swiglu(gate, up), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 5, 14), (70, 200), (2, 2 * TILE + 6), (0, 8), (3, 0)], ids=str)
def test_one_tensor_of_both(device, dtype, shape):
    both = draw(*shape, dtype=dtype, device=device)
    judge(swiglu, reference.swiglu, {"gate": both})
    assert torch.equal(swiglu(both), swiglu(*both.chunk(2, -1)))
    judge(swiglu, reference.swiglu, {"gate": torch.cat([both, both], -1)[..., ::2]})


def test_strided_and_expanded(device):
    gate = draw(5, 3, 4, 16, device=device, dtype=torch.float16).permute(2, 1, 3, 0)
    up = draw(16, 1, device=device, dtype=torch.float16).expand(4, 3, 16, 5)

    def one(out, generator):
        return torch.ones_like(out[:1]).expand(out.shape)

    judge(swiglu, reference.swiglu, {"gate": gate, "up": up}, grad=one)


def test_mixed_dtypes(device):
    gate, up = draw(4, 9, dtype=torch.bfloat16, device=device), draw(4, 9, device=device)
    judge(swiglu, reference.swiglu, {"gate": gate, "up": up})


def test_extreme_gates_give_no_nan(device):
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4], device=device)
    judge(swiglu, reference.swiglu, {"gate": gate, "up": torch.ones(6, device=device)})


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(()), torch.ones(()), r"gate: expected shape \(\.\.\., N\), got \(\)"),
        (torch.ones(3, 4), torch.ones(4), r"up: expected gate's shape \(3, 4\), got \(4,\)"),
        (torch.ones(2, 3), None, r"gate: expected shape \(\.\.\., 2 N\) without up, got \(2, 3\)"),
        (torch.ones(3).int(), torch.ones(3), "gate: expected dtype .* got int32"),
        (torch.ones(3), torch.ones(3).bool(), "up: expected dtype .* got bool"),
        (torch.ones(3), torch.ones(3, device="meta"), "up: expected device cpu, as gate, got meta"),
    ],
)
def test_bad_input(gate, up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)
