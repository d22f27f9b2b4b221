"""The corrections make the interpreter right, and each of the tests' patches catches the fault it is there for."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from rooflight.kernels.interpreter import narrow, widen
from support.interpreter import extent, poisoned_empty

INTERPRETED = triton.knobs.runtime.interpret
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: there is a GPU"),
]
OUT_OF_BOUNDS = "out of bounds"


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    tl.store(out_ptr + i, a * b)
    tl.store(out_ptr + BLOCK + i, a + b)
    tl.store(out_ptr + 2 * BLOCK + i, a - b)
    tl.store(out_ptr + 3 * BLOCK + i, tl.where(a > b, a, b))
    tl.store(out_ptr + 4 * BLOCK + i, tl.maximum(a, b))
    tl.store(out_ptr + 5 * BLOCK + i, tl.zeros((BLOCK,), tl.bfloat16) + tl.max(a))
    tl.store(out_ptr + 6 * BLOCK + i, tl.full((BLOCK,), 1.5, tl.bfloat16) + tl.sum(b))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, c)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n_read, n_write, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < n_read, other=0.0)
    tl.store(y_ptr + i, x, mask=i < n_write)


@triton.jit
def _unmasked_copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _no_other_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + i, mask=i < n).to(tl.float32)))


@triton.jit
def _atomic_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + i, 1.0, mask=i < n)


@triton.jit
def _loop_kernel(x_ptr, n):
    total = 0.0
    for i in range(n):
        total += tl.load(x_ptr + i)
    tl.store(x_ptr, total)


@triton.jit
def _descriptor_kernel(x_ptr, y_ptr, n_rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [n_rows, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], x.load([0, 0]))


def test_bfloat16_bits_match_torch():
    values = torch.cat([torch.randn(4096) * 10.0**e for e in range(-38, 38, 4)] + [torch.tensor([0.0, -0.0, 3e38])])
    ties = (torch.arange(0, 0x7F80, 7, dtype=torch.int32) * 2**16 + 2**15).view(torch.float32)
    for x in (values, ties):
        expected = x.bfloat16()
        assert torch.equal(torch.from_numpy(narrow(x.numpy())).view(torch.bfloat16), expected)
        assert torch.equal(torch.from_numpy(widen(expected.view(torch.uint16).numpy())), expected.float())


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts_round_to_nearest_even(source, target):
    x = torch.randn(1000).to(source)
    y = torch.empty(1000, dtype=target)
    _cast_kernel[(1,)](x, y, 1000, BLOCK=1024)
    assert torch.equal(y, x.to(target))


@pytest.mark.parametrize(("target", "end"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)], ids=str)
def test_casts_to_fp8_are_torchs(target, end):
    """Codes, ties between two of them, what lies beside these, and numbers that are none in the format."""
    codes = torch.arange(128, dtype=torch.uint8).view(target).float()
    codes = codes[codes.isfinite()]
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [ties.nextafter(torch.full_like(ties, to)) for to in (0.0, end)]
    tiny = torch.tensor([1e-45, 1e-30, 1e-8])
    x = torch.cat([codes, ties, *beside, tiny])
    x = torch.cat([x, -x])
    y = torch.empty(len(x), dtype=target)
    _cast_kernel[(1,)](x, y, len(x), BLOCK=2048)
    assert torch.equal(y.view(torch.uint8), x.to(target).view(torch.uint8))


def test_bfloat16_arithmetic_is_exact():
    a, b = torch.randn(2, 64).bfloat16()
    out = torch.empty(7, 64, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](a, b, out, BLOCK=64)
    total = b.float().sum().bfloat16()
    expected = [a * b, a + b, a - b, torch.maximum(a, b), torch.maximum(a, b), a.max().expand(64)]
    expected.append((total + 1.5).expand(64))
    assert torch.equal(out, torch.stack(expected))


def test_a_dot_of_fp32_rounds_once():
    """Whatever order this processor's BLAS adds in; here one that rounds as it goes loses the small terms."""
    a = torch.full((64, 64), 2.0**-13)
    a[:, 0] = 2.0**12
    b, c = torch.ones(64, 64), torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, c, N=64)
    assert torch.equal(c, torch.full((64, 64), 2.0**12 + 63 * 2.0**-13).double().float())


