"""RMSNorm as a citizen of torch: operators, compilation, autocast, transforms, addresses, bad input."""

from __future__ import annotations

import mmap

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import RMSNormFunction, cost, reference, rms_norm
from rooflight.kernels.rows import tile_offsets

INTERPRETED = triton.knobs.runtime.interpret


def tensors(device, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape[-1:], shape)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(device, with_residual):
    x, weight, residual = tensors(device, 5, 24)
    args = (x, weight, 1e-6, residual if with_residual else None, 1.0)
    torch.library.opcheck(torch.ops.rooflight.rms_norm_fwd.default, args)
    y, stream, rstd = (t.detach() for t in torch.ops.rooflight.rms_norm_fwd(*args))
    dstream = stream if with_residual else None
    torch.library.opcheck(
        torch.ops.rooflight.rms_norm_bwd.default, (y, dstream, x.detach(), weight.detach(), rstd, 1.0, True)
    )


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs in the interpreter only")
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_gradcheck(weight_offset):
    x, weight, residual = (t.detach().double().requires_grad_() for t in tensors("cpu", 2, 5))

    def op(x, weight, residual):
        return rms_norm(x, weight, 1e-3, residual=residual, weight_offset=weight_offset)

    assert torch.autograd.gradcheck(op, (x, weight, residual))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None), (x,))


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiles_without_a_graph_break(device):
    torch._dynamo.reset()

    def model(x, weight, residual):
        y, stream = rms_norm(x, weight, residual=residual)
        return rms_norm(y * 2, None, weight_offset=1.0).cos().sum() + rms_norm(stream, weight).square().sum()

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (2, 3, 7):
        inputs = tensors(device, rows, 24)
        ours, eager = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, model))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_nothing(device):
    x, weight, _ = tensors(device, 5, 24)
    with torch.autocast(device.type, torch.bfloat16):
        assert rms_norm(x, weight).dtype == torch.float32
        y = rms_norm(x.bfloat16(), weight)  # bf16 activations, fp32 parameters
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


def test_checkpointing_gives_the_same_gradients(device):
    inputs = tensors(device, 5, 24)

    def block(x, weight, residual):
        y, stream = rms_norm(x, weight, residual=residual)
        return (y * stream).sum()

    plain = torch.autograd.grad(block(*inputs), inputs)
    recomputed = torch.autograd.grad(checkpoint(block, *inputs, use_reentrant=False), inputs)
    assert all(map(torch.equal, plain, recomputed))


def test_flops_agree_with_cost(device):
    for residual in (False, True):
        inputs = tensors(device, 4, 6, 24)[: 2 + residual]
        keywords = {"residual": inputs[2]} if residual else {}
        with FlopCounterMode(display=False) as counter:
            outputs = rms_norm(*inputs[:2], **keywords)
            torch.autograd.backward(
                outputs, [torch.ones_like(o) for o in outputs] if residual else torch.ones_like(outputs)
            )
        total = sum(cost.rms_norm_cost(24, 24, residual=residual, backward=b).flops for b in (False, True))
        assert counter.get_total_flops() == total


def test_meta_and_fake_tensors_have_the_outputs_shapes():
    x = torch.empty(3, 5, 24, device="meta", dtype=torch.bfloat16)
    y, stream, rstd = torch.ops.rooflight.rms_norm_fwd(x, None, 1e-6, x.float(), 0.0)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (stream.shape, stream.dtype) == (x.shape, torch.float32)
    assert (rstd.shape, rstd.dtype) == ((15,), torch.float32)


def test_a_second_derivative_is_refused(device):
    x, weight, _ = tensors(device, 5, 24)
    (dx,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_functional_transforms_are_refused(device, transform):
    x = torch.randn(5, 24, device=device)
    run = {
        "vmap": torch.func.vmap(lambda row: rms_norm(row, None)),
        "grad": torch.func.grad(lambda x: rms_norm(x, None).sum()),
    }[transform]
    with pytest.raises(NotImplementedError, match=r"rms_norm: its Triton kernels do not run under torch\.func"):
        run(x)


def test_the_function_is_exported(device):
    x, weight, _ = tensors(device, 5, 24)
    assert torch.equal(RMSNormFunction.apply(x, weight, 1e-6, None, 0.0), rms_norm(x, weight))


# ---------------------------------------------------------------- addresses past 2^31 elements


def sparse(elements, device):
    """A bf16 tensor of that many elements, of which on a CPU only the pages that are touched take memory."""
    if device.type != "cpu":
        return torch.zeros(elements, dtype=torch.bfloat16, device=device)
    memory = mmap.mmap(
        -1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    )
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 8), (2**30 + 8, 1)),  # the row's offset passes 2^31
        ((2, 3, 8), (8, 2**30 + 8, 1)),  # that of an inner dimension
        ((3, 2, 2, 8), (2**30 + 64, 32, 8, 1)),  # that of the outermost of three
        ((2, 5), (1, 2**29 + 2)),  # the column's
    ],
    ids=str,
)
def test_offsets_are_64_bit(device, shape, strides):
    storage = sparse(2**31 + 2**12, device)
    x = storage.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    torch.testing.assert_close(rms_norm(x, None), reference.rms_norm(x, None), rtol=1e-2, atol=1e-2)


@triton.jit
def _offsets_kernel(out_ptr, first, layout, ROWS: tl.constexpr, N: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    at = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tile_offsets(row, layout, tl.arange(0, N)))


@pytest.mark.parametrize("layout", [(1, 1, 4096, 0, 0, 1), (3, 5, 2**33, 7 * 2**31, 2**32, 2**31)], ids=str)
def test_the_offset_helper(device, layout):
    first = 2**20 + 3
    out = torch.empty(4, 8, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, first, layout, ROWS=4, N=8)
    n1, n2, s0, s1, s2, sn = layout
    for r in range(4):
        row = first + r
        start = row // n2 // n1 * s0 + row // n2 % n1 * s1 + row % n2 * s2
        assert out[r].tolist() == [start + c * sn for c in range(8)]


# ---------------------------------------------------------------- bad input

X, W = torch.ones(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(())}, r"x: expected shape \(\.\.\., N\) with N >= 1, got \(\)"),
        ({"x": torch.ones(3, 0)}, r"x: expected shape .*, got \(3, 0\)"),
        ({"eps": 0.0}, r"eps: expected > 0 and finite, got 0\.0"),
        ({"eps": float("nan")}, "eps: expected > 0 and finite, got nan"),
        ({"x": X.int()}, "x: expected dtype float32, float16, bfloat16, got int32"),
        ({"weight": W.int()}, "weight: expected dtype .* got int32"),
        ({"weight": torch.ones(7)}, r"weight: expected shape \(8,\), the last of x, got \(7,\)"),
        ({"weight": torch.ones(3, 8)}, r"weight: expected shape \(8,\)"),
        ({"residual": torch.ones(8)}, r"residual: expected x's shape \(3, 8\), got \(8,\)"),
        ({"residual": X.bool()}, "residual: expected dtype .* got bool"),
        ({"weight": W.to("meta")}, "weight: expected device cpu, as x, got meta"),
        ({"residual": X.to("meta")}, "residual: expected device cpu, as x, got meta"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**({"x": X, "weight": W} | arguments))
