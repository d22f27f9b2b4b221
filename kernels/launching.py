"""Launching kernels that were launched before: past Triton's Python, straight to its C launcher.

`kernel[grid](*args)` binds the arguments, works out what to specialise on and looks the variant up, which takes longer
than many kernels. `launch` keeps, for each variant that it saw, the compiled kernel as Triton's C launcher takes it.
Its key holds every integer as it is, each tensor's dtype and whether its address is a multiple of 16, the type of each
float, every constant, the device and the knobs that Triton's own key holds; so equal keys are one variant to Triton
too, whatever it specialises on. What has no handle yet goes through Triton, which compiles it if need be.

Triton keeps its own way wherever it does more than launch: with hooks (profilers), the interpreter, another vendor's
driver, kernels with scratch memory, and versions whose C launcher is not known here.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = [
    "TENSOR", "Described", "Handle", "Made", "Plan", "Via", "direct", "encode", "goes_direct", "launch", "state",
    "told", "unobserved_stream", "variant",
]  # fmt: skip

# The C launcher's arguments were read in these versions; hardware has run 3.6.0 (bench/NOTES.md).
KNOWN_VERSIONS = ("3.6.", "3.7.", "3.9.")
# Handles kept for one kernel; more lengths than that in turn, and they are found anew.
MOST_HANDLES = 2048

TENSOR: Any = object()  # a tensor's place in a Plan

_INTEGERS = frozenset({int})
_TENSORS = (Tensor, Parameter)

_direct: bool = triton.__version__.startswith(KNOWN_VERSIONS)


class Described:
    """What a tensor descriptor is to a launch: its variant, and how the driver encodes it, made once.

    A descriptor that has one in its attribute `described` must never change. variant: hashable, and different for
    descriptors that Triton tells apart (dtype, block, layout).
    """

    __slots__ = ("encoded", "variant")

    def __init__(self, variant: Any) -> None:
        self.variant = variant
        self.encoded: dict[Any, list[Any]] = {}


@contextmanager
def direct(enabled: bool) -> Iterator[None]:
    """Within the block launches go past Triton's Python where they can, or never; for the whole process."""
    global _direct
    before, _direct = _direct, enabled
    try:
        yield
    finally:
        _direct = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), the constants being its trailing constexprs and Triton's options."""
    if (listener := getattr(_thread, "listener", None)) is not None:
        listener(None, ())
    if not (isinstance(kernel, JITFunction) and goes_direct()) or kernel.pre_run_hooks:
        kernel[grid](*args, **constants)
        return
    known = variant(kernel, args, constants)
    if known is None:
        kernel[grid](*args, **constants)
        return
    key, given = known
    handles = kernel.rooflight_handles
    handle = handles.get(key)
    if handle is not None:
        handle((*grid, 1, 1)[:3], driver.active.get_current_stream(key[0]), given)
        return
    handle = _handle(kernel[grid](*args, **constants), len(kernel.params) - kernel.rooflight_n_runtime)
    if handle is not None:
        if len(handles) >= MOST_HANDLES:
            handles.clear()
        handles[key] = handle


def variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]] | None:
    """The key of a launch's handle, and its arguments before the constants with tensors as addresses.

    None where an argument is of a kind that is not known here, or a runtime argument is missing.
    """
    n_runtime = _prepared(kernel)
    if len(args) < n_runtime:
        return None
    key: list[Any] = [*state()]
    given = _read(args[:n_runtime], key)
    if given is None:
        return None
    fixed = (*args[n_runtime:], *constants.values())
    key.extend(fixed)
    key.extend(map(type, fixed))  # True is no 1 to Triton
    key.extend(constants)
    return tuple(key), given


class Via(NamedTuple):
    """A tensor's place in a Plan that the kernel takes a descriptor of.

    describe(x): the descriptor.  describer(x): the same for tensors like x on a GPU, as a function of their addresses.
    """

    describe: Callable[[Tensor], Any]
    describer: Callable[[Tensor], Callable[[int], Any]]


class Made(NamedTuple):
    """A tensor's place in a Plan that each launch makes anew: its caller gives none."""

    make: Callable[[], Tensor]


_thread = threading.local()


