"""Run Gluon kernels for Hopper on the CPU, from their own source, under adversarial timing.

    with emulated(hopper_forward, seed=3):
        hopper_forward.launch_forward(...)       # on CPU tensors

Partitions are threads of which one runs at a time; at every synchronisation a generator seeded with `seed` picks who
goes on, so a failing interleaving comes back from its seed. What the hardware does on its own time happens here at
times the same generator picks:

    TMA load     the buffer is NaN from the moment of issue, and the rows land at any later time
    wgmma        its shared-memory operands are read at any time between its issue and the wait that retires it
    TMA store    its buffer is read at any time up to the wait

and is an error where a program could see the difference (RaceError): reading a buffer that is still being loaded,
writing or reloading one that is still to be read, using an accumulator in flight, handing a buffer to TMA or wgmma with
no proxy fence since it was written. DeadlockError tells who waits for what. ProtocolError covers the rest: wrong byte
counts, too many arrivals, work still in flight at the end. Layouts and types are left to the compiler.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton.language as real_tl
from torch import Tensor
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.language.nvidia import hopper as real_hopper
from triton.runtime.jit import JITFunction

from rooflight.kernels.attention.hopper import blocks
from support import gluon_hardware as hardware
from support.gluon_scheduler import (
    DeadlockError,
    EmulationError,
    Machine,
    Program,
    ProtocolError,
    RaceError,
    current,
    current_program,
)
from support.gluon_values import FUNCTIONS, TORCH_DTYPE, Int, Pointer, integer

__all__ = ["DeadlockError", "EmulationError", "ProtocolError", "RaceError", "emulated", "mutated", "on_cpu"]

# ---------------------------------------------------------------- the kernel's names


class _Language:
    """What `gl` and `tl` are to an emulated kernel; layouts and the like are the real ones."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        value = getattr(real_gl, name)
        return TORCH_DTYPE.get(value, value) if isinstance(value, real_gl.dtype) else value


_LANGUAGE = _Language(
    FUNCTIONS
    | {
        "allocate_shared_memory": hardware.allocate_shared_memory,
        "warp_specialize": lambda *args: current_program().specialize(*args),
        "program_id": lambda axis: Int(current_program().index[axis]),
        "num_programs": lambda axis: Int(current_program().grid[axis]),
        "barrier": lambda **_: current_program().pause(),
        "thread_barrier": lambda: current_program().pause(),
    }
)

_STAND_INS: list[tuple[Any, Any]] = [
    (real_gl, _LANGUAGE),
    (real_tl, _LANGUAGE),
    (real_hopper.mbarrier, hardware.MBarrier),
    (real_hopper.tma, hardware.TMA),
    (blocks.tma_add, hardware.TMA.async_atomic_add),
    (blocks.tma_written, hardware.TMA.written),
    (blocks.fence_async_global, lambda: current_program().pause()),
    (real_hopper.fence_async_shared, hardware.fence_async_shared),
    (real_hopper.warpgroup_mma, hardware.warpgroup_mma),
    (real_hopper.warpgroup_mma_wait, hardware.warpgroup_mma_wait),
    *(
        (getattr(real_hopper.tma, n), getattr(hardware.TMA, n))
        for n in vars(hardware.TMA)
        if hasattr(real_hopper.tma, n)
    ),
    *((getattr(real_gl, n), getattr(_LANGUAGE, n)) for n in ("barrier", "thread_barrier") if hasattr(real_gl, n)),
]


def _bind(value: Any, done: dict[int, Any]) -> Any:
    """What `value`, a global of a kernel, is in the emulator; functions of kernels get emulated globals."""
    for real, stand_in in _STAND_INS:
        if value is real:
            return stand_in
    if isinstance(value, real_gl.constexpr):
        return value.value
    if not isinstance(value, JITFunction):
        return value
    function = value.fn
    if id(function) not in done:
        names = done.get(id(function.__globals__))
        if names is None:
            names = done[id(function.__globals__)] = {}
            names.update({name: _bind(x, done) for name, x in function.__globals__.items()})
        done[id(function)] = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
    return done[id(function)]


def on_cpu(function: JITFunction) -> Callable[..., Any]:
    """A function of a kernel, to be called with the emulator's values."""
    return _bind(function, {})


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    if isinstance(value, tuple):
        converted = [_argument(x) for x in value]
        return type(value)(*converted) if hasattr(value, "_fields") else tuple(converted)
    if isinstance(value, int) and not isinstance(value, bool):
        return integer(value)
    return hardware.Descriptor(value) if hasattr(value, "block_shape") else value


class _Kernel:
    """A kernel to launch as kernel[grid](*args, **constants and options)."""

    def __init__(self, kernel: JITFunction, seed: int, resident: int) -> None:
        self.function = _bind(kernel, {})  # before any name in the module is replaced
        self.names = kernel.arg_names
        self.constants = {p.name for p in kernel.params if p.is_constexpr}
        self.seed, self.resident = seed, resident

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.names}
            values = {k: v if k in self.constants else _argument(v) for k, v in given.items()}
            sizes = (*grid, 1, 1)[:3]
            indices = ((x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0]))
            programs = (Program(index, sizes, f"{self.seed} {index}") for index in indices)
            Machine().run(programs, self.resident, lambda program: self.run_program(program, values))

        return launch

    def run_program(self, program: Program, values: dict[str, Any]) -> None:
        current.program = program
        try:
            self.function(**values)
            program.finish()
        finally:
            current.program = None


@contextmanager
def emulated(*modules: types.ModuleType, seed: int = 0, resident: int = 1) -> Iterator[None]:
    """Inside, the Gluon kernels of these modules run here, with the interleaving that `seed` gives.

    resident: how many programs of a grid run side by side; they start in order.
    """
    kernels = [
        (module, name, _Kernel(value, seed, resident))
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    ]
    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(mock.patch.object(*kernel))
        yield


def mutated(folder: Path, modules: tuple[types.ModuleType, ...], *replacements: tuple[str, str]) -> types.ModuleType:
    """The last of `modules`, run from copies of their sources in `folder` in which each (old, new) is replaced.

    The others are modules that it imports from; an old text must stand exactly once in all of them.
    """
    sources = {module.__name__: Path(str(module.__file__)).read_text() for module in modules}
    for old, new in replacements:
        count = sum(source.count(old) for source in sources.values())
        assert count == 1, f"{count} times in the source: {old}"
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    return from_sources(folder, sources)


def from_sources(folder: Path, sources: dict[str, str]) -> types.ModuleType:
    """The last of the modules (name: source), each run from a file in `folder` and seen by those after it alone."""
    with mock.patch.dict(sys.modules):
        for name, source in sources.items():
            path = folder / f"{name.rpartition('.')[2]}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return module
