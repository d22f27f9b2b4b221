"""What every operation shares: where its kernels run, how its launchers become torch operators, its input checks.

CUDA tensors run the Triton kernels. CPU tensors run the same kernels in Triton's interpreter when TRITON_INTERPRET=1
was set before triton was first imported (interpreter.py makes it right in bfloat16), and eager PyTorch otherwise.
"""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import interpreter

__all__ = [
    "FLOAT_DTYPES",
    "INTERPRETED",
    "apply",
    "are_wrapped",
    "autocast_dtype",
    "bare_apply",
    "call",
    "check_device",
    "check_dtype",
    "check_flag",
    "check_integer",
    "check_number",
    "check_tensor",
    "checked_once",
    "define_op",
    "in_layout_of",
    "known",
    "on_its_device",
    "refuse_transforms",
    "runs_triton",
]

# Decided once, as triton itself does: a kernel decorated under the interpreter stays interpreted.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# The interpreter's own bfloat16 is garbage. A version of triton that the correction does not know stays so.
BFLOAT16_IS_EXACT: bool = not INTERPRETED or interpreter.correct()

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_transforms_are_active = torch._C._are_functorch_transforms_active
_n_dispatch_modes = torch._C._len_torch_dispatch_stack

_library = torch.library.Library("rooflight", "FRAGMENT")