def test_bfloat16_dot_accumulates_in_fp32():
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, N=16)
    assert (c - a.double() @ b.double()).abs().max() < 1e-5


def test_a_loop_with_a_runtime_bound_runs():
    x = torch.ones(5)
    _loop_kernel[(1,)](x, 5)
    assert x[0] == 5


@pytest.mark.parametrize(
    ("n_read", "n_write", "stride"),
    [(101, 100, 1), (100, 101, 1), (100, 100, 2), (1, 100, -1), (2, 100, -1), (2, 2, 2**30)],
)
def test_a_stray_lane_is_refused(n_read, n_write, stride):
    # x and y are neighbours in one storage, so that a stray lane of either often lands in the other
    storage = torch.zeros(300)
    x, y = storage[100:200], storage[:100]
    legal = max(n_read, n_write) <= 100 and 0 <= (n_read - 1) * stride < 100
    if legal:
        _copy_kernel[(1,)](x, y, n_read, n_write, stride, BLOCK=128)
    else:
        with pytest.raises(Exception, match=OUT_OF_BOUNDS):
            _copy_kernel[(1,)](x, y, n_read, n_write, stride, BLOCK=128)


def test_unmasked_lanes_are_checked():
    _unmasked_copy_kernel[(1,)](torch.ones(64), torch.ones(64), BLOCK=64)
    for n_x, n_y in ((63, 64), (64, 63)):
        with pytest.raises(Exception, match=OUT_OF_BOUNDS):
            _unmasked_copy_kernel[(1,)](torch.ones(n_x), torch.ones(n_y), BLOCK=64)


def test_a_strided_view_owns_its_whole_extent():
    x = torch.arange(200.0)[:199:2]
    y = torch.empty(100)
    _copy_kernel[(1,)](x, y, 100, 100, 2, BLOCK=128)
    assert torch.equal(y, x)
    assert extent(x)[1] - extent(x)[0] == 199 * 4
    assert extent(x[:0])[0] == extent(x[:0])[1]
    assert extent(x[3:4].expand(7))[1] - extent(x[3:4].expand(7))[0] == 4


def test_stray_atomics_are_refused():
    x = torch.zeros(10)
    _atomic_kernel[(1,)](x, 10, BLOCK=16)
    assert torch.equal(x, torch.ones(10))
    with pytest.raises(Exception, match=OUT_OF_BOUNDS):
        _atomic_kernel[(1,)](x, 11, BLOCK=16)


