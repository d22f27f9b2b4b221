"""Attention as a citizen of torch: operators, torch.compile, gradcheck, FLOP counts, autocast, the CPU fallback."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import cost, reference
from rooflight.kernels.attention import FlashAttentionFunction, flash_attention, flash_attention_varlen
from rooflight.kernels.attention.launch import bwd_op, fwd_op
from support.attention import draw, draw_sinks, draw_slopes, tile


@pytest.fixture(autouse=True)
def small_tiles():
    with tile(16, 16):
        yield


def ends(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


OPTIONS = {
    "plain": {},
    "everything": {"window": (9, 3), "causal": False, "softcap": 2.0, "sinks": True, "lse": True},
}


def operator_arguments(device, *, varlen, sinks, requires_grad):
    """Arguments of the forward operator."""
    x = draw(1, 2, 1, 20, 24, 16, torch.float32, device)
    q, k, v = x.values()
    bounds = (None, None, 20, 24)
    if varlen:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        bounds = (ends(0, 5, 20, device=device), ends(0, 9, 24, device=device), 15, 15)
    s = draw_sinks(2, torch.float32, device) if sinks else None
    tensors = [t if t is None else t.detach().requires_grad_(requires_grad) for t in (q, k, v, s)]
    slopes = draw_slopes(2, 2, device=device)[0] if sinks else draw_slopes(2 if varlen else 1, 2, device=device)
    return (*tensors, *bounds, 9, 0, 0.25, 2.0, slopes)


@pytest.mark.parametrize(("varlen", "sinks"), [(False, True), (True, False)])
def test_opcheck(varlen, sinks, device):
    torch.library.opcheck(fwd_op, operator_arguments(device, varlen=varlen, sinks=sinks, requires_grad=True))
    args = operator_arguments(device, varlen=varlen, sinks=sinks, requires_grad=False)
    out, *statistics = fwd_op(*args)
    dlse = torch.ones_like(statistics[0]) if sinks else None
    torch.library.opcheck(bwd_op, (torch.ones_like(out), dlse, *args[:3], out, *statistics, *args[3:]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("varlen", [False, True])
def test_gradcheck(varlen, options, device):
    if device.type != "cpu":
        pytest.skip("fp64 is for the interpreter")
    keywords = dict(OPTIONS[options])
    with_sinks, with_lse = keywords.pop("sinks", False), keywords.pop("lse", False)
    inputs = [x.requires_grad_() for x in draw(1, 2, 1, 7, 18, 3, torch.float64).values()]
    if with_sinks:
        inputs.append(draw_sinks(2, torch.float64).requires_grad_())

    def op(q, k, v, sinks=None):
        if not varlen:
            return flash_attention(q, k, v, sinks=sinks, return_lse=with_lse, **keywords)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        bounds = ends(0, 2, 7, device=device), ends(0, 10, 18, device=device), 5, 10
        return flash_attention_varlen(q, k, v, *bounds, sinks=sinks, return_lse=with_lse, **keywords)

    # fast mode: one random projection of the whole Jacobian, which any wrong entry shifts
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic, device):
    torch._dynamo.reset()

    def loss(q, k, v, sinks):
        out, lse = flash_attention(q * 1.5, k, v, sinks=sinks, window=9, return_lse=True)
        return out.square().sum() + lse.sum() + flash_attention(q, k, v).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, T, S in [(1, 20, 24), (2, 17, 17)] if dynamic else [(1, 20, 24)]:
        inputs = [*draw(B, 2, 1, T, S, 16, torch.float32, device).values(), draw_sinks(2, torch.float32, device)]
        leaves = [x.requires_grad_() for x in inputs]
        expected, found = loss(*leaves), compiled(*leaves)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_compile_varlen_without_a_graph_break(device):
    torch._dynamo.reset()

    def loss(q, k, v, cu_q, cu_k):
        return flash_attention_varlen(q, k, v, cu_q, cu_k, 15, 15).square().sum()

    q, k, v = (x[0].transpose(0, 1) for x in draw(1, 2, 1, 20, 24, 16, torch.float32, device).values())
    bounds = ends(0, 5, 20, device=device), ends(0, 9, 24, device=device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    expected, found = (
        loss(*leaves, *bounds),
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves, *bounds),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.slow
def test_compile_with_inductor(device, tmp_path, monkeypatch):
    torch._dynamo.reset()
    # its cache on disk knows an operator by name only, and would bring back a graph of an earlier signature
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 1, 20, 20, 16, torch.float32, device).values())

    def loss(q, k, v):
        return flash_attention(q * 2, k, v).sin().sum()

    expected, found = loss(q, k, v), torch.compile(loss, fullgraph=True)(q, k, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v)), torch.autograd.grad(expected, (q, k, v)))


MASKS = [(True, None), (False, None), (True, 9), (False, (5, 3)), (True, (4, 7))]


@pytest.mark.cpu
@pytest.mark.parametrize(("causal", "window"), MASKS, ids=str)
def test_flop_counter_agrees_with_cost(causal, window, device):
    B, H, _, T, S, D = sizes = 2, 4, 2, 20, 24, 16
    leaves = [x.requires_grad_() for x in draw(*sizes, torch.float32, device).values()]
    with FlopCounterMode(display=False) as counter:
        flash_attention(*leaves, causal=causal, window=window).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    pairs = B * H * int(reference.visible_mask(T, S, causal, window).sum())
    assert counted[fwd_op.overloadpacket] == 2 * 2 * D * pairs  # two products, two FLOPs a multiply-add
    assert counted[bwd_op.overloadpacket] == 5 * 2 * D * pairs
    for backward, op in ((False, fwd_op), (True, bwd_op)):
        expected = cost.flash_attention_cost(*sizes, causal, window, "float32", backward=backward)
        assert counted[op.overloadpacket] == expected.flops


@pytest.mark.cpu
def test_flop_counter_agrees_with_torch_on_a_full_mask(device):
    x = [t.requires_grad_() for t in draw(2, 4, 4, 20, 24, 16, torch.float32, "meta").values()]
    y = [t.requires_grad_() for t in draw(2, 4, 4, 20, 24, 16, torch.float32, device).values()]
    with FlopCounterMode(display=False) as theirs:
        out, *rest = torch.ops.aten._scaled_dot_product_efficient_attention(*x, None, True)
        torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            out, *x, None, out, *rest, 0.0, [True, True, True, False]
        )
    with FlopCounterMode(display=False) as ours:
        flash_attention(*y, causal=False).sum().backward()
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.cpu
def test_flop_counter_is_exact_for_varlen(device):
    q, k, v = (x[0].transpose(0, 1) for x in draw(1, 4, 2, 20, 24, 16, torch.float32, device).values())
    bounds = ends(0, 5, 5, 20, device=device), ends(0, 9, 12, 24, device=device)
    with FlopCounterMode(display=False) as counter:
        flash_attention_varlen(q, k, v, *bounds, 15, 12)
    expected = cost.flash_attention_varlen_cost([5, 0, 15], [9, 3, 12], 4, 2, 16)
    assert counter.get_total_flops() == expected.flops > 0


def test_flops_are_counted_without_computing(device):
    x = [t.to("meta") for t in draw(1, 4, 2, 64, 64, 16, torch.bfloat16).values()]
    with FlopCounterMode(display=False) as counter:
        fwd_op(*x, None, None, None, 64, 64, None, 0, 0.25, 0.0)
    assert counter.get_total_flops() == cost.flash_attention_cost(1, 4, 2, 64, 64, 16).flops


def test_autocast_casts_as_scaled_dot_product_attention_does(device):
    leaves = [x.requires_grad_() for x in draw(1, 2, 2, 20, 20, 16, torch.float32, device).values()]
    with torch.autocast(device.type, torch.bfloat16):
        out = flash_attention(*leaves)
        mixed = flash_attention(leaves[0].bfloat16(), leaves[1], leaves[2].half())
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(*leaves).dtype == torch.bfloat16
    assert torch.equal(out, flash_attention(*(x.bfloat16() for x in leaves)))
    assert mixed.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)


def test_activation_checkpointing(device):
    leaves = [x.requires_grad_() for x in draw(1, 2, 2, 20, 20, 16, torch.float32, device).values()]
    expected = torch.autograd.grad(flash_attention(*leaves).sum(), leaves)
    found = torch.autograd.grad(checkpoint(flash_attention, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_function_itself(device):
    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 20, 20, 16, torch.float32, device).values()]
    out, lse = FlashAttentionFunction.apply(*leaves, None, None, None, 20, 20, None, 0, 0.25, 0.0)
    expected = flash_attention(*leaves, return_lse=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert out.requires_grad


def test_gradients_only_where_they_are_asked_for(device):
    q, k, v = draw(1, 2, 1, 20, 20, 16, torch.float32, device).values()
    flash_attention(q, k.requires_grad_(), v).sum().backward()
    assert q.grad is None
    assert k.grad is not None
    assert v.grad is None
    with torch.no_grad():
        assert not flash_attention(q, k, v).requires_grad


def test_a_second_derivative_is_refused(device):
    q, k, v = (x.requires_grad_() for x in draw(1, 1, 1, 8, 8, 16, torch.float32, device).values())
    (dq,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        dq.sum().backward()


def test_function_transforms_are_refused(device):
    q, k, v = draw(2, 1, 1, 8, 8, 16, torch.float32, device).values()
    with pytest.raises(NotImplementedError, match=r"flash_attention: .*transforms"):
        torch.func.vmap(lambda x: flash_attention(x, k, v))(torch.stack((q, q)))


class _Allocations(TorchDispatchMode):
    """The largest tensor that any operation gives, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else (result,)
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() // 4 for t in tensors if torch.is_tensor(t))])
        return result


