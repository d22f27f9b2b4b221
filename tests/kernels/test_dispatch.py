"""Where kernels run: the interpreter here, the eager oracle on a plain CPU, and no silent third way."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight import kernels
from rooflight.kernels import dispatch, known
from rooflight.kernels.attention import prepared

PLAIN = """
import torch
import rooflight.kernels as kernels
from rooflight.kernels import dispatch, reference

assert not dispatch.INTERPRETED
x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
cases = {
    "rms_norm": ((x, w), {"residual": x, "weight_offset": 1.0}),
    "swiglu": ((x, x), {}),
    "rope": ((x[None, None], x[None, None], torch.ones(4, 3), torch.ones(4, 3)), {"interleaved": True}),
    "cross_entropy": ((x, torch.tensor([1, 2, -100, 3])), {"z_loss": 0.1}),
    "linear_cross_entropy": ((x, torch.randn(9, 8), torch.tensor([1, 2, -100, 3])), {"softcap": 2.0}),
}
for name, (args, options) in cases.items():
    ours, oracle = (getattr(room, name)(*args, **options) for room in (kernels, reference))
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (ours, oracle)), strict=True):
        torch.testing.assert_close(a, b)
        ga, gb = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (a, b))
        torch.testing.assert_close(ga, gb)
for name in ("rms_norm", "linear_cross_entropy"):
    args, options = cases[name]
    try:
        getattr(kernels, name)(x.int(), *args[1:], **options)
    except ValueError as error:
        assert "x: expected dtype" in str(error)
    else:
        raise AssertionError(name)
print("plain ok")
"""


@pytest.mark.cpu
def test_the_plain_cpu_runs_the_oracle():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "plain ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_interpreter_was_chosen_before_triton_was_imported():
    assert dispatch.INTERPRETED
    assert dispatch.runs_triton(torch.ones(1))


def test_meta_tensors_run_no_kernel():
    assert not dispatch.runs_triton(torch.ones(1, device="meta"))
    y = kernels.rms_norm(torch.ones(3, 8, device="meta", dtype=torch.bfloat16), None)
    assert (y.shape, y.dtype) == ((3, 8), torch.bfloat16)


def test_an_operator_without_a_derivative_says_so(device):
    x = torch.ones(2, 8, device=device, requires_grad=True)
    dx, _ = torch.ops.rooflight.swiglu_bwd(x, x, x)
    with pytest.raises(NotImplementedError, match="rooflight::swiglu_bwd is not differentiable"):
        dx.sum().backward()


FUNCTIONS = [
    name
    for name in kernels.__all__
    if name.islower() and name not in ("alibi_slopes", "cost", "reference", "rope_tables")
]


def test_every_name_is_exported():
    assert set(kernels.__all__) <= set(dir(kernels))
    assert set(FUNCTIONS) == set(kernels.reference.__all__) - {"key_distance", "visible_mask"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernel_and_oracle_share_a_signature(name):
    ours, oracle = (inspect.signature(getattr(room, name)) for room in (kernels, kernels.reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in oracle.parameters.values()
    ]


class _Seen(TorchDispatchMode):
    """The operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_eager_calls_go_past_the_dispatcher_unless_someone_looks(device):
    """Direct calls save time; a mode, a profiler and tensor subclasses must see the operator all the same."""
    x = torch.randn(2, 8, device=device, requires_grad=True)
    ran = []
    real = dict(dispatch._launchers)

    def through(op, launcher):
        return lambda *args: (ran.append(str(op)), launcher(*args))[1]

    with mock.patch.dict(dispatch._launchers, {op: through(op, launcher) for op, launcher in real.items()}):
        kernels.swiglu(x, x).sum().backward()
        assert ran == ["rooflight.swiglu_fwd.default", "rooflight.swiglu_bwd.default"]
        ran.clear()
        with _Seen() as seen:
            kernels.swiglu(x, x).sum().backward()
        assert {"rooflight.swiglu_fwd.default", "rooflight.swiglu_bwd.default"} <= set(seen.names)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            kernels.swiglu(x, x).sum().backward()
        names = {event.key for event in profiler.key_averages()}
        assert {"rooflight::swiglu_fwd", "rooflight::swiglu_bwd"} <= names
        assert ran == []
    with torch.device(device), FakeTensorMode():
        fake = torch.ones(2, 8)
    y = kernels.swiglu(fake, fake)  # outside its mode: a subclass by itself
    assert isinstance(y, FakeTensor)


