"""Cross-entropy and its fused linear form against the oracle in fp64, and what the fused form keeps in memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.kernels import cross_entropy, linear_cross_entropy, reference
from rooflight.kernels.cross_entropy import TILE
from rooflight.kernels.linear_cross_entropy import (
    CHUNK_LOGITS,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)
from support.tolerance import judge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


def targets(shape, V, device, ignored=0.3, ignore_index=-100):
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(0, V, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < ignored, ignore_index).to(device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "V"),
    [((1,), 1), ((), 7), ((3, 5), 100), ((4,), TILE), ((3,), 2 * TILE + 17), ((0,), 5)],
    ids=str,
)
def test_cross_entropy(device, dtype, shape, V, reduction):
    inputs = {"logits": draw(*shape, V, dtype=dtype, device=device), "target": targets(shape, V, device)}
    judge(cross_entropy, reference.cross_entropy, inputs, reduction=reduction, z_loss=0.01)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.5])
def test_z_loss_and_ignore_index(device, z_loss):
    inputs = {"logits": draw(6, 50, device=device), "target": targets((6,), 50, device, ignore_index=7)}
    judge(cross_entropy, reference.cross_entropy, inputs, z_loss=z_loss, ignore_index=7)


def test_agrees_with_torch(device):
    logits, target = draw(6, 50, device=device), targets((6,), 50, device)
    torch.testing.assert_close(cross_entropy(logits, target), torch.nn.functional.cross_entropy(logits, target))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["transposed", "vocabulary first", "padded", "expanded"],
)
def test_strided_logits(device, layout):
    logits = layout(draw(3, 4, 90, dtype=torch.bfloat16, device=device))
    inputs = {"logits": logits, "target": targets(logits.shape[1::-1], 90, device).T}

    def one(out, generator):
        return out.new_ones(1).expand(out.shape)

    judge(cross_entropy, reference.cross_entropy, inputs, reduction="none", grad=one)


def test_masked_vocabulary_and_huge_logits(device):
    """Logits of -inf (a whole first tile of them) and of 1e4 give the exact loss and no NaN."""
    logits = draw(3, TILE + 50, device=device)
    logits[0, :TILE] = float("-inf")
    logits[1] *= 3e3
    logits[2, 5:] = float("-inf")
    target = torch.tensor([TILE + 1, 17, 3], device=device)
    judge(cross_entropy, reference.cross_entropy, {"logits": logits, "target": target}, reduction="none")


def test_every_row_ignored(device):
    logits = draw(3, 20, device=device).requires_grad_()
    for op in (cross_entropy, lambda x, t: linear_cross_entropy(x, torch.ones(9, 20, device=device), t)):
        loss = op(logits, torch.full((3,), -100, device=device))
        (dlogits,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert dlogits.eq(0).all()


def test_a_target_outside_the_vocabulary_gives_nan_not_a_stray_read(device):
    loss = cross_entropy(draw(3, 20, device=device), torch.tensor([20, 3, -1], device=device), reduction="none")
    assert loss.isnan().tolist() == [True, False, True]


@pytest.fixture(params=[1, 3, None], ids=["a row", "three rows", "one chunk"])
def chunked(request, monkeypatch):
    """Chunks of that many rows at V = 60, for 7 rows."""
    if request.param is not None:
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", 60 * request.param)
        monkeypatch.setitem(CHUNK_LOGITS, "cuda", 60 * request.param)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_linear_cross_entropy(device, chunked, dtype, reduction, softcap):
    inputs = {
        "x": draw(7, 24, dtype=dtype, device=device, scale=1.0),
        "weight": draw(60, 24, dtype=dtype, device=device, seed=1, scale=0.5),
        "target": targets((7,), 60, device),
    }
    judge(
        linear_cross_entropy, reference.linear_cross_entropy, inputs, reduction=reduction, softcap=softcap, z_loss=0.01
    )


def test_linear_cross_entropy_mixed_and_strided(device, chunked):
    inputs = {
        "x": draw(2, 24, 5, dtype=torch.bfloat16, device=device, scale=1.0).transpose(1, 2),
        "weight": draw(24, 60, device=device, seed=1, scale=0.5).T,
        "target": targets((2, 5), 60, device),
    }
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs, reduction="none")


@pytest.mark.parametrize("frozen", [("x",), ("weight",)], ids=str)
def test_frozen_inputs(device, chunked, frozen):
    inputs = {
        "x": draw(7, 24, device=device),
        "weight": draw(60, 24, device=device, seed=1),
        "target": targets((7,), 60, device),
    }
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs, frozen=frozen)


def test_autocast_runs_the_products_in_its_dtype(device):
    x, weight, target = draw(7, 24, device=device), draw(60, 24, device=device, seed=1), targets((7,), 60, device)
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target)
        expected = linear_cross_entropy(x.bfloat16(), weight, target)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_are_never_whole(device, monkeypatch):
    M, N, V = 64, 8, 60
    monkeypatch.setitem(CHUNK_LOGITS, device.type, 4 * V)
    x, weight, target = draw(M, N, device=device), draw(V, N, device=device), targets((M,), V, device)
    with _Largest() as eager:
        reference.linear_cross_entropy(x, weight, target)
    assert eager.elements == M * V
    with _Largest() as chunked:  # the launchers: a dispatch mode sees an operator's call, not its inside
        loss, lse = linear_cross_entropy_fwd(x, weight, target, -100, 0.0, 0.0)
        linear_cross_entropy_bwd(torch.ones_like(loss), x, weight, target, lse, -100, 0.0, 0.0, True, True)
    assert chunked.elements == max(4 * V, M * N, V * N)


X, W, T = torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.ones(())}, r"logits: expected shape \(\.\.\., V\)"),
        ({"logits": X.int()}, "logits: expected dtype .* got int32"),
        ({"target": T[:2]}, r"target: expected shape \(3,\), got \(2,\)"),
        ({"target": T.int()}, "target: expected dtype int64, got int32"),
        ({"target": T.to("meta")}, "target: expected device cpu, as logits, got meta"),
        ({"reduction": "avg"}, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**({"logits": X, "target": T} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(())}, r"x: expected shape \(\.\.\., N\)"),
        ({"weight": torch.ones(5, 7)}, r"weight: expected shape \(V, 8\) with V >= 1, got \(5, 7\)"),
        ({"softcap": -1.0}, "softcap: expected >= 0, got -1.0"),
        ({"target": T[:2]}, r"target: expected shape \(3,\), got \(2,\)"),
        ({"weight": W.to("meta")}, "weight: expected device cpu, as x, got meta"),
        ({"reduction": ""}, "reduction: expected 'mean', 'sum' or 'none', got ''"),
    ],
)
def test_bad_linear_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"x": X, "weight": W, "target": T} | arguments))