def test_no_score_matrix_in_memory(device):
    T = 192
    leaves = [x.requires_grad_() for x in draw(1, 1, 1, T, T, 16, torch.float32, device).values()]
    with tile(64, 64), _Allocations() as allocations:
        args = (*(x.detach() for x in leaves), None, None, None, T, T, None, 0, 0.25, 0.0)
        out, *statistics = fwd_op(*args)
        bwd_op(torch.ones_like(out), None, *args[:3], out, *statistics, *args[3:])
    assert 0 < allocations.largest <= T * 16 < T * T


PLAIN_CPU = """
    import torch
    from unittest import mock
    from rooflight.kernels import reference
    from rooflight.kernels.attention import flash_attention, flash_attention_varlen
    from rooflight.kernels.dispatch import INTERPRETED
    assert not INTERPRETED
    torch.manual_seed(0)
    sdpa = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention",
                             wraps=torch.nn.functional.scaled_dot_product_attention)
    for T, S, fast, options in [
        (9, 9, True, {}), (9, 9, True, {"causal": False}), (9, 12, True, {"causal": False, "scale": 0.3}),
        (1, 12, True, {}), (9, 12, False, {}), (12, 9, False, {}), (9, 9, False, {"window": 3}),
        (9, 9, False, {"softcap": 2.0}), (9, 9, False, {"sinks": torch.randn(4)}),
        (9, 9, False, {"return_lse": True}), (9, 0, False, {}),
    ]:
        q, k, v = (torch.randn(2, h, n, 16, requires_grad=True) for h, n in ((4, T), (2, S), (2, S)))
        with sdpa as called:
            ours = flash_attention(q, k, v, **options)
        assert called.called == fast, options
        theirs = reference.flash_attention(q, k, v, **options)
        torch.testing.assert_close(ours, theirs)
        first = [x[0] if isinstance(x, tuple) else x for x in (ours, theirs)]
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in first))
    ends = torch.tensor([0, 3, 9], dtype=torch.int32)
    packed = [torch.randn(9, h, 16) for h in (4, 2, 2)]
    torch.testing.assert_close(
        flash_attention_varlen(*packed, ends, ends, 6, 6),
        reference.flash_attention_varlen(*packed, ends, ends, 6, 6),
    )
    torch.testing.assert_close(torch.compile(flash_attention, fullgraph=True, backend="eager")(q, q, q),
                               reference.flash_attention(q, q, q))
"""


@pytest.mark.cpu
def test_without_a_gpu_or_the_interpreter_torch_computes():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PLAIN_CPU)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