LATE = {
    "rms_norm": lambda x: kernels.rms_norm(x, None),
    "gelu": kernels.gelu,
    "flash_attention": lambda x: kernels.flash_attention(x[None, None], x[None, None], x[None, None]),
    "cross_entropy": lambda x: kernels.cross_entropy(x, torch.zeros(3, dtype=torch.int64, device=x.device)),
}


@pytest.mark.parametrize("name", LATE)
def test_a_view_that_torch_negates_late_is_negated(device, name):
    """As an input, and as the gradient that arrives: a kernel would read the memory as it lies."""
    f, generator = LATE[name], torch.Generator().manual_seed(0)
    x, c = (torch.randn(3, 8, generator=generator).to(device) for _ in range(2))
    late = torch.complex(x, -x).conj().imag
    assert late.is_neg()
    assert torch.equal(f(late), f(x))

    def gradient(late: bool) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        z = torch.complex(torch.zeros_like(y), y).conj()
        seen = []
        y.register_hook(lambda g: seen.append(g.is_neg()) or (g if late else g.resolve_neg()))
        (z.imag.flatten() @ c.flatten()[: z.numel()] + (1j * z).sum().real).backward()
        assert seen == [True]
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_check_is_made_once_for_each_kind_of_call():
    made = []

    @dispatch.checked_once
    def check(x, n):
        made.append((tuple(x.shape), n))
        if isinstance(n, bool) or n < 0:
            raise ValueError("n")
        return n

    x = torch.ones(2, 8)
    for _ in range(2):  # a tensor by dtype, shape and device, a number by its type and value
        assert [check(y, n) for y, n in ((x, 1), (x + 1, 1), (x[:1], 1), (x.half(), 1), (x, 1.0), (x, 2))]
    assert len(made) == 5
    for _ in range(2):  # what is refused is looked at again, and True is no 1
        with pytest.raises(ValueError, match="n"):
            check(x, True)
    assert len(made) == 7
    for _ in range(2):  # a subclass, and what is no plain number
        check(torch.nn.Buffer(x).as_subclass(torch.nn.parameter.Buffer), 1)
        check(x, np.int64(1))
    assert len(made) == 11
    torch.compile(lambda x: x + check(x, 1), backend="eager", fullgraph=True)(x)
    assert len(made) == 12


def test_what_a_kind_of_call_does_is_worked_out_once_and_on_its_device(monkeypatch):
    """A stand-in for a second GPU: what is asked of the current one, its architecture, is asked of the tensors'."""
    current, asked = [0], []

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    class OnTheSecond:
        is_cuda, dtype, shape, device = True, torch.float32, (2, 8), "cuda:1"
        get_device, stride, is_neg = (lambda self: 1), (lambda self: (8, 1)), (lambda self: False)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(dispatch, "_thread", SimpleNamespace(has_context=True))
    monkeypatch.setattr(dispatch, "_TENSORS", dispatch._TENSORS | {OnTheSecond})
    monkeypatch.setattr(dispatch, "_is_wrapped", lambda x: False)
    monkeypatch.setattr(known, "MOST_KINDS", 3)
    monkeypatch.setattr(known, "GUARDS_WORK", False)  # they take tensors
    find = known.prepared(lambda x, n=0: asked.append((current[0], n)))
    for n in (1, 1, 2):
        find(None, OnTheSecond(), n)
    find(None, torch.ones(2, 8), 3)
    assert asked == [(1, 1), (1, 2), (0, 3)]
    assert current == [0]
    find(None, None)  # no tensor at all: what is worked out says so, or not
    find(None, OnTheSecond(), 1)  # the fifth kind found room for itself alone
    assert asked[3:] == [(0, 0), (1, 1)]


SAVED = {
    "rms_norm": lambda x: kernels.rms_norm(x, x[0]),
    "rms_norm of a sum": lambda x: kernels.rms_norm(x, None, residual=x)[0],
    "swiglu": lambda x: kernels.swiglu(x, x),
    "gelu": kernels.gelu,
    "rope": lambda x: kernels.rope(x[None, None], x[None, None], x.detach()[:, :8], x.detach()[:, :8])[0],
    "cross_entropy": lambda x: kernels.cross_entropy(x, torch.arange(16, device=x.device)),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, x, torch.arange(16, device=x.device)),
    "flash_attention": lambda x: kernels.flash_attention(*(x[None, None],) * 3, softcap=2.0),
    "attention's Function": lambda x: kernels.FlashAttentionFunction.apply(*(x[None],) * 3),
    "fp8_linear, the input frozen": lambda x: kernels.fp8_linear(x.detach(), x),
    "fp8_linear, the weight frozen": lambda x: kernels.fp8_linear(x, x.detach()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAVED)
