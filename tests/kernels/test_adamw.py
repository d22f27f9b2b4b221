"""AdamW's kernel against torch.optim.AdamW, one tensor at a time."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels import adamw
from rooflight.kernels.adamw import TILE, AdamWTables, adamw_update

# one number; a vector of no whole 16 bytes; matrices of a tile exactly and of more; nothing
SHAPES = [(1,), (7,), (16, TILE // 16), (3, 1000), (0, 4), (40, 160)]


def problem(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]


def state_of(weights):
    zeros = [torch.zeros_like(w) for w in weights]
    return zeros, [z.clone() for z in zeros], [torch.zeros((), device=w.device) for w in weights]


OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.0, "beta2": 0.5, "eps": 1e-3, "weight_decay": 0.0}], ids=["", "b"])
def test_every_step_is_torchs(device, low, options):
    """Gradients and copies of every second tensor in `low`; tensor 3 has a moment's misaligned view, 4 is empty."""
    options = OPTIONS | options
    weights = problem(device)
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    betas = options["beta1"], options["beta2"]
    other = {name: options[name] for name in ("eps", "weight_decay")}
    expected = torch.optim.AdamW(theirs, lr=0.01, betas=betas, **other, foreach=False)
    means, squares, steps = state_of(weights)
    means[3] = torch.zeros(3001, device=device)[1:].view(3, 1000)
    lows = [low if i % 2 == 0 else None for i in range(len(weights))]
    copies = [None if d is None else w.to(d) for w, d in zip(weights, lows, strict=True)]
    tables, lr = AdamWTables(), torch.tensor(0.01, device=device)
    for turn in range(4):
        gradients = [g.to(d or torch.float32) for g, d in zip(problem(device, 1 + turn), lows, strict=True)]
        torch._foreach_add_(steps, 1)
        adamw_update(weights, gradients, means, squares, steps, copies, tables, lr=lr, **options)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.float()
        expected.step()
        for w, p, c in zip(weights, theirs, copies, strict=True):
            # values of order 1, steps of 1e-2: a lost digit in a moment or a correction would show
            torch.testing.assert_close(w, p.detach(), rtol=0, atol=2e-6)
            assert c is None or torch.equal(c, w.to(c.dtype))
    for m, v, p in zip(means, squares, theirs, strict=True):
        torch.testing.assert_close(m, expected.state[p]["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(v, expected.state[p]["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_each_tensor_has_steps_of_its_own_and_the_rate_is_read_from_the_device(device):
    weights = [torch.ones(20, device=device), torch.ones(20, device=device)]
    means, squares, steps = state_of(weights)
    gradients, tables, lr = [torch.ones(20, device=device)] * 2, AdamWTables(), torch.tensor(0.5, device=device)
    steps[0] += 1
    steps[1] += 9
    options = {"beta1": 0.5, "beta2": 0.5, "eps": 0.0, "weight_decay": 0.0}
    adamw_update(weights, gradients, means, squares, steps, [None, None], tables, lr=lr, **options)
    late = (0.5 / (1 - 0.5**9)) / (0.5 / (1 - 0.5**9)) ** 0.5
    torch.testing.assert_close(weights[0], torch.full((20,), 0.5, device=device))
    torch.testing.assert_close(weights[1], torch.full((20,), 1 - 0.5 * late, device=device))
    lr.zero_()
    before = weights[0].clone()
    adamw_update(weights, gradients, means, squares, steps, [None, None], tables, lr=lr, **options)
    assert torch.equal(weights[0], before)


def test_one_launch_serves_all_tensors_of_a_kind(device, monkeypatch):
    launches = []
    monkeypatch.setattr(adamw, "launch", lambda kernel, grid, *args, **constants: launches.append((grid, constants)))
    weights = [torch.zeros(16 * n, device=device) for n in range(1, 60)]
    args = weights, weights, weights, weights, [torch.zeros((), device=device)] * 59, [None] * 59
    adamw_update(*args, AdamWTables(), lr=torch.zeros((), device=device), **OPTIONS)
    assert len(launches) == 1
    assert launches[0][1]["ALIGNED"]


def test_tables_are_made_once_for_the_same_addresses(device):
    tables = AdamWTables()
    a, b = tables.of((1, 2), device), tables.of((1, 3), device)
    assert tables.of((1, 2), device) is a is not b
    assert (a.tolist(), b.tolist()) == ([1, 2], [1, 3])
    for i in range(AdamWTables.KEPT):
        tables.of((i, i, i), device)
    assert len(tables._known) <= AdamWTables.KEPT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": [torch.ones(4, 3).T]}, r"gradients: expected contiguous tensors .* got \(1, 3\)"),
        ({"weights": [torch.ones(3, 4).double()]}, "weights: expected float32, its moments and step too"),
        ({"gradients": [torch.ones(3, 4).double()]}, "weights: expected float32"),
    ],
)
def test_bad_input(change, message):
    ones = [torch.ones(3, 4)]
    args = {"weights": ones, "gradients": ones, "means": ones, "squares": ones, "steps": [torch.ones(())]} | change
    with pytest.raises(ValueError, match=message):
        adamw_update(**args, copies=[None], tables=AdamWTables(), lr=torch.ones(()), **OPTIONS)
