"""RoPE, SwiGLU and the cross-entropies as citizens of torch, the same checks for each."""

from __future__ import annotations

import pytest
import torch
import triton
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import cost, cross_entropy, gelu, linear_cross_entropy, rope, rope_qkv, swiglu

INTERPRETED = triton.knobs.runtime.interpret
ANGLES = torch.arange(5.0)[:, None] / torch.arange(1.0, 5.0)
TARGET = torch.tensor([3, -100, 7, 1])
LABELS = {"label_smoothing": 0.2, "class_weight": torch.arange(9.0)}


def _rope(q, k):
    return rope(q, k, ANGLES.cos().to(q.device), ANGLES.sin().to(q.device))


def _rope_qkv(qkv):
    return rope_qkv(qkv, ANGLES.cos().to(qkv.device), ANGLES.sin().to(qkv.device), 3, 1)


def _cross_entropy(logits):
    labels = LABELS | {"class_weight": LABELS["class_weight"].to(logits.device)}
    return cross_entropy(logits, TARGET.to(logits.device), z_loss=0.1, **labels)


def _linear_cross_entropy(x, weight):
    labels = LABELS | {"class_weight": LABELS["class_weight"].to(x.device)}
    return linear_cross_entropy(x, weight, TARGET.to(x.device), softcap=3.0, z_loss=0.1, **labels)


# name: (function, shapes of the tensors that need a gradient)
OPS = {
    "rope": (_rope, [(2, 3, 5, 8), (2, 1, 5, 8)]),
    "rope_qkv": (_rope_qkv, [(2, 5, 40)]),
    "swiglu": (swiglu, [(4, 6), (4, 6)]),
    "swiglu joined": (swiglu, [(4, 12)]),
    "gelu": (gelu, [(4, 6)]),
    "cross_entropy": (_cross_entropy, [(4, 9)]),
    "linear_cross_entropy": (_linear_cross_entropy, [(4, 6), (9, 6)]),
}
COSTS = {
    "rope": lambda backward: cost.rope_cost(2, 3, 1, 5, 8, backward=backward),
    "rope_qkv": lambda backward: cost.rope_qkv_cost(2, 3, 1, 5, 8, backward=backward),
    "swiglu": lambda backward: cost.swiglu_cost(4, 6, backward=backward),
    "swiglu joined": lambda backward: cost.swiglu_cost(4, 6, backward=backward),
    "gelu": lambda backward: cost.gelu_cost(4, 6, backward=backward),
    "cross_entropy": lambda backward: cost.cross_entropy_cost(
        4, 9, backward=backward, label_smoothing=True, class_weight=True
    ),
    "linear_cross_entropy": lambda backward: cost.linear_cross_entropy_cost(
        4, 6, 9, backward=backward, keep_gradients=True, label_smoothing=True, class_weight=True
    ),
}


def draw(name, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in OPS[name][1]]


def scalar(out):
    return sum(o.square().sum() for o in out) if isinstance(out, tuple) else out.square().sum()


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs in the interpreter only")
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(OPS[name][0], draw(name, dtype=torch.float64), fast_mode=True)


