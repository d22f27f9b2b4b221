"""Linear cross-entropy against the oracle in fp64, its gradients made in the forward or in the backward pass, and what
it holds in memory."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rooflight.bench.measure.memory import peak_bytes
from rooflight.kernels import linear_cross_entropy, reference
from rooflight.kernels.linear_cross_entropy import (
    ALIGNMENT,
    CHUNK_LOGITS,
    _chunk_logits,
    chunk_rows,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_kept,
    linear_cross_entropy_scale,
    pad_rows,
    padded,
)
from support.losses import DTYPES, class_weights, draw, targets
from support.tolerance import judge

# None stands for True where there is a reduction, but for fp16
WAYS = {"kept": ("mean", None), "kept, sum": ("sum", True), "recomputed": ("mean", False), "rows": ("none", None)}


@pytest.fixture(params=[1, 3, None], ids=["a row", "three rows", "one chunk"])
def chunked(request, monkeypatch):
    """Chunks of that many rows at V = 60, for 7 rows."""
    if request.param is not None:
        for device in CHUNK_LOGITS:
            monkeypatch.setitem(CHUNK_LOGITS, device, padded(60) * request.param)


def inputs_of(M, N, V, device, dtype=torch.float32, weight_dtype=None, **target):
    return {
        "x": draw(M, N, dtype=dtype, device=device, scale=1.0),
        "weight": draw(V, N, dtype=weight_dtype or dtype, device=device, seed=1, scale=0.5),
        "target": targets((M,), V, device, **target),
    }


def gradients(inputs, upstream=1.0, **options):
    x, weight = (inputs[name].detach().requires_grad_() for name in ("x", "weight"))
    loss = linear_cross_entropy(x, weight, inputs["target"], **options)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight), torch.full_like(loss, upstream))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_against_the_oracle(device, chunked, dtype, way, softcap):
    reduction, keep = WAYS[way]
    options = {"reduction": reduction, "keep_gradients": keep, "softcap": softcap, "z_loss": 0.01}
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs_of(7, 24, 60, device, dtype), **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weighted", [False, True], ids=["smoothed", "smoothed, weighted"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_smoothed_and_weighted_labels(device, softcap, weighted, way, monkeypatch):
    monkeypatch.setitem(CHUNK_LOGITS, device.type, 3 * padded(60))
    reduction, keep = WAYS[way]
    options = {"reduction": reduction, "keep_gradients": keep, "softcap": softcap, "z_loss": 0.01}
    inputs = inputs_of(7, 24, 60, device, torch.bfloat16, torch.float32)
    inputs["class_weight"] = class_weights(60, device) if weighted else None
    options["label_smoothing"] = 0.1
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs, frozen=("class_weight",), **options)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["cast", "copied"])
@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 127, 257])  # on both sides of a multiple of ALIGNMENT
def test_every_vocabulary(device, V, weight_dtype, keep, monkeypatch):
    monkeypatch.setitem(CHUNK_LOGITS, device.type, 3 * padded(V))
    inputs = inputs_of(5, 24, V, device, torch.bfloat16, weight_dtype)
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs, keep_gradients=keep)


@pytest.mark.parametrize("keep", [True, False])
def test_mixed_and_strided(device, chunked, keep):
    inputs = {
        "x": draw(2, 24, 5, dtype=torch.bfloat16, device=device, scale=1.0).transpose(1, 2),
        "weight": draw(24, 60, device=device, seed=1, scale=0.5).T,
        "target": targets((2, 5), 60, device),
    }
    options = {"keep_gradients": True} if keep else {"reduction": "none"}
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs, **options)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("frozen", [("x",), ("weight",)], ids=str)
def test_frozen_inputs(device, chunked, frozen, keep):
    inputs = inputs_of(7, 24, 60, device)
    judge(linear_cross_entropy, reference.linear_cross_entropy, inputs, frozen=frozen, keep_gradients=keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("M", [0, 3])
def test_no_rows_or_every_row_ignored(device, M, keep):
    inputs = inputs_of(M, 24, 60, device, ignored=1.1)
    loss, dx, dweight = gradients(inputs, keep_gradients=keep)
    assert loss.item() == 0
    assert (dx.shape, dweight.shape) == ((M, 24), (60, 24))
    assert dx.eq(0).all()
    assert dweight.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_kept_and_recomputed_gradients_are_the_same_bits(device, chunked, dtype, upstream):
    """A power of two commutes with every rounding; 64 targets, so that fp16's mean stays above its smallest normal."""
    inputs = inputs_of(7, 24, 60, device, dtype, torch.float32)
    kept, again = (gradients(inputs, upstream, keep_gradients=keep, softcap=5.0) for keep in (True, False))
    if dtype == torch.float16:  # of a product the small terms may fall below it
        torch.testing.assert_close(kept, again)
    else:
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_the_gradient_that_arrives_is_not_rounded_before_the_product(device):
    dx, dweight = draw(5, 24, dtype=torch.bfloat16, device=device), draw(60, 24, device=device)
    third = torch.tensor(1 / 3, device=device)
    ours = linear_cross_entropy_scale(third, third, dx, dweight)
    assert torch.equal(ours[0], (dx.float() * third).bfloat16())
    assert torch.equal(ours[1], dweight * third)
    assert not torch.equal(ours[0], dx * third.bfloat16())


