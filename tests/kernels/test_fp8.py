"""Products of fp8 operands: the rounding bit for bit, the products within their accumulation's error."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import cost, fp8, fp8_linear, reference
from support.tolerance import judge

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: 448.0, E5M2: 57344.0}
LOW = torch.bfloat16


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, spread=0.0):
    """spread: of the magnitudes' exponents."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(spread * torch.randn(*shape, generator=generator))
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


def by_definition(x, dtype):
    """Every number's nearest in the format's list, the even code of two as near; the least power of two in range."""
    x = x.double().cpu().contiguous()
    exponent = -126
    while x.abs().max() > FORMATS[dtype] * 2.0**exponent:
        exponent += 1
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(dtype).double()
    codes, values = codes[values.isfinite()].int(), values[values.isfinite()]
    y = x.abs() / 2.0**exponent
    above = torch.searchsorted(values, y).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - y, y - values[below]
    take = (up < down) | ((up == down) & (codes[above] % 2 == 0))
    sign = torch.signbit(x).int() << 7
    return torch.where(take, codes[above], codes[below]) | sign, 2.0**exponent


INPUTS = {
    "one": lambda: torch.tensor([[3.0]]),
    "one tile": lambda: draw(fp8.BLOCK_M, fp8.BLOCK_N),
    "no whole tile, several for a program": lambda: draw(3 * fp8.BLOCK_M + 5, 2 * fp8.BLOCK_N + 9, dtype=LOW),
    "small numbers of the format": lambda: draw(70, 40, spread=8.0),
    "fp16": lambda: draw(33, 20, dtype=torch.float16),
    "fp16, whose small numbers a division in fp16 would round": lambda: torch.tensor(
        [[60000.0, 2.0**-16 + 2.0**-24]], dtype=torch.float16
    ),
    "at the end of the range": lambda: torch.tensor([[1.75, 0.3], [-1.75, 1e-3]]),
    "past it": lambda: torch.tensor([[1.75, 0.3], [-1.75, 1e-3]]).nextafter(torch.tensor(4.0)),
    "between two codes": lambda: torch.arange(-448.0, 449.0)[:, None].repeat(1, 2) / 64,
    "nothing": lambda: torch.tensor([[0.0, -0.0]] * 17),
    "nearly nothing": lambda: draw(16, 16) * 2.0**-120,
    "nearly too much": lambda: draw(16, 16) * 2.0**124,
    "transposed": lambda: draw(40, 70).T,
    "expanded": lambda: draw(40, 1).expand(40, 33),
    "every other column": lambda: draw(20, 70)[:, ::2],
}


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_rounding_is_that_of_the_definition(device, name, dtype):
    x = INPUTS[name]()
    expected, scale = by_definition(x, dtype)
    x = x.to(device) if name != "expanded" else x[:, :1].to(device).expand(x.shape)
    codes, turned, found = fp8.quantize(x, dtype)
    eager, theirs = reference.fp8_quantize(x, dtype)
    for some in (codes, eager):
        assert some.dtype == dtype
        assert torch.equal(some.view(torch.uint8).int().cpu(), expected)
    assert found.item() == theirs.item() == scale
    assert turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).T)
    alone, none, _ = fp8.quantize(x, dtype, transposed=False)
    assert none is None
    assert torch.equal(alone.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
def test_a_number_that_is_not_finite_shows_everywhere(device, value):
    """In the last element of the last program's last tile; the loop stops at a loss that is not finite."""
    clean = draw(160, 80, device=device)
    x = clean.clone()
    x[-1, -1] = value
    for quantize in (fp8.quantize, reference.fp8_quantize):
        assert quantize(x, E4M3)[-1].isnan()
    weight = draw(32, 80, device=device)
    for function in (fp8_linear, reference.fp8_linear):
        assert function(x, weight).isnan().all()
        assert function(weight, x).isnan().all()
        a, b = clean.clone().requires_grad_(), weight.clone().requires_grad_()
        dy = torch.ones(160, 32, device=device)
        dy[0, 0] = value
        assert all(g.isnan().all() for g in torch.autograd.grad(function(a, b), (a, b), dy))


# sizes: the least; of one tile and of several with a rest; leading dimensions
SHAPES = [((16, 16), 16), ((48, 80), 32), ((2, 3, 160, 208), 144)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, LOW], ids=str)
@pytest.mark.parametrize(("shape", "rows"), SHAPES, ids=str)
def test_products_are_those_of_the_rounded_operands(device, dtype, shape, rows):
    """Against the oracle in fp64, which rounds to the same codes: fp8's own error is in neither."""
    x, weight = draw(*shape, dtype=dtype, device=device), draw(rows, shape[-1], dtype=dtype, device=device, seed=1)
    if device.type == "cpu" or dtype != torch.float32:
        judge(fp8_linear, reference.fp8_linear, {"x": x, "weight": weight})
        return
    # the tensor cores' sums keep fewer bits than fp32 has: against what they add up
    exact = reference.fp8_linear(x.double(), weight.double())
    size = reference.fp8_linear(x.double().abs(), weight.double().abs())
    assert ((fp8_linear(x, weight) - exact).abs() <= 2**-13 * size).all()


