"""The rule that judges the kernels rejects what it should, and no oracle fails it."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels import reference
from support.tolerance import assert_as_accurate, judge


def inputs(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 64, generator=generator).to(dtype)
    return {"x": x, "weight": torch.randn(64, generator=generator).to(dtype)}


class _Wrong(torch.autograd.Function):
    """Scales the gradient on the way back: right forward, wrong backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_oracle_passes(dtype):
    judge(reference.rms_norm, reference.rms_norm, inputs(dtype))


def test_a_wrong_statistic_fails():
    def wrong(x, weight):
        return reference.rms_norm(x, weight, 2e-2)

    with pytest.raises(AssertionError, match="output 0"):
        judge(wrong, reference.rms_norm, inputs())


def test_a_wrong_gradient_fails():
    with pytest.raises(AssertionError, match="dweight: largest error"):
        judge(lambda x, weight: reference.rms_norm(x, _Wrong.apply(weight)), reference.rms_norm, inputs())


def test_a_lost_gradient_fails():
    with pytest.raises(AssertionError, match="no gradient for"):
        judge(lambda x, weight: reference.rms_norm(x, weight.detach()), reference.rms_norm, inputs())


def test_a_written_input_fails():
    def in_place(x, weight):
        with torch.no_grad():
            x.mul_(2.0)
        return reference.rms_norm(x, weight)

    with pytest.raises(AssertionError, match="was written"):
        judge(in_place, reference.rms_norm, inputs())


def test_infinities_and_nan_are_exact():
    exact = torch.tensor([float("-inf"), 1.0, 2.0], dtype=torch.float64)
    good = exact.float()
    assert_as_accurate("lse", good, good, exact)
    for wrong in ([0.0, 1.0, 2.0], [float("-inf"), float("nan"), 2.0], [float("-inf"), 1.0, 2.001]):
        with pytest.raises(AssertionError):
            assert_as_accurate("lse", torch.tensor(wrong), good, exact)


def test_shape_and_dtype_are_judged():
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate("y", torch.ones(3, 1), exact.float(), exact)
    with pytest.raises(AssertionError, match="float16"):
        assert_as_accurate("y", torch.ones(3).half(), exact.float(), exact)