def test_the_same_is_saved_whoever_looks(device, name, dtype):
    """A checkpoint compares what the forward saved with what its recomputation saves, tensor by tensor; a mode, such as
    a count of FLOPs or a profiler, may be there in one of them alone."""

    def saved() -> list[torch.Size]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t):
            SAVED[name](torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True))
        return shapes

    unseen = saved()
    with _Seen():
        assert saved() == unseen


def test_an_operator_returns_an_empty_tensor_for_what_there_is_none_of(device):
    x, w = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    y, stream, _ = torch.ops.rooflight.rms_norm_fwd(x, w, 1e-6, None, 0.0)
    assert stream.shape == (0,)
    assert dispatch.call(torch.ops.rooflight.rms_norm_fwd.default, x, w, 1e-6, None, 0.0)[1].shape == (0,)  # with grad
    with torch.no_grad():
        ours = dispatch.call(torch.ops.rooflight.rms_norm_fwd.default, x, w, 1e-6, None, 0.0)
    assert ours[1] is None
    assert torch.equal(ours[0], y)


def test_a_thread_has_a_context_before_its_first_product(monkeypatch):
    """A stand-in for a GPU: in each thread one launch comes before the first operator, and none before the others."""
    events, current = [], threading.local()

    @contextmanager
    def device(index):
        current.device = index
        yield
        current.device = 0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "zeros", lambda *args, device: events.append(f"a launch on {device}"))
    monkeypatch.setattr(dispatch, "_thread", threading.local())
    operator = dispatch.on_its_device(lambda first: events.append("a product"))

    def twice(index):
        for _ in range(2):
            operator(SimpleNamespace(is_cuda=True, get_device=lambda: index, device=f"cuda:{index}"))

    twice(0)
    for index in (0, 1):  # the second is not the current one
        thread = threading.Thread(target=twice, args=(index,))
        thread.start()
        thread.join()
    launches = [f"a launch on cuda:{index}" for index in (0, 0, 1)]
    assert events == [event for launch in launches for event in (launch, "a product", "a product")]
    operator(SimpleNamespace(is_cuda=False))
    assert events[-2:] == ["a product", "a product"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_autograds_thread_has_a_context_before_its_first_product():
    """A process of its own, whose first backward is a product: torch would warn that there was no context."""
    code = """
import torch
from rooflight.kernels import linear_cross_entropy
x, w = torch.randn(4, 8, device="cuda", requires_grad=True), torch.randn(9, 8, device="cuda")
loss = linear_cross_entropy(x, w, torch.tensor([1, 2, 3, 4], device="cuda"), reduction="none")
loss.backward(torch.ones(4, device="cuda"))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_past_transform_left_wrapped_is_unwrapped(device):
    left = []
    torch.func.grad(lambda x: (left.append(2 * x), x.sum())[1])(torch.ones(2, 8, device=device))
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    x = torch.full((2, 8), 2.0, device=device)
    torch.testing.assert_close(kernels.swiglu(left[0], left[0]), kernels.swiglu(x, x))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(kernels.rms_norm(left[0], left[0][0]), kernels.rms_norm(x, x[0]))


@pytest.mark.cpu
def test_autocast_leaves_meta_tensors_as_they_are():
    """Meta has no autocast of its own, and torch raises where it is asked for; its own operations go on without."""
    q, target = torch.empty(1, 2, 4, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outs = [kernels.flash_attention(q, q, q, **options) for options in ({}, {"window": 2})]
            outs += [kernels.linear_cross_entropy(q[0, 0], q[0, 1], target)]
        assert all(out.is_meta and out.dtype == torch.float32 for out in outs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch, of make_dual
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["rms_norm", "gelu", "flash_attention"])
def test_a_tangent_is_refused_not_lost(device, name, grad, monkeypatch):
    monkeypatch.setattr(prepared, "JITFunction", object)  # interpreted kernels are prepared too
    x = torch.ones(3, 8, device=device, dtype=torch.float16)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            LATE[name](forward_ad.make_dual(x, x))
        assert not LATE[name](x).requires_grad


def test_transforms_are_refused(device):
    x = torch.ones(2, 8, device=device)
    with pytest.raises(NotImplementedError, match=r"swiglu: .*torch\.func transforms"):
        torch.func.vmap(lambda x: kernels.swiglu(x, x))(x)
    with pytest.raises(NotImplementedError, match=r"rms_norm: .*torch\.func transforms"), torch.no_grad():
        torch.func.vmap(lambda x: kernels.rms_norm(x, None))(x)