def test_a_descriptor_that_overstates_its_tensor_is_refused():
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    _descriptor_kernel[(1,)](x, y, 16, BLOCK=16)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match=OUT_OF_BOUNDS):
        _descriptor_kernel[(1,)](x[:12], y, 16, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_masked_lane_without_other_is_nan(dtype):
    x, y = torch.ones(10, dtype=dtype), torch.zeros(1)
    _no_other_kernel[(1,)](x, y, 10, BLOCK=16)
    assert y.isnan()


def test_uninitialised_memory_is_nan():
    x = torch.zeros(3, dtype=torch.bfloat16)
    for made in (torch.empty(2, 3), torch.empty_like(x), x.new_empty(4), torch.empty_strided((2, 2), (4, 1))):
        assert made.isnan().all()
    assert torch.empty(2, dtype=torch.int32).eq(2**31 - 1).all()


# ---------------------------------------------------------------- a user's process, without the patches of these tests

USERS_OWN = """
import sys

import torch
import triton
import triton.language as tl

if sys.argv[1:]:  # an interpreter whose internals are not those that are known
    from triton.runtime.interpreter import InterpreterBuilder
    delattr(InterpreterBuilder, sys.argv[1])

import rooflight.kernels as kernels
from rooflight.kernels import reference


@triton.jit
def _users_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.bfloat16)
    for row in range(n):  # a bound known at run time
        total += tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


def near(ours, exact):
    assert ours.dtype == torch.bfloat16 and ours.isfinite().all(), ours
    assert (ours.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


generator = torch.Generator().manual_seed(0)
x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 64), (64,)))
qkv = [torch.randn(1, 2, 40, 32, generator=generator).bfloat16().requires_grad_() for _ in "qkv"]
if sys.argv[1:]:
    for name, call in {"x": lambda: kernels.rms_norm(x, weight), "q": lambda: kernels.flash_attention(*qkv)}.items():
        try:
            call()
        except ValueError as error:
            assert str(error).startswith(f"{name}: expected dtype float32 or float16, got bfloat16"), error
            assert triton.__version__ in str(error)
        else:
            raise AssertionError(f"{name} was not refused")
    exact = reference.rms_norm(x.double(), weight.double())
    torch.testing.assert_close(kernels.rms_norm(x.float(), weight.float()).double(), exact, rtol=1e-5, atol=1e-5)
else:
    near(kernels.rms_norm(x, weight), reference.rms_norm(x.double(), weight.double()))
    doubles = [t.detach().double().requires_grad_() for t in qkv]
    out, exact = kernels.flash_attention(*qkv), reference.flash_attention(*doubles)
    near(out, exact)
    dout = torch.randn(out.shape, generator=generator).bfloat16()
    for ours, theirs in zip(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(exact, doubles, dout.double())):
        near(ours, theirs)
    y = torch.zeros(64, dtype=torch.bfloat16)
    _users_kernel[(1,)](x, y, 5, BLOCK=64)
    expected = torch.zeros_like(y)
    for row in x:
        expected += row
    assert torch.equal(y, expected)
print("right")
"""


@pytest.mark.parametrize("missing", [[], ["create_clampf"]], ids=["corrected", "unknown"])
def test_a_user_gets_bfloat16_right_or_refused(missing, tmp_path):
    script = tmp_path / "users_own.py"  # triton reads a kernel's source from its file
    script.write_text(USERS_OWN, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, *missing],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.stdout.strip() == "right", done.stderr


def test_types_that_are_made_once_are_what_they_were():
    """support.interpreter_speed keeps them: each element type and shape has its own, wrong shapes are still errors."""
    pointers = [tl.pointer_type(tl.float32), tl.pointer_type(tl.bfloat16), tl.pointer_type(tl.float32, const=True)]
    elements = [tl.float32, tl.bfloat16, tl.int32, tl.uint32, tl.int64, tl.int1, *pointers]
    shapes = [[16], [1], [16, 1], [1, 16], [4, 4], [2, 2, 4]]
    blocks = [tl.block_type(element, shape) for element in elements for shape in shapes]
    for i, block in enumerate(blocks):
        element, shape = elements[i // len(shapes)], shapes[i % len(shapes)]
        assert (block.scalar, list(block.shape), block.numel) == (element, shape, math.prod(shape))
        assert [j for j, other in enumerate(blocks) if other == block] == [i]
        assert tl.block_type(element, [tl.constexpr(size) for size in shape]) == block
        for _ in range(2):
            tensor = tl.tensor(None, block)
            assert (tensor.type, tensor.dtype, tensor.numel.value) == (block, element, block.numel)
            assert [size.value for size in tensor.shape] == shape
    for shape, error in (([3], ValueError), ([], TypeError)):
        for _ in range(2):
            with pytest.raises(error):
                tl.block_type(tl.float32, shape)
    assert tl.float32 == tl.constexpr(tl.float32) != tl.float16
    assert tl.float32 != "fp32"


def test_the_compiler_traces_an_allocation_that_is_poisoned():
    """It knows functions by a table that may be older than the patches: then it reads what stands in their place."""

    def function(x):
        return torch.empty_like(x), x + 1

    torch.compile(lambda x: x + 2, fullgraph=True, backend="eager")(torch.ones(3))  # the table
    with poisoned_empty():
        empty, more = torch.compile(function, fullgraph=True, backend="eager")(torch.ones(3))
    assert empty.isnan().all()
    assert more.eq(2).all()
