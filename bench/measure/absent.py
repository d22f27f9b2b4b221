"""A GPU that is not there, to Triton: what launchers launch is compiled for it, or goes to what stands in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["SHARED", "AbsentGPU", "compile_launches"]

SHARED = 227 << 10  # bytes that one block of an sm_90 can use


class AbsentGPU:
    """As much of a Triton driver as compiling needs. target: GPUTarget's arguments, by default an H100's or H200's."""

    def __init__(self, *target: Any, shared: int = SHARED) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.shared, self.utils = GPUTarget(*(target or ("cuda", 90, 32))), shared, self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def compile_launches(gpu: AbsentGPU, seen: Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], object]) -> None:
    """From now on, in a process without the interpreter, what is launched for CPU tensors is compiled and not run.

    seen: given the kernel, its arguments, by place and by name, and what was compiled.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(gpu)
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        seen(kernel, args, kwargs, compiled)
        return compiled

    JITFunction.run = compile_only
    from ...kernels import dispatch

    dispatch.INTERPRETED = True  # what serves plain CPU tensors too launches kernels for these
