"""RMSNorm's numbers: every shape, dtype and layout against the oracle in fp64, and bitwise reproducibility."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from rooflight.kernels import reference, rms_norm
from rooflight.kernels import rms_norm as op
from rooflight.kernels import rms_norm_tiles as tiles
from rooflight.kernels.rms_norm_tiles import BACKWARD_LONGEST, BACKWARD_TILE, FORWARD_TILE
from support.tolerance import judge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def case(device, dtype, shape, *, residual=False, weight=True, weight_dtype=None):
    N = shape[-1]
    return {
        "x": draw(*shape, dtype=dtype, device=device),
        "weight": draw(N, dtype=weight_dtype or dtype, device=device, seed=1) if weight else None,
        "residual": draw(*shape, dtype=dtype, device=device, seed=2) if residual else None,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),  # the smallest
        (3, 2, 7),  # odd, less than the smallest tile
        (130, 64),  # a head's q/k norm: several rows a program, the last tile in part
        (33, 128),
        (5, 300),  # no multiple of 16
        (9, 1000),
        (2, 4097),  # one past a power of two
        (601, 64),  # enough for whole tiles: more of them than programs, the last in part
        (37, 1000),
    ],
    ids=str,
)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_shapes(device, dtype, shape, residual):
    # of one number dx is nothing but the cancellation dy - dy, unless eps is far beyond its square
    options = {"eps": 30.0} if shape[-1] == 1 else {}
    judge(rms_norm, reference.rms_norm, case(device, dtype, shape, residual=residual), **options)


@pytest.mark.parametrize(
    "options", [{"weight_offset": 1.0}, {"eps": 0.3}, {"weight_offset": -0.5, "eps": 1e-2}], ids=str
)
def test_offset_and_eps(device, options):
    judge(rms_norm, reference.rms_norm, case(device, torch.bfloat16, (7, 96), residual=True), **options)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_without_weight(device, residual):
    judge(rms_norm, reference.rms_norm, case(device, torch.float16, (7, 80), residual=residual, weight=False))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(device, dtype, weight_dtype):
    judge(rms_norm, reference.rms_norm, case(device, dtype, (6, 40), weight_dtype=weight_dtype))


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_the_stream_has_the_promoted_dtype(device, x_dtype, residual_dtype):
    inputs = case(device, x_dtype, (6, 40), residual=True)
    inputs["residual"] = inputs["residual"].to(residual_dtype)
    y, stream = rms_norm(**inputs)
    assert y.dtype == x_dtype
    assert stream.dtype == torch.float32
    judge(rms_norm, reference.rms_norm, inputs)


@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        (torch.bfloat16, (5, BACKWARD_LONGEST - 3), {"residual": True}),  # one tile: more rows than programs
        (torch.float16, (3, BACKWARD_LONGEST), {}),
        (torch.bfloat16, (3, BACKWARD_LONGEST), {"weight": False}),
        (torch.float16, (5, BACKWARD_LONGEST + 1), {}),  # a column in the last tile alone; the forward has one tile
        (torch.bfloat16, (3, BACKWARD_LONGEST + 5), {"residual": True}),  # the forward loops: two rows in registers
        (torch.bfloat16, (3, BACKWARD_LONGEST + 5), {"weight": False}),
        (torch.float32, (5, BACKWARD_TILE + 1), {"residual": True}),  # 4-byte rows have half the columns in a tile
        (torch.float32, (2, BACKWARD_LONGEST + 1), {}),
        (torch.bfloat16, (2, FORWARD_TILE + 3), {}),  # the forward loops
    ],
    ids=str,
)
def test_long_rows(device, dtype, shape, options):
    judge(rms_norm, reference.rms_norm, case(device, dtype, shape, **options), weight_offset=1.0)


@pytest.mark.parametrize("N", [BACKWARD_LONGEST - 1, BACKWARD_LONGEST + 1])
def test_long_strided_rows(device, N):
    inputs = case(device, torch.bfloat16, (2, 2, N), residual=True)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], -1)[..., 3 : 3 + N]

    def grad(out, generator):
        return torch.randn(out.shape, generator=generator).to(out).transpose(0, 1).contiguous().transpose(0, 1)

    judge(rms_norm, reference.rms_norm, inputs, grad=grad)


def test_the_longest_row(device):
    judge(rms_norm, reference.rms_norm, case(device, torch.bfloat16, (1, 131072)), backward=False)


def test_more_partial_sums_than_the_reduction_reads_at_once(device, monkeypatch):
    module = import_module("rooflight.kernels.rms_norm")
    monkeypatch.setattr(module.tiles, "REDUCE_ROWS", 2)
    module._backward_plans.cache_clear()
    judge(rms_norm, reference.rms_norm, case(device, torch.float32, (200, 40)))
    module._backward_plans.cache_clear()


LAYOUTS = {
    "heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # (B, T, H, D) stored, (B, H, T, D) seen
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),  # no unit stride, nothing merges
    "columns": lambda x: torch.cat([x, x], -1)[..., ::2],  # stride 2 in the last dimension
    "slice": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]],  # rows further apart, misaligned
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "one row": lambda x: x[:1, :1, :1].expand(x.shape),
    "constant rows": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(device, layout, residual):
    inputs = case(device, torch.float16, (2, 3, 5, 24), residual=residual)
    inputs["x"] = LAYOUTS[layout](inputs["x"])
    if residual:
        inputs["residual"] = LAYOUTS["heads"](inputs["residual"])
    inputs["weight"] = torch.stack([inputs["weight"]] * 2, -1)[:, 1]
    judge(rms_norm, reference.rms_norm, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_gradients(device, layout):
    """Of both outputs: a gradient that autograd hands over may have any layout."""

    def grad(out, generator):
        return LAYOUTS[layout](torch.randn(out.shape, generator=generator).to(out))

    judge(rms_norm, reference.rms_norm, case(device, torch.bfloat16, (2, 3, 5, 24), residual=True), grad=grad)


def test_strided_rows_are_not_copied(device, monkeypatch):
    x = LAYOUTS["heads"](draw(2, 3, 5, 24, device=device))
    expected = rms_norm(x, None)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a hidden copy"))
    assert torch.equal(rms_norm(x, None), expected)


def test_five_dimensions_that_do_not_merge(device):
    x = draw(2, 3, 2, 3, 8, device=device).permute(3, 1, 2, 0, 4)
    judge(rms_norm, reference.rms_norm, {"x": x, "weight": draw(8, device=device)})


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (16,)], ids=str)
def test_no_rows_and_no_leading_dimension(device, shape):
    judge(rms_norm, reference.rms_norm, case(device, torch.float32, shape, residual=True))
    if 0 in shape:
        weight = torch.ones(16, device=device, requires_grad=True)
        rms_norm(torch.empty(*shape, device=device), weight).sum().backward()
        assert torch.equal(weight.grad, torch.zeros(16, device=device))


def test_a_row_of_zeros_and_extreme_rows(device):
    x = torch.zeros(3, 32, device=device)
    x[1], x[2] = 1e-20, 1e18
    judge(rms_norm, reference.rms_norm, {"x": x, "weight": torch.ones(32, device=device)})


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_of_one_output_alone(device, which):
    def one(x, weight, residual):
        return rms_norm(x, weight, residual=residual)[which]

    def oracle(x, weight, residual):
        return reference.rms_norm(x, weight, residual=residual)[which] + 0 * weight.sum().to(x.dtype)

    inputs = case(device, torch.float32, (5, 24), residual=True)
    if which == 0:
        judge(one, oracle, inputs)
        return
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    dstream = draw(5, 24, device=device, seed=9)
    dx, dw, dresidual = torch.autograd.grad(one(**given), list(given.values()), dstream, allow_unused=True)
    assert torch.equal(dx, dstream)
    assert torch.equal(dresidual, dstream)
    assert dw is None


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("residual",), ("x", "residual")], ids=str)
def test_frozen_inputs(device, frozen):
    judge(rms_norm, reference.rms_norm, case(device, torch.float32, (5, 24), residual=True), frozen=frozen)


def test_the_residual_stream_is_rounded_before_it_is_normalised(device):
    inputs = case(device, torch.bfloat16, (64, 64), residual=True)
    y, stream = rms_norm(**inputs)
    assert torch.equal(stream, inputs["x"] + inputs["residual"])
    assert torch.equal(y, rms_norm(stream, inputs["weight"]))


def test_rstd_is_fp32(device):
    _, _, rstd = torch.ops.rooflight.rms_norm_fwd(
        draw(5, 24, dtype=torch.bfloat16, device=device), None, 1e-6, None, 0.0
    )
    assert rstd.dtype == torch.float32
    assert rstd.shape == (5,)


@pytest.mark.parametrize("N", [64, 5000, BACKWARD_LONGEST, BACKWARD_LONGEST + 8])
def test_bitwise_reproducible(device, N):
    repeats = 100 if device.type == "cuda" else 2
    rows = 257 if N == 64 else 3  # two programs in the interpreter: one of them has two rows
    inputs = {k: v.requires_grad_() for k, v in case(device, torch.bfloat16, (rows, N), residual=True).items()}
    dy, dstream = draw(rows, N, dtype=torch.bfloat16, device=device), draw(rows, N, dtype=torch.bfloat16, device=device)

    def gradients():
        return torch.autograd.grad(op(**inputs), list(inputs.values()), (dy, dstream))

    first = gradients()
    for _ in range(repeats - 1):
        assert all(map(torch.equal, gradients(), first))


def test_each_gpu_of_a_machine_has_tiles_of_its_own(monkeypatch):
    rows = import_module("rooflight.kernels.rows")
    targets = [GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)]
    current = SimpleNamespace(
        get_current_device=lambda: current.device, get_current_target=lambda: targets[current.device]
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", current)
    monkeypatch.setattr(rows, "INTERPRETED", False)
    rows._target_of.cache_clear()
    for current.device, columns, warps in ((0, 16384, 32), (1, 8192, 16), (2, 8192, 16), (0, 16384, 32)):
        tile = tiles.backward_tile(4096, 16384, 132, 2, residual=True)
        assert (tile.columns, tile.warps) == (columns, warps)
    rows._target_of.cache_clear()