def test_opcheck(device):
    ops, target = torch.ops.rooflight, TARGET.to(device)
    table = ANGLES.cos().to(device)
    torch.library.opcheck(ops.rope_turn.default, (*draw("rope", device), table, table, None, True, False))
    (qkv,) = draw("rope_qkv", device)
    heads = qkv.detach().unflatten(-1, (5, 8)).transpose(1, 2).split((3, 1, 1), 1)
    args = (*(x.clone().requires_grad_() for x in heads), table, table, None, False)
    torch.library.opcheck(ops.rope_join.default, args)
    (both,) = draw("swiglu joined", device)
    torch.library.opcheck(ops.swiglu_joined_fwd.default, (both,))
    torch.library.opcheck(ops.swiglu_joined_bwd.default, (both.detach()[:, :6], both.detach()))
    (x,) = draw("gelu", device)
    torch.library.opcheck(ops.gelu_fwd.default, (x,))
    torch.library.opcheck(ops.gelu_bwd.default, (x.detach(), x.detach()))
    gate, up = draw("swiglu", device)
    torch.library.opcheck(ops.swiglu_fwd.default, (gate, up))
    torch.library.opcheck(ops.swiglu_bwd.default, (gate.detach(), gate.detach(), up.detach()))
    (logits,), classes = draw("cross_entropy", device), torch.arange(9.0, device=device)
    torch.library.opcheck(ops.cross_entropy_fwd.default, (logits, target, -100, 0.1, 0.2, classes))
    loss, lse = (t.detach() for t in ops.cross_entropy_fwd(logits, target, -100, 0.1, 0.2, classes))
    torch.library.opcheck(ops.cross_entropy_bwd.default, (loss, logits.detach(), target, lse, -100, 0.1, 0.2, classes))
    x, weight = draw("linear_cross_entropy", device)
    torch.library.opcheck(ops.linear_cross_entropy_fwd.default, (x, weight, target, -100, 0.0, 0.1, 0.2, classes))
    args = (loss, x.detach(), weight.detach(), target, lse, -100, 0.0, 0.1, 0.2, classes, True, False)
    torch.library.opcheck(ops.linear_cross_entropy_bwd.default, args)
    args = (x, weight, target, -100, 0.0, 0.1, 0.2, classes, "mean", True, True)
    torch.library.opcheck(ops.linear_cross_entropy_kept.default, args)
    total, dx, dweight = (t.detach() for t in ops.linear_cross_entropy_kept(*args))
    torch.library.opcheck(ops.linear_cross_entropy_scale.default, (total, total, dx, dweight))


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_graph_break(device, name):
    torch._dynamo.reset()
    function = OPS[name][0]
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    inputs = draw(name, device)

    def loss(*inputs):
        return scalar(function(*(2 * x for x in inputs)))

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    ours, eager = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


def of_length(name, n):
    """Arguments for n tokens: (tensors that need a gradient, the others)."""
    leaves = {"rope": [(2, 3, n, 8), (2, 1, n, 8)], "rope_qkv": [(2, n, 40)], "swiglu": [(n, 6), (n, 6)],
              "swiglu joined": [(n, 12)], "gelu": [(n, 6)], "cross_entropy": [(n, 9)],
              "linear_cross_entropy": [(n, 6), (9, 6)]}[name]  # fmt: skip
    tables = [torch.rand(n, 4), torch.rand(n, 4)]
    others = {"rope": tables, "rope_qkv": [*tables, 3, 1], "swiglu": [], "swiglu joined": [], "gelu": []}
    others = others.get(name, [torch.arange(n) % 9])
    return [torch.randn(shape) for shape in leaves], others


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("name", OPS)
def test_one_compilation_serves_every_length(device, name):
    torch._dynamo.reset()
    function = {"rope": rope, "rope_qkv": rope_qkv, "swiglu": swiglu, "swiglu joined": swiglu, "gelu": gelu,
                "cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}[name]  # fmt: skip
    counter = CompileCounterWithBackend("aot_eager")

    def loss(*args):
        return scalar(function(*args))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (5, 8, 13):
        leaves, others = of_length(name, n)
        leaves = [x.to(device).requires_grad_() for x in leaves]
        others = [x.to(device) if isinstance(x, torch.Tensor) else x for x in others]
        ours, eager = (torch.autograd.grad(f(*leaves, *others), leaves) for f in (compiled, loss))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]  # the first call may start over, to take an option's value for a constant


@pytest.mark.parametrize("name", OPS)
def test_flops_agree_with_cost(device, name):
    with FlopCounterMode(display=False) as counter:
        scalar(OPS[name][0](*draw(name, device))).backward()
    assert counter.get_total_flops() == sum(COSTS[name](backward).flops for backward in (False, True))


@pytest.mark.parametrize("name", [name for name in OPS if "rope" not in name])  # its derivative is itself
def test_a_second_derivative_is_refused(device, name):
    inputs = draw(name, device)
    (first, *_) = torch.autograd.grad(scalar(OPS[name][0](*inputs)), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


@pytest.mark.skipif(not INTERPRETED, reason="fp64 runs in the interpreter only")
@pytest.mark.parametrize("name", ["rope", "rope_qkv"])
def test_rope_differentiates_twice(name):
    assert torch.autograd.gradgradcheck(OPS[name][0], draw(name, dtype=torch.float64), fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_functional_transforms_are_refused(device, name):
    inputs = draw(name, device)
    with pytest.raises(
        NotImplementedError, match=rf"{name.split()[0]}: its Triton kernels do not run under torch\.func"
    ):
        torch.func.grad(lambda *inputs: scalar(OPS[name][0](*inputs)))(*inputs)