def test_what_is_rounded_is_near_the_plain_layer(device):
    """Relative to the product's size by what 3 and 2 bits of mantissa give: 2^-4 and 2^-3 at most, a third in mean."""
    x, weight = (draw(*s, device=device).requires_grad_() for s in ((64, 256), (96, 256)))
    dy = draw(64, 96, device=device, seed=2)

    def both(function):
        y = function(x, weight)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]

    ours, exact = both(fp8_linear), both(torch.nn.functional.linear)
    for a, b, bound in zip(ours, exact, (0.05, 0.08, 0.08), strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert bound / 4 < error < bound


def test_a_weight_in_fp32_beside_low_inputs_has_its_gradient_in_fp32(device):
    x, weight = draw(32, 48, dtype=LOW, device=device).requires_grad_(), draw(16, 48, device=device).requires_grad_()
    with torch.autocast(device.type, LOW):
        y = fp8_linear(x, weight)
    dx, dw = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert [t.dtype for t in (y, dx, dw)] == [LOW, LOW, torch.float32]
    a, b = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = reference.fp8_linear(a, b)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=2**-7, atol=0.02)
    (truth,) = torch.autograd.grad(exact, b, 2 * y.detach().double())
    torch.testing.assert_close(
        dw.double(), truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item()
    )  # no bf16 in between


@pytest.mark.parametrize("function", [fp8_linear, reference.fp8_linear], ids=["kernels", "eager"])
def test_autocast_changes_nothing(device, function):
    """Neither of the operands' products nor of what comes back, whatever the pass."""
    results = []
    for enabled in (False, True):
        inputs = [draw(*s, device=device).requires_grad_() for s in ((32, 48), (16, 48))]
        with torch.autocast(device.type, LOW, enabled=enabled):
            y = function(*inputs)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_is_needed_is_kept(device, frozen):
    """One byte an element of what the gradients take, and the scales."""
    x, weight = draw(32, 48, device=device), draw(16, 48, device=device)
    kept = []
    (weight if frozen == "x" else x).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = fp8_linear(x, weight)
    assert sum(kept) == (32 * 48 if frozen == "x" else 16 * 48) + 8
    y.sum().backward()
    whole = x.detach().requires_grad_(), weight.detach().requires_grad_()
    expected = reference.fp8_linear(*whole)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip((x, weight), whole, strict=True):
        assert (ours.grad is None) == (not ours.requires_grad)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_memory_for_the_backward_pass(device):
    kept = []
    x, weight = (draw(*s, dtype=LOW, device=device).requires_grad_() for s in ((4, 32, 48), (64, 48)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fp8_linear(x, weight)
        assert sum(kept) == 128 * 48 + 64 * 48 + 8
        kept.clear()
        reference.fp8_linear(x, weight)
        assert sum(kept) == 128 * 48 + 64 * 48 + 8


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(16, 24), torch.ones(16, 24), r"weight: expected \(N, K\), multiples of 16, got \(16, 24\)"),
        (torch.ones(16, 16), torch.ones(16), r"weight: expected \(N, K\), multiples of 16, got \(16,\)"),
        (torch.ones(16, 16), torch.ones(0, 16), r"weight: expected \(N, K\), multiples of 16"),
        (torch.ones(16, 32), torch.ones(16, 16), r"x: expected shape \(\.\.\., 16\), got \(16, 32\)"),
        (torch.ones(3, 5, 16), torch.ones(16, 16), r"x: expected a multiple of 16 rows, got 15 in \(3, 5, 16\)"),
        (torch.ones(16, 16).int(), torch.ones(16, 16), "x: expected dtype .* got int32"),
        (torch.ones(16, 16), torch.ones(16, 16).half(), "weight: expected dtype float32.* got float16"),
        (torch.ones(16, 16), torch.ones(16, 16, device="meta"), "weight: expected device cpu, as x, got meta"),
    ],
)
def test_bad_input(x, weight, message):
    with pytest.raises(ValueError, match=message):
        fp8_linear(x, weight)


@pytest.mark.parametrize(
    ("capability", "message"),
    [((8, 0), "compute capability 8.9 or later, got NVIDIA A100, which is of 8.0"), ((8, 9), None), ((9, 0), None)],
)
def test_a_gpu_without_fp8_is_named(monkeypatch, capability, message):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    reason = fp8.refusal(torch.device("cuda", 0))
    assert reason is None if message is None else reason.endswith(message)


# ---------------------------------------------------------------- as a citizen of torch


def leaves(device, n=32):
    return [draw(*s, device=device).requires_grad_() for s in ((2, n, 48), (16, 48))]


def test_opcheck(device):
    ops = torch.ops.rooflight
    x, weight = leaves(device)
    every = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(ops.fp8_linear_fwd.default, (x, weight, False, False), test_utils=every)
    # fp8 outputs that torch's own check sums up, and fp8 inputs that it compares by arithmetic, are beyond it
    torch.library.opcheck(ops.fp8_linear_fwd.default, (x, weight, True, True), test_utils=every[:3])
    y, *saved = (t.detach() for t in ops.fp8_linear_fwd(x, weight, True, True))
    torch.library.opcheck(ops.fp8_linear_bwd.default, (torch.ones_like(y), *saved, True), test_utils=every[1:])


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("function", [fp8_linear, reference.fp8_linear], ids=["kernels", "eager"])
def test_compiles_without_a_graph_break(device, function):
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"

    def loss(x, weight):
        return function(2 * x, weight).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (32, 64):
        inputs = leaves(device, n)
        ours, eager = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)


def test_flops(device):
    with FlopCounterMode(display=False) as counter:
        fp8_linear(*leaves(device)).sum().backward()
    assert counter.get_total_flops() == 3 * cost.matmul_cost(64, 16, 48).flops


@pytest.mark.parametrize("function", [fp8_linear, reference.fp8_linear], ids=["kernels", "eager"])
def test_a_second_derivative_is_refused(device, function):
    inputs = leaves(device)
    (dx, _) = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second derivatives|once_differentiable"):
        dx.sum().backward()


def test_functional_transforms_are_refused(device):
    inputs = leaves(device)
    with pytest.raises(NotImplementedError, match=r"fp8_linear: its Triton kernels do not run under torch\.func"):
        torch.func.grad(lambda *inputs: fp8_linear(*inputs).sum())(*inputs)