def runs_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run Triton kernels: a CUDA tensor, or a CPU tensor under the interpreter."""
    return tensor.is_cuda or (INTERPRETED and tensor.is_cpu)


def define_op(
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register `launcher` as the torch operator `rooflight::<its name>` and return the operator.

    launcher: its annotations give the schema; it mutates no argument and returns no view of one. An output that there
    is none of, `Tensor | None`, is an empty tensor where the operator returns it.  fake: same signature, allocates the
    outputs and computes nothing.  flops: same signature with shapes in place of tensors plus `out_shape`, the FLOPs
    that FlopCounterMode reports.  setup_context(ctx, inputs, output), backward(ctx, *grads): the
    derivative, as in torch.library.register_autograd; without one, differentiating the operator's outputs raises.

    torch.compile traces the operator and its derivative. Eager calls go through an autograd.Function and `call`, past
    torch.library's own autograd and the dispatcher: on the host both take longer than launching a small kernel.
    """
    name = launcher.__name__
    launch = on_its_device(launcher)

    def no_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"rooflight::{name} is not differentiable; second derivatives are not implemented")

    _library.define(name + _schema(launcher), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _without_none(launch), "CompositeExplicitAutograd")
    qualified = f"rooflight::{name}"
    torch.library.register_fake(qualified, _without_none(fake), lib=_library)
    torch.library.register_autograd(qualified, backward or no_derivative, setup_context=setup_context, lib=_library)
    packet = getattr(torch.ops.rooflight, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    _launchers[packet.default] = launch
    return packet.default


def _schema(launcher: Callable[..., Any]) -> str:
    """Of the operator, whose outputs are tensors all."""
    function = FunctionType(launcher.__code__, launcher.__globals__, argdefs=launcher.__defaults__)
    outputs = launcher.__annotations__["return"].replace("Tensor | None", "Tensor")
    function.__annotations__ = launcher.__annotations__ | {"return": outputs}
    return torch.library.infer_schema(function, mutates_args=())


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """With an empty tensor for each output that is None."""

    def filled(first: Tensor, *args: Any) -> Any:
        outputs = function(first, *args)
        if isinstance(outputs, tuple):
            return tuple([first.new_empty(0) if x is None else x for x in outputs])
        return outputs

    return filled


_launchers: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

_TENSORS = frozenset({Tensor, Parameter})
_VALUES = frozenset({type(None), int, float, bool})


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """op(*args) past its own derivative, from within an autograd.Function that supplies one; eager mode only.

    Its launcher is called directly, and gives None for what the operator returns empty, unless someone is to see the
    operator: a dispatch mode (FLOP counts, fake tensors), a tensor subclass, a lazy negation or a profiler.
    """
    if torch.is_grad_enabled():  # a backward pass with create_graph=True: let the operator refuse
        return op(*args)
    if not (_n_dispatch_modes() or _profiler._is_profiler_enabled) and _are_plain(args):
        return _launchers[op](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether no dispatch key but the device's and autograd's has a say in them.

    Not in a subclass of Tensor, nor in a view that torch negates when it is read, as z.conj().imag or its gradient is.
    """
    for x in args:
        kind = type(x)
        if kind in _TENSORS:
            if x.is_neg():
                return False
        elif kind not in _VALUES:
            return False
    return True


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make it the first argument's, and its context the thread's."""

    def launch(first: Tensor, *args: Any) -> Any:
        if first.is_cuda:
            if first.get_device() != torch.cuda.current_device():
                with torch.cuda.device(first.get_device()):
                    return launch(first, *args)
            if not getattr(_thread, "has_context", False):
                _make_context_current(first.device)
        return launcher(first, *args)

    return launch


_thread = threading.local()


def _make_context_current(device: torch.device) -> None:
    """Once in a thread: make the current device's context the thread's, by a launch.

    A thread that is new to CUDA, as autograd's is at first, has no context of its own until a call of the CUDA runtime
    gives it the device's; torch.cuda.set_device makes none where the device is the current one already. cuBLAS, when it
    comes first, does not make one: torch then warns of it ("no current CUDA context", pytorch PR 120131), sets the
    context itself and goes on. A launch is allowed in a graph's capture too, where a synchronisation is not.
    """
    torch.zeros(1, device=device)
    _thread.has_context = True


def refuse_transforms(name: str) -> None:
    """Raise NotImplementedError under torch.func.vmap, grad and their kin, which cannot see into a kernel."""
    if _transforms_are_active():
        raise NotImplementedError(
            f"{name}: its Triton kernels do not run under torch.func transforms (vmap, grad, jvp); leading dimensions"
            " are batched already, and autograd differentiates it"
        )


def apply(name: str, function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args) for the public function `name`; raises NotImplementedError under torch.func transforms.

    Function.apply itself looks for such transforms and unwraps what is left of past ones, in Python, for as long as a
    launch takes.
    """
    if _transforms_are_active():
        refuse_transforms(name)
    for x in args:  # as are_wrapped, without a generator
        if type(x) in _TENSORS and _is_wrapped(x):
            return function.apply(*args)
    return bare_apply(function)(*args)


def are_wrapped(*args: Any) -> bool:
    """Whether one is a tensor that a transform, which has ended, left wrapped: `call` would find no storage in it.

    Or may have a tangent, of forward-mode AD: `call` would lose it, and autograd.Function refuses it.
    """
    return _forward_ad._current_level >= 0 or any(type(x) in _TENSORS and _is_wrapped(x) for x in args)


@cache
def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What torch.autocast casts inputs on this kind of device to; None where it is off. "meta" has none."""
    # torch 2.11 cannot compile is_autocast_available: of the devices used here meta alone has no autocast
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def known(condition: Any) -> bool:
    """condition; while tracing, whether it holds for every size that the graph is to serve."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """result, copied only where it does not lie in memory as torch.empty_like(x) would."""
    alike = torch.empty_like(x)
    if all(known(a == b) for a, b in zip(result.stride(), alike.stride(), strict=True)):
        return result
    return alike.copy_(result)


# Kinds of calls that one check remembers; with more in turn, as with many lengths, they are met anew.
MOST_CHECKED = 4096


def checked_once(check: Callable[..., Any]) -> Callable[..., Any]:
    """check(*args), for a public function's checks: in eager mode once for each kind of call that passes them.

    check: looks at nothing of a tensor but its dtype, shape and device, and what it returns holds no tensor. Calls are
    of one kind when these and all numbers, with their types, are equal. What is not a plain tensor or a number is
    checked in every call, and while tracing all is.
    """
    passed: dict[tuple[Any, ...], Any] = {}

    @wraps(check)
    def checked(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(*args)
        key: list[Any] = []
        for x in args:
            kind = type(x)
            if kind in _TENSORS:
                key += x.dtype, x.shape, x.device
            elif kind in _VALUES:
                key += kind, x
            else:
                return check(*args)
        known = tuple(key)
        try:
            return passed[known]
        except KeyError:
            pass
        result = check(*args)
        if len(passed) >= MOST_CHECKED:
            passed.clear()
        passed[known] = result
        return result

    return checked


def _described(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, bool | int | float | str) else type(value).__name__


def check_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ValueError unless value is a tensor (or None, where that is a choice)."""
    if not (isinstance(value, Tensor) or (optional and value is None)):
        expected = "a tensor or None" if optional else "a tensor"
        raise ValueError(f"{name}: expected {expected}, got {_described(value)}")


def check_number(name: str, value: Any) -> Any:
    """value, a numpy scalar as Python's; raises ValueError on anything but a number.

    A tensor is refused too: a kernel takes the number alone, so that a parameter would never learn, and reading it from
    a GPU would wait. A bool is a slip.
    """
    if type(value) is float or type(value) is int or isinstance(value, torch.SymFloat | torch.SymInt):
        return value
    if isinstance(value, Tensor | bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}: expected a number, got {_described(value)}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_integer(name: str, value: Any) -> Any:
    """value, a numpy integer as Python's; raises ValueError on anything but an integer, as check_number does."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, Tensor | bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}: expected an integer, got {_described(value)}")
    return int(value)


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless value is True or False."""
    if value is not True and value is not False:
        raise ValueError(f"{name}: expected True or False, got {_described(value)}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    """Raise ValueError unless `tensor` is one, of an allowed dtype (fp64 too where nothing is compiled)."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    dtype = tensor.dtype
    if dtype in allowed and (BFLOAT16_IS_EXACT or dtype != torch.bfloat16):
        return
    if dtype == torch.bfloat16 and not BFLOAT16_IS_EXACT:
        raise ValueError(
            f"{name}: expected dtype float32 or float16, got bfloat16, which the interpreter of triton"
            f" {triton.__version__} computes wrongly (TRITON_INTERPRET=1; 3.6 to 3.9 are corrected)"
        )
    if dtype == torch.float64 and not tensor.is_cuda:
        return
    expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    raise ValueError(f"{name}: expected dtype {expected}, got {str(dtype).removeprefix('torch.')}")


def check_device(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """Raise ValueError unless every tensor given stands on the first one's device."""
    name, reference = first
    index = reference.get_device()  # below 0 for more than one kind of device
    for other_name, other in others:
        if other is None or (other.get_device() == index >= 0):
            continue
        if other.device != reference.device:
            raise ValueError(f"{other_name}: expected device {reference.device}, as {name}, got {other.device}")