def test_a_graph_that_is_kept_gives_the_same_gradients_again(device):
    inputs = inputs_of(7, 24, 60, device, torch.bfloat16, torch.float32)
    x, weight = (inputs[name].requires_grad_() for name in ("x", "weight"))
    loss = linear_cross_entropy(x, weight, inputs["target"], keep_gradients=True) / 3
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_made_once_and_only_where_they_are_wanted(device):
    product = 2 * 7 * 24 * 60

    def count(dtype, grad=True, **options):
        inputs = inputs_of(7, 24, 60, device, dtype, torch.float32)
        inputs["weight"].requires_grad_(grad)
        with FlopCounterMode(display=False) as forward:
            loss = linear_cross_entropy(**inputs, **options)
        with FlopCounterMode(display=False) as backward:
            if grad:
                loss.sum().backward()
        return tuple(counter.get_total_flops() // product for counter in (forward, backward))

    assert count(torch.bfloat16) == count(torch.float16, keep_gradients=True) == (3, 0)
    assert count(torch.bfloat16, keep_gradients=False) == count(torch.bfloat16, reduction="none") == (1, 3)
    assert count(torch.float16) == (1, 3)
    assert count(torch.bfloat16, grad=False) == (1, 0)
    with torch.no_grad():
        assert count(torch.bfloat16, grad=False, keep_gradients=True) == (1, 0)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="fp64 runs in the interpreter only")
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way):
    x, weight, target = inputs_of(4, 6, 9, "cpu", torch.float64).values()
    reduction, keep = WAYS[way]
    options = {"reduction": reduction, "keep_gradients": keep, "softcap": 3.0, "z_loss": 0.1}
    assert torch.autograd.gradcheck(
        lambda x, weight: linear_cross_entropy(x, weight, target, **options).square(),
        (x.requires_grad_(), weight.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("keep", [True, False])
def test_a_second_derivative_is_refused_even_of_the_loss_itself(device, keep):
    """With kept gradients nothing that the backward computes with depends on x; it must not pass for a constant."""
    inputs = inputs_of(4, 6, 9, device)
    inputs["x"].requires_grad_()
    loss = linear_cross_entropy(**inputs, keep_gradients=keep)
    (dx,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        (loss + dx.square().sum()).backward()


@pytest.mark.long
@pytest.mark.parametrize("keep", [True, False])
def test_compiles_without_a_graph_break(device, keep):
    inputs = inputs_of(4, 6, 9, device, torch.bfloat16, torch.float32)

    def loss(x, weight):
        return linear_cross_entropy(2 * x, weight, inputs["target"], keep_gradients=keep) / 3

    leaves = [inputs[name].requires_grad_() for name in ("x", "weight")]
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    ours, eager = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("keep", [True, False])
def test_autocast_runs_the_products_in_its_dtype(device, keep):
    x, weight, target = inputs_of(7, 24, 60, device).values()
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, keep_gradients=keep)
        expected = linear_cross_entropy(x.bfloat16(), weight, target, keep_gradients=keep)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- memory


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
    monkeypatch.setitem(CHUNK_LOGITS, device.type, 4 * padded(V))
    x, weight, target = draw(M, N, device=device), draw(V, N, device=device), targets((M,), V, device)
    with _Largest() as eager:
        reference.linear_cross_entropy(x, weight, target)
    assert eager.elements == M * V
    with _Largest() as chunked:  # the launchers: a dispatch mode sees an operator's call, not its inside
        loss, lse = linear_cross_entropy_fwd(x, weight, target, -100, 0.0, 0.0, 0.0, None)
        linear_cross_entropy_bwd(torch.ones_like(loss), x, weight, target, lse, -100, 0.0, 0.0, 0.0, None, True, True)
        linear_cross_entropy_kept(x, weight, target, -100, 0.0, 0.0, 0.0, None, "mean", True, True)
    assert chunked.elements == max(4 * padded(V), M * N, V * N)


def test_all_chunks_share_a_buffer(device, monkeypatch):
    monkeypatch.setitem(CHUNK_LOGITS, device.type, 4 * padded(60))
    x, weight = draw(10, 8, device=device), draw(60, 8, device=device)
    seen = [(rows, z.clone(), z.data_ptr(), z.stride(0)) for rows, z in _chunk_logits(x, weight)]
    assert [(rows.start, rows.stop) for rows, *_ in seen] == [(0, 4), (4, 8), (8, 10)]
    assert {(pointer, stride) for *_, pointer, stride in seen} == {(seen[0][2], padded(60))}
    torch.testing.assert_close(torch.cat([z for _, z, *_ in seen]), x @ weight.T)


@pytest.mark.parametrize(
    ("M", "V", "rows"),
    [
        (16384, 50257, 4096),  # four chunks, not three of 5,336 and a rest
        (16384, 131072, 2048),
        (1000, 50257, 1000),
        (5400, 50257, 2816),  # two, of whole tiles
        (3, 2**30, 1),
        (0, 50257, 1),
    ],
)
def test_chunks_are_few_and_even(M, V, rows):
    assert chunk_rows(M, V, "cuda") == rows
    assert rows == 1 or rows * padded(V) <= CHUNK_LOGITS["cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU's allocator")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["cast", "copied"])
def test_an_odd_vocabulary_costs_less_than_64_rows_and_columns(weight_dtype, keep, monkeypatch):
    # the interpreter keeps copies of its own
    monkeypatch.setattr(import_module("rooflight.kernels.cross_entropy"), "runs_triton", lambda tensor: False)
    M, N, rows = 96, 32, 32
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", rows * 576)

    def peak(V):
        inputs = inputs_of(M, N, V, "cpu", torch.bfloat16, weight_dtype)
        assert chunk_rows(M, V, "cpu") == rows
        gradients(inputs, keep_gradients=keep)
        return peak_bytes(lambda: gradients(inputs, keep_gradients=keep), torch.device("cpu"))

    # the copy, a chunk's dweight and their sum in fp32; the buffer. Where the peak is that sum, as it is of gradients
    # made with the losses, and not the row kernel, torch casts the chunk's to fp32 before it adds it
    weight, logits = ALIGNMENT * N * (2 + 2 + 4 + 4 * keep), ALIGNMENT * rows * 2
    if weight_dtype == torch.bfloat16:  # which at 512 is no copy
        weight += 512 * N * 2
    more = N * (2 + 4 + 4) + rows * 3 * 4  # one word more: dweight and fp32 temporaries
    assert peak(513) - peak(512) <= weight + logits + more


def test_the_copy_of_a_weight_has_rows_of_zeros(device):
    weight = draw(24, 61, device=device).T.requires_grad_()
    copy = pad_rows(weight, torch.bfloat16)
    assert (copy.shape, copy.dtype) == ((ALIGNMENT, 24), torch.bfloat16)
    assert torch.equal(copy[:61], weight.bfloat16())
    assert copy[61:].eq(0).all()
    (dweight,) = torch.autograd.grad(copy, weight, torch.ones_like(copy))
    assert torch.equal(dweight, torch.ones_like(weight))


X, W, T = torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(())}, r"x: expected shape \(\.\.\., N\)"),
        ({"weight": torch.ones(5, 7)}, r"weight: expected shape \(V, 8\) with V >= 1, got \(5, 7\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a number in \[0, 1\], got -0.1"),
        ({"class_weight": W[:4, 0]}, r"class_weight: expected shape \(5,\), got \(4,\)"),
        ({"class_weight": W[:, 0].to("meta")}, "class_weight: expected device cpu, as x, got meta"),
        ({"softcap": -1.0}, "softcap: expected a finite number, at least 0 .*, got -1.0"),
        ({"target": T[:2]}, r"target: expected shape \(3,\), got \(2,\)"),
        ({"weight": W.to("meta")}, "weight: expected device cpu, as x, got meta"),
        ({"reduction": ""}, "reduction: expected 'mean', 'sum' or 'none', got ''"),
        ({"reduction": "none", "keep_gradients": True}, "keep_gradients: expected None or False with reduction 'none'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"x": X, "weight": W, "target": T} | arguments))
