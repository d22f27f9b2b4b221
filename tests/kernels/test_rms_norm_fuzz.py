"""RMSNorm on random shapes, dtypes, layouts and options: each case is a seed, and a failure prints its reproduction."""

from __future__ import annotations

import random

import pytest
import torch

from rooflight.kernels import reference, rms_norm
from support.marks import on_cpu
from support.tolerance import judge

CASES = 1000  # drawn (each length with each layout some 7 times); the first run by default, the rest in the slow tail
DEFAULT = 120
ON_GPU = 30  # where each seed compiles kernels of its own
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lay_out(x: torch.Tensor, choose: random.Random) -> torch.Tensor:
    """The same shape in another layout; values may repeat where dimensions are expanded."""
    kind = choose.choice(["contiguous", "permuted", "stepped", "offset", "expanded"])
    if kind == "permuted":
        order = choose.sample(range(x.dim()), x.dim())
        back = [order.index(d) for d in range(x.dim())]
        return x.permute(order).contiguous().permute(back)
    if kind == "stepped":
        return torch.stack([x, x + 1], -1)[..., 0]
    if kind == "offset":
        return torch.cat([x, x], -1)[..., choose.randrange(x.shape[-1] + 1) :][..., : x.shape[-1]]
    if kind == "expanded":
        d = choose.randrange(max(1, x.dim() - 1))  # not along a row: dx of a constant row is a cancellation too
        if d == x.dim() - 1:
            return x
        return x.narrow(d, 0, min(1, x.shape[d])).expand(x.shape)
    return x


def check(seed: int, device: torch.device | str = "cpu") -> None:
    """Judge the case that `seed` draws."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    N = choose.choice([1, 2, 3, 8, 16, 17, 31, 64, 80, 96, 128, 256, 300, choose.randint(1, 600)])
    leading = [choose.choice([1, 1, 2, 3, 5, choose.randint(1, 20)]) for _ in range(choose.randint(0, 3))]
    if choose.random() < 0.03:
        leading = [0, *leading]
    shape = (*leading, N)
    dtype = choose.choice(DTYPES)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs = {
        "x": lay_out(draw(*shape, dtype=dtype) * choose.choice([1.0, 1.0, 2**-10, 32.0]), choose),
        "weight": lay_out(draw(N, dtype=choose.choice(DTYPES)), choose) if choose.random() < 0.8 else None,
        "residual": lay_out(draw(*shape, dtype=choose.choice(DTYPES)), choose) if choose.random() < 0.5 else None,
    }

    def grad(out: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return lay_out(torch.randn(out.shape, generator=generator).to(out), choose)

    options = {"eps": choose.choice([1e-6, 1e-5, 0.1]), "weight_offset": choose.choice([0.0, 0.0, 1.0, -0.5])}
    # In rows of 1 or 2, dx can be nothing but a cancellation, as in dy (1 - xhat^2): no accuracy to judge by.
    frozen = ("x", "residual") if N <= 2 else ()
    try:
        judge(rms_norm, reference.rms_norm, inputs, grad=grad, seed=seed, frozen=frozen, **options)
    except Exception as error:
        described = {k: (tuple(v.shape), v.stride(), v.dtype) if v is not None else None for k, v in inputs.items()}
        raise AssertionError(
            f"{error}\n{described} {options}\nreproduce: cd tests/kernels && TRITON_INTERPRET=1 python -c "
            f"\"import sys; sys.path.insert(0, '..'); import test_rms_norm_fuzz as t; t.check({seed})\""
        ) from error


@pytest.mark.parametrize("first", [*range(0, ON_GPU, 5), *on_cpu(*range(ON_GPU, DEFAULT, 5))])
def test_fuzz(device, first):
    for seed in range(first, first + 5):
        check(seed, device)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(DEFAULT, CASES, 40))
def test_fuzz_tail(device, first):
    for seed in range(first, min(first + 40, CASES)):
        check(seed, device)
