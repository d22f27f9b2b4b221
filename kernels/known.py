"""Eager calls of a kind that was seen before: one look-up, then allocations and launches written out as one function.

What an operator's launcher does with its tensors is watched in the second call of a kind (dtypes, shapes, strides,
devices, numbers) and written down: what it allocates, and which plan it gives what. Such calls then run what was
written, which is no more than

    def run(x0, x1):
        stream = unobserved_stream(...)                   # as when it was written
        t0 = empty(sizes, strides, dtype)
        start(*grid, stream, ..., [x0.data_ptr(), x1.data_ptr(), t0.data_ptr(), ...])
        return t0

So the launcher alone says which arguments a kernel takes, in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch, launching
from .dispatch import on_its_device
from .launching import Plan, encode, told, unobserved_stream

__all__ = ["Known", "prepared"]

# Kinds of calls that are kept (up to 40 KiB each); with more in turn, as with many lengths, they are met anew.
MOST_KINDS = 1024
# Calls of a kind that are watched, until one does nothing else. Not the first: many a kind comes once, as lengths do.
WATCHED = range(2, 5)
# Ways of one kind that are told apart in C++ (requires_grad, inference mode); more in turn are told apart in Python.
MOST_GUARDS = 4

_EMPTY = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)


class Known:
    """function(*tensors) as it went in an earlier call with such tensors, or None in place of some.

    function: a launcher, which allocates, launches plans and returns what it allocated, and does no more than that
    in any later call of the kind; in a call that does more it is watched, and in the end run itself.
    Where an address is no multiple of 16, someone looks at launches or what was written fails, it runs too.
    """

    __slots__ = ("_function", "_n_calls", "_run", "_there")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._n_calls = function, 0
        self._run: Callable[..., Any] = _nothing
        self._there = on_its_device(self._launch)

    def __call__(self, *tensors: Tensor | None) -> Any:
        outputs = self._attempt(tensors)
        return self._there(*tensors) if outputs is None else outputs

    def _attempt(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """What was written; None where it does not hold, or fails: the function will tell."""
        try:
            return self._run(*tensors)
        except torch.OutOfMemoryError:
            return None
        except Exception:
            self._run = _nothing
            return None

    def _launch(self, *tensors: Tensor | None) -> Any:
        if (outputs := self._attempt(tensors)) is not None:  # it was the device, or the thread's context
            return outputs
        unaligned = any(x is not None and x.data_ptr() & 15 for x in tensors)
        if unaligned or not launching.goes_direct():
            return self._function(*tensors)
        self._n_calls += 1
        if self._n_calls not in WATCHED:
            return self._function(*tensors)
        seen = _Seen(tensors)
        with seen, told(seen.launch):
            outputs = self._function(*seen.inputs)
        self._run = seen.written(outputs) or self._run
        return outputs


def _nothing(*tensors: Tensor | None) -> None:
    """What was written before anything is."""


class _Seen(TorchDispatchMode):
    """What is allocated and launched within."""

    def __init__(self, tensors: tuple[Tensor | None, ...]) -> None:
        super().__init__()
        self.names: dict[int, str] = {id(None): "None"}  # of tensors, none of which may go before all is written
        self.inputs: list[Tensor | None] = []
        for n, x in enumerate(tensors):  # each an object of its own: q may be k in this call
            x = x if id(x) not in self.names or x is None else x.detach()
            self.inputs.append(x)
            if x is not None:
                self.names[id(x)] = f"x{n}"
        self.fresh: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.launches: list[tuple[Plan, tuple[Any, ...], Any]] = []
        self.nothing_else, self.launching = True, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch would import its compiler, which takes a second; no compiled call comes here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, operator = func(*args, **(kwargs or {})), func._schema.name
        if operator in _EMPTY:
            self.names[id(result)] = f"t{len(self.fresh)}"
            self.fresh.append(result)
        elif operator == "aten::detach" and id(args[0]) in self.names:  # torch hands out what it allocated so
            self.names[id(result)] = self.names[id(args[0])]
            self.kept.append(result)
        elif not self.launching:
            self.nothing_else = False
        return result

    def launch(self, plan: Plan | None, tensors: tuple[Any, ...]) -> None:
        if plan is None:
            self.nothing_else = False
            return
        self.launching = True
        try:
            handle = plan.launch(tensors)
        finally:
            self.launching = False
        self.launches.append((plan, tensors, handle))

    def written(self, outputs: Any) -> Callable[..., Any] | None:
        """All of it as a function of the inputs, which returns None where it does not hold; None: it is not all."""
        several = isinstance(outputs, tuple)
        returned = outputs if several else (outputs,)
        used = [*returned, *(x for _, tensors, _ in self.launches for x in tensors)]
        handled = all(handle is not None or not plan.compiled for plan, _, handle in self.launches)
        if not (self.nothing_else and handled and all(id(x) in self.names for x in used)):
            return None
        if not self.launches:  # no rows: nothing would tell whether the tensors' GPU is the current one
            return None
        device = next(x.device for x in self.inputs if x is not None)
        fixed: dict[str, Any] = {
            "encode": encode, "empty": _allocator(device), "unobserved_stream": unobserved_stream,
            "state": launching.state() if any(plan.compiled for plan, *_ in self.launches) else None,
            "thread": dispatch._thread,
        }  # fmt: skip
        names = {self.names[id(x)]: None for x in used if x is not None}  # each once
        lines = [f"a{x} = {x}.data_ptr()" for x in names if x[0] == "x"]
        if device.type == "cuda":
            lines += ["if not getattr(thread, 'has_context', False):", "    return None"]
        hooks = [f" or k{n}.pre_run_hooks" for n, (*_, handle) in enumerate(self.launches) if handle is not None]
        if hooks:
            lines += ["stream = unobserved_stream(state)", f"if stream is None{''.join(hooks)}:", "    return None"]
        for n, x in enumerate(self.fresh):
            if f"t{n}" in names:
                fixed |= zip(of := _names(f"t{n}_", 3), (tuple(x.shape), x.stride(), x.dtype), strict=True)
                lines += [f"t{n} = empty({', '.join(of)})", f"at{n} = t{n}.data_ptr()"]
        if names:
            lines += [f"if ({' | '.join([f'a{x}' for x in names])}) & 15:", "    return None"]
        for n, (plan, tensors, handle) in enumerate(self.launches):
            given = [self.names[id(x)] for x in tensors]
            if handle is None:
                fixed[f"p{n}"] = plan
                lines.append(f"p{n}({', '.join(given)})")
            else:
                lines.append(_start(n, plan, handle, tensors, given, fixed))
        returns = ", ".join([self.names[id(x)] for x in returned])
        lines.append(f"return ({returns},)" if several else f"return {returns}")
        head = f"def run({', '.join(f'x{n}' for n in range(len(self.inputs)))}):\n    "
        exec(_code(head + "\n    ".join(lines)), fixed)
        return fixed["run"]


def _start(
    n: int, plan: Plan, handle: Any, tensors: tuple[Any, ...], names: list[str], fixed: dict[str, Any]
) -> str:  # fmt: skip
    """The n-th call of the C launcher: each argument in its place, tensors by their addresses."""
    fixed[f"k{n}"], fixed[f"start{n}"] = plan.kernel, handle.start
    of_start = (*plan.grid, *handle.fixed)
    fixed |= zip(before := _names(f"s{n}_", len(of_start)), of_start, strict=True)
    fixed |= zip(flat := [*_names(f"p{n}_", len(plan.args))], plan.args, strict=True)
    fields = dict(handle.descriptors)
    for (at, via), x, given in zip(plan.places, tensors, names, strict=False):
        if x is None:
            flat[at] = "None"
        elif via is None:
            flat[at] = f"a{given}"
        else:
            fixed |= {f"d{n}_{at}": via.describer(x), f"f{n}_{at}": fields[at]}
            flat[at] = f"*encode(d{n}_{at}(a{given}), f{n}_{at})"
    for at, make in plan.made:
        fixed[f"m{n}_{at}"] = make
        flat[at] = f"(c{n}_{at} := m{n}_{at}()).data_ptr()"  # kept until it is launched
    for i, _, start, stop in plan.tuples:
        flat[i] = f"({', '.join(flat[start:stop])},)"
    arguments = ", ".join((flat[: plan.tuples[0][2]] if plan.tuples else flat) + ["None"] * handle.n_constant)
    grid, rest = ", ".join(before[:3]), ", ".join(before[3:])
    return f"start{n}({grid}, stream, {rest}, {f'[{arguments}]' if handle.as_list else arguments})"


@cache
def _names(first: str, n: int) -> tuple[str, ...]:
    return tuple([f"{first}{i}" for i in range(n)])


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """empty(sizes, strides, dtype) on the current device of this kind, past the dispatcher where torch has such."""
    direct = getattr(guards, f"_empty_strided_{device.type}", None)
    if direct is not None:
        return direct
    return lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype, device=device)


# Numbers have names in it: calls that launch the same kernels share it, whatever their sizes.
_code = cache(lambda source: compile(source, __file__, "exec"))


# ---------------------------------------------------------------- the look-up


def _guard(tensors: list[Tensor]) -> Callable[..., bool]:
    """fits(*others): whether others have the dtypes, shapes, strides, devices and dispatch keys of tensors. In C++."""
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[]).check


def _guards_work() -> bool:
    """Whether this version of torch has them, and they tell what they are to tell."""
    x = torch.empty(2, 3, device="cpu")  # whatever the default device: importing this starts no GPU
    try:
        fits = _guard([x])
        others = x.t(), x[:, :2], x[:1], x.double(), torch.nn.Parameter(x), x.to("meta")
        return fits(torch.empty_like(x)) and not any(map(fits, others))
    except Exception:  # they are torch's own: another version may do anything
        return False


GUARDS_WORK = _guards_work()


def prepared(make: Callable[..., Any]) -> Callable[..., Any]:
    """find(state, *args): make(*args), what a kind of call does from its tensors alone, made once; None: the long way.

    make: looks at nothing of a tensor but its dtype, shape, strides and device, holds none, and returns None for what
    it does not serve. Calls are of one kind when these, all numbers, with their types, and `state` are equal.
    find returns None while tracing, under transforms, forward-mode AD, modes and profilers, and for what is no plain
    tensor or number: there the operator is to be seen, or the tensor's memory is not its value.
    """
    known: dict[tuple[Any, ...], Any] = {}
    # By the first shape and the numbers: what fits which tensors. A kind is there from its second call on.
    guarded: dict[tuple[Any, ...], list[tuple[Callable[..., bool], Any]]] = {}
    there = on_its_device(make)  # what is asked of the current GPU is asked of the tensors'

    def find(state: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling() or dispatch._transforms_are_active() or dispatch._n_dispatch_modes():
            return None
        if dispatch._profiler._is_profiler_enabled or dispatch._forward_ad._current_level >= 0:
            return None
        key, tensors = [state], []
        for x in args:
            kind = type(x)
            if kind in dispatch._TENSORS:
                tensors.append(x)
                key.append(Tensor)
            elif kind in dispatch._VALUES:
                key += kind, x
            else:
                return None
        if tensors:
            key.append(tensors[0].shape)
        alike = tuple(key)
        for fits, made in guarded.get(alike, ()):
            if fits(*tensors):
                return made
        for x in tensors:
            if x.is_neg() or dispatch._is_wrapped(x):
                return None
            key += x.dtype, x.shape, x.stride(), x.device
        of_kind = tuple(key)
        made = known.get(of_kind, known)  # at once, since another thread may clear it
        if made is not known:
            if GUARDS_WORK and tensors and len(set(map(id, tensors))) == len(tensors):  # none takes a tensor twice
                fitting = guarded.setdefault(alike, [])
                if len(fitting) == MOST_GUARDS:
                    fitting.clear()
                fitting.append((_guard(tensors), made))
            return made
        made = (there if type(args[0]) in dispatch._TENSORS else make)(*args)
        if len(known) >= MOST_KINDS:
            known.clear()
            guarded.clear()
        known[of_kind] = made
        return made

    return find
