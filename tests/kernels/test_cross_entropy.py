"""Cross-entropy against the oracle in fp64: layouts, ignored rows, logits that are extreme or not to be read."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from rooflight.kernels import cross_entropy, linear_cross_entropy, reference
from rooflight.kernels.cross_entropy import TILE, RowOptions, row_gradients, row_losses
from support.losses import DTYPES, class_weights, draw, targets
from support.tolerance import judge

REDUCTIONS = ["mean", "sum", "none"]


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


# label_smoothing, whether the classes have weights
LABELS = [(0.1, False), (0.0, True), (0.1, True), (1.0, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("smoothing", "weighted"), LABELS)
@pytest.mark.parametrize("V", [90, TILE + 17])  # the second: weights of a second tile
def test_smoothed_and_weighted_labels(device, V, smoothing, weighted, dtype):
    inputs = {"logits": draw(4, V, dtype=dtype, device=device), "target": targets((4,), V, device)}
    weights = class_weights(V, device, dtype) if weighted else None  # in 2 bytes too
    inputs["class_weight"] = None if weights is None else torch.stack([weights, weights], 1)[:, 0]  # strided
    options = {"label_smoothing": smoothing, "z_loss": 0.01, "reduction": REDUCTIONS[int(V > TILE) + weighted]}
    judge(cross_entropy, reference.cross_entropy, inputs, frozen=("class_weight",), **options)


@pytest.mark.parametrize("op", [cross_entropy, reference.cross_entropy], ids=["kernels", "oracle"])
def test_labels_are_torchs(device, op):
    """Losses and gradients by every reduction; one target is another ignore_index, one class has no weight."""
    logits, target = draw(5, 20, device=device).requires_grad_(), targets((5,), 20, device, ignore_index=8)
    target[2] = 14  # of weight 0
    for reduction in REDUCTIONS:
        for smoothing, weighted in [(0.0, False), *LABELS]:
            options = {"label_smoothing": smoothing, "ignore_index": 8, "reduction": reduction}
            weights = class_weights(20, device) if weighted else None
            ours = op(logits, target, class_weight=weights, **options)
            theirs = torch.nn.functional.cross_entropy(logits, target, weights, **options)
            torch.testing.assert_close(ours, theirs)
            dours, dtheirs = (torch.autograd.grad(loss.square().sum(), logits) for loss in (ours, theirs))
            torch.testing.assert_close(dours, dtheirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_in_fp64_leave_the_loss_in_fp32(reduction):
    logits, target, weights = draw(6, 20, device="cpu"), targets((6,), 20, "cpu"), class_weights(20, "cpu").double()
    options = {"class_weight": weights, "reduction": reduction}
    losses = [op(logits, target, **options) for op in (cross_entropy, reference.cross_entropy)]
    losses += [
        linear_cross_entropy(logits, torch.eye(20).requires_grad_(wanted), target, **options)
        for wanted in (True, False)
    ]
    for loss in losses:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, losses[1])


@pytest.mark.parametrize("op", [cross_entropy, reference.cross_entropy], ids=["kernels", "oracle"])
def test_labels_at_the_edges(device, op):
    """A masked class has an infinite share of a smoothed target, as in torch; a z-loss is weighted as its row is."""
    logits, target = draw(3, 20, device=device), torch.tensor([1, -100, 3], device=device)
    weights = torch.ones(20, device=device)
    weights[3] = 0
    masked = logits.clone()
    masked[0, 5] = float("-inf")
    for w in (None, weights):
        ours = op(masked, target, label_smoothing=0.1, class_weight=w, reduction="none")
        theirs = torch.nn.functional.cross_entropy(masked, target, w, label_smoothing=0.1, reduction="none")
        torch.testing.assert_close(ours, theirs)
    extra = op(logits, target, z_loss=0.5, class_weight=weights) - op(logits, target, class_weight=weights)
    torch.testing.assert_close(extra, 0.5 * logits[0].logsumexp(-1).square())
    for nothing in (target[1:], target[1:2].expand(2)):  # of weight 0, and ignored
        assert op(logits[1:], nothing, class_weight=weights).item() == 0


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
    loss = cross_entropy(logits, torch.full((3,), -100, device=device))
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert dlogits.eq(0).all()


def test_a_target_outside_the_vocabulary_gives_nan_not_a_stray_read(device):
    logits, target = draw(3, 20, device=device), torch.tensor([20, 3, -1], device=device)
    for weights in (None, class_weights(20, device)):
        options = {"class_weight": weights, "label_smoothing": 0.1}
        assert cross_entropy(logits, target, reduction="none", **options).isnan().tolist() == [True, False, True]
        assert cross_entropy(logits, target, **options).isnan()


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "eager"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("V", [1, 63, 65, TILE - 1, TILE + 1])  # the last: padding that is a tile of its own
def test_what_lies_past_the_vocabulary_is_not_read_and_its_gradient_is_zero(device, V, softcap, triton, monkeypatch):
    if not triton:
        if device.type == "cuda":
            pytest.skip("eager order serves plain CPU tensors")
        monkeypatch.setattr(import_module("rooflight.kernels.cross_entropy"), "runs_triton", lambda tensor: False)
    M, width, dloss = 3, 2 * V + 70, draw(3, device=device, seed=2)
    logits, target = draw(M, V, dtype=torch.bfloat16, device=device), targets((M,), V, device, ignored=0.2)
    buffer = logits.new_full((M + 1, width + 9), float("nan"))  # a row and columns that are nobody's
    out = buffer[:M, :width]
    out[:, :V] = logits

    weights = torch.cat([class_weights(V, device), logits.new_full((width,), float("nan"))])[:V]
    options = RowOptions(-100, softcap, 0.1, *((0.2, weights) if softcap else ()))

    def run(z, out):
        loss, lse = row_losses(z, target, options)
        return loss, lse, row_gradients(dloss, z, target, lse, options, out=out)

    loss, lse, dlogits = run(out[:, :V], out)
    expected = run(logits, torch.empty_like(logits))
    assert all(torch.equal(a, b) for a, b in zip((loss, lse, dlogits[:, :V]), expected, strict=True))
    assert dlogits[:, V:].eq(0).all()
    assert buffer[M].isnan().all()
    assert buffer[:, width:].isnan().all()


X, T = torch.ones(3, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.ones(())}, r"logits: expected shape \(\.\.\., V\)"),
        ({"logits": X.int()}, "logits: expected dtype .* got int32"),
        ({"target": T[:2]}, r"target: expected shape \(3,\), got \(2,\)"),
        ({"target": T.int()}, "target: expected dtype int64, got int32"),
        ({"target": T.to("meta")}, "target: expected device cpu, as logits, got meta"),
        ({"label_smoothing": 1.1}, r"label_smoothing: expected a number in \[0, 1\], got 1.1"),
        ({"label_smoothing": float("nan")}, r"label_smoothing: expected a number in \[0, 1\], got nan"),
        ({"class_weight": X[0, :7]}, r"class_weight: expected shape \(8,\), got \(7,\)"),
        ({"class_weight": X[0].long()}, "class_weight: expected dtype float32, float16, bfloat16, got int64"),
        ({"class_weight": X[0].to("meta")}, "class_weight: expected device cpu, as logits, got meta"),
        ({"class_weight": torch.ones(8, requires_grad=True)}, "class_weight: expected a tensor that requires no"),
        ({"reduction": "avg"}, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**({"logits": X, "target": T} | arguments))