@contextmanager
def told(listener: Callable[[Plan, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block listener(plan, tensors) is called for each call of a Plan in this thread, and launches it.

    A `launch`, which keeps no plan, is one of the plan None.
    """
    _thread.listener = listener
    try:
        yield
    finally:
        _thread.listener = None


class Plan:
    """A launch but for its tensors: plan(*tensors) is launch(kernel, grid, *args, **constants) with them for TENSOR.

    What is the same for the same shapes, strides and options is worked out once; the caller keeps the plan by these.
    Tensors, or None, come in the order of their places (TENSOR or a Via), in the arguments or in a tuple among them.
    """

    __slots__ = ("args", "compiled", "constants", "grid", "handles", "kernel", "made", "places", "tuples")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], constants
        self.compiled = isinstance(kernel, JITFunction)
        self.handles: dict[tuple[Any, ...], Handle] = {}
        # The arguments flat, tuples that hold tensors taken apart behind the others: (where it goes, type, from, to).
        self.args = list(args)
        self.tuples: list[tuple[int, Any, int, int]] = []
        for i, arg in enumerate(args):
            if isinstance(arg, tuple) and any(part is TENSOR for part in arg):
                self.tuples.append((i, type(arg), len(self.args), len(self.args) + len(arg)))
                self.args += arg
        self.places: list[tuple[int, Via | None]] = []
        taken = {i: range(first, stop) for i, _, first, stop in self.tuples}
        for i in itertools.chain(*(taken.get(i, (i,)) for i in range(len(args)))):
            if self.args[i] is TENSOR or isinstance(self.args[i], Via):
                self.places.append((i, None if self.args[i] is TENSOR else self.args[i]))
        self.made = [(i, arg.make) for i, arg in enumerate(args) if isinstance(arg, Made)]
        self.places += [(i, None) for i, _ in self.made]

    def __call__(self, *tensors: Any) -> None:
        listener = getattr(_thread, "listener", None)
        if listener is None:
            self.launch(tensors)
        else:
            listener(self, tensors)

    def launch(self, tensors: tuple[Any, ...]) -> Handle | None:
        """Returns the handle, where there is one."""
        if self.made:
            tensors += tuple([make() for _, make in self.made])
        kernel, given = self.kernel, self.args.copy()
        if not (self.compiled and goes_direct()) or kernel.pre_run_hooks:
            self._through_triton(tensors)
            return None
        key: list[Any] = [*state()]
        for (at, via), x in zip(self.places, tensors, strict=True):
            if x is None:
                key.append(None)
                given[at] = None
            elif via is not None:
                given[at] = descriptor = via.describe(x)
                key.append(descriptor.described.variant)
            elif type(x) in _TENSORS:
                given[at] = address = x.data_ptr()
                key += x.dtype, address & 15 == 0
            else:  # a tensor's subclass: Triton's own way
                self._through_triton(tensors)
                return None
        variant = tuple(key)
        handle = self.handles.get(variant)
        if handle is not None:
            handle(self.grid, driver.active.get_current_stream(key[0]), self.together(given))
            return handle
        compiled = self._through_triton(tensors)
        n_runtime = _prepared(kernel)
        n_given = len(self.args) if not self.tuples else self.tuples[0][2]
        if n_given >= n_runtime and (handle := _handle(compiled, len(kernel.params) - n_given)):
            self.handles[variant] = handle
        return handle

    def together(self, flat: list[Any], kept: bool = False) -> list[Any]:
        """The arguments with their tuples. kept: these keep their types, which Triton tells apart."""
        for i, kind, start, stop in self.tuples:
            parts = flat[start:stop]
            flat[i] = kind(*parts) if kept and kind is not tuple else tuple(parts)
        return flat[: self.tuples[0][2]] if self.tuples else flat

    def _through_triton(self, tensors: tuple[Any, ...]) -> Any:
        flat = self.args.copy()
        for (at, via), x in zip(self.places, tensors, strict=True):
            flat[at] = x if via is None or x is None else via.describe(x)
        return self.kernel[self.grid](*self.together(flat, kept=True), **self.constants)


def state() -> tuple[Any, ...]:
    """What a variant hangs on beside a launch's arguments: the current device, and Triton's knobs."""
    return driver.active.get_current_device(), knobs.runtime.debug, knobs.compilation.instrumentation_mode


def unobserved_stream(before: tuple[Any, ...]) -> int | None:
    """The current stream; None where launches are not to go past Triton, or the state is another than before."""
    now = state()
    return driver.active.get_current_stream(now[0]) if now == before and goes_direct() else None


def goes_direct() -> bool:
    """Whether launches go past Triton: nobody asked it to be told of them, or changes what it compiles."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)):
        return False
    return _direct and getattr(runtime, "add_stages_inspection_hook", None) is None


def _prepared(kernel: Any) -> int:
    """How many parameters come before the constants, which must be the last; makes the place for the handles, once."""
    try:
        return kernel.rooflight_n_runtime
    except AttributeError:
        pass
    constant = [param.is_constexpr for param in kernel.params]
    n_runtime = constant.index(True) if True in constant else len(constant)
    if not all(constant[n_runtime:]):
        n_runtime = sys.maxsize  # a constant among the arguments: Triton launches it
    kernel.rooflight_handles = {}
    kernel.rooflight_n_runtime = n_runtime
    return n_runtime


def _read(values: tuple[Any, ...], key: list[Any]) -> list[Any] | None:
    """The values with tensors as addresses; what tells variants apart goes to `key`. None: something unheard of.

    No key is the beginning of another: each value's part starts with what kind it is, or with itself.
    """
    read: list[Any] = []
    for x in values:
        kind = type(x)
        if kind in _TENSORS:
            address = x.data_ptr()
            key.append(x.dtype)
            key.append(not address & 15)
            read.append(address)
        elif kind is int or x is None:
            key.append(x)
            read.append(x)
        elif kind is float or kind is bool:
            key.append(kind)
            read.append(x)
        elif isinstance(x, tuple):
            if kind is tuple and _INTEGERS.issuperset(map(type, x)):
                key.append(x)
                read.append(x)
            else:
                key.append(kind)
                key.append(len(x))
                inner = _read(x, key)
                if inner is None:
                    return None
                read.append(tuple(inner))
        elif (described := getattr(x, "described", None)) is not None:
            key.append(described.variant)
            read.append(x)
        else:
            return None
    return read


# ---------------------------------------------------------------- Triton's C launcher


class Handle:
    """A compiled kernel as Triton's C launcher takes it: start(*grid, stream, *fixed, arguments).

    The arguments are one list (as_list) or follow each other. n_constant: None for as many constants ends them.
    """

    __slots__ = ("as_list", "constants", "descriptors", "fixed", "n_constant", "start")

    def __init__(self, start: Any, fixed: tuple[Any, ...], descriptors: Any, n_constant: int, as_list: bool) -> None:
        self.start, self.fixed, self.descriptors = start, fixed, descriptors
        self.n_constant, self.as_list = n_constant, as_list
        self.constants = (None,) * n_constant

    def __call__(self, grid: tuple[int, ...], stream: int, given: list[Any]) -> None:
        for i, fields in self.descriptors:
            given[i : i + 1] = encode(given[i], fields)
        if self.as_list:
            given.extend(self.constants)
            self.start(*grid, stream, *self.fixed, given)
        else:
            self.start(*grid, stream, *self.fixed, *given, *self.constants)


def _handle(compiled: Any, n_constant: int) -> Handle | None:
    """How to launch a compiled kernel again; None where Triton does more than hand over the arguments."""
    from triton.backends.nvidia.driver import CudaLauncher

    launcher: Any = getattr(compiled, "_run", None)
    if type(launcher) is not CudaLauncher or getattr(launcher, "gsan_enabled", False):
        return None
    if launcher.global_scratch_size > 0 or launcher.profile_scratch_size > 0:
        return None
    start: Any = launcher.launch
    if (code := getattr(start, "__code__", None)) is not None:  # a Python layer that encodes descriptors
        layer = dict(zip(code.co_freevars, (cell.cell_contents for cell in start.__closure__ or ()), strict=True))
        start = layer.get("launcher", start)
    packed, flags = compiled.packed_metadata, (launcher.launch_cooperative_grid, launcher.launch_pdl)
    as_list = hasattr(launcher, "arg_annotations")  # from 3.7 on
    fixed: tuple[Any, ...]
    if as_list:
        fixed = (*flags, packed, *(None,) * 5, launcher.arg_annotations, launcher.kernel_signature)
    else:
        fixed = (*flags, None, None, packed, None, None, None)
    return Handle(start, (compiled.function, *fixed), _descriptors(compiled), n_constant, as_list)


class _Fields:
    """Triton's description of a descriptor parameter; one object for all that are alike, compared by identity."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields


_fields: dict[str, _Fields] = {}


def _descriptors(compiled: Any) -> list[tuple[int, _Fields]]:
    """Which parameters are descriptors, the last first, so that taking one apart moves none still to come."""
    kinds = list(compiled.src.signature.values())
    at = [i for i, kind in enumerate(kinds) if isinstance(kind, str) and kind.startswith("tensordesc")]
    fields = getattr(compiled.metadata, "tensordesc_meta", None) or [None] * len(at)
    found = [_fields.setdefault(repr(f), _Fields(f)) for f in fields]
    return list(zip(at, found, strict=True))[::-1]


def encode(descriptor: Any, fields: _Fields) -> list[Any]:
    """The arguments that a descriptor becomes: its tensor map, sizes and strides."""
    encoded = descriptor.described.encoded
    try:
        return encoded[fields]
    except KeyError:
        from triton.backends.nvidia import driver as nvidia

        more = (None,) * (nvidia.make_tensordesc_arg.__code__.co_argcount - 2)  # 3.9 passes one that it does not use
        encoded[fields] = made = list(nvidia.make_tensordesc_arg(descriptor, fields.fields, *more))
        return made
