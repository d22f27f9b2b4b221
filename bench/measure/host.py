"""Host time of a call: what Python, torch and Triton's launcher take before the GPU has anything to do.

    python -m rooflight.bench.measure.host      # on a GPU where there is one, else on a stand-in for Triton's driver

The stand-in names an sm_90 that is not there, compiles nothing and launches nothing; everything above the C launcher
is what runs on a GPU: argument checks, autograd, allocation, specialisation, Triton's own CudaLauncher. Its times are
to be read as ratios, and say nothing of cudaLaunchKernel itself (about 2 us).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

from ...kernels import dispatch, flash_attention, rms_norm
from ...kernels.attention import paths
from ...kernels.attention.hopper import blocks
from ...kernels.dispatch import bare_apply
from .absent import AbsentGPU

__all__ = ["StandIn", "cases", "microseconds", "standing_in"]


class StandIn(AbsentGPU):
    """As much of Triton's CUDA driver as launching needs. launched: the arguments of each call of the C launcher."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Any, ...]] = []
        self.kernels: dict[int, CompiledKernel] = {}  # by function: every variant that was compiled
        self.keep = True
        self.device = 0
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7

    # ------------------------------------------------------------ what Triton's C modules do

    def launch(self, *args: Any) -> None:
        if self.keep:
            self.launched.append(args)

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        return ",".join(signature).encode()

    def fill_tma_descriptor(self, *args: Any) -> tuple[Any, ...]:
        return "tensor map", *(tuple(arg) if isinstance(arg, list) else arg for arg in args)

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> CompiledKernel:
        """A compiled kernel without machine code; its launcher is Triton's own."""
        kernel = _Compiled(source, options)
        self.kernels[kernel.function] = kernel
        return kernel


class _Compiled(CompiledKernel):
    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        described = [kind for kind in source.signature.values() if str(kind).startswith("tensordesc")]
        scratch = {f"{kind}_scratch_{part}": 0 for kind in ("global", "profile") for part in ("size", "align")}
        self.metadata = SimpleNamespace(
            name=source.fn.__name__, shared=0, launch_cooperative_grid=False, launch_pdl=False, num_ctas=1,
            tensordesc_meta=[_descriptor_fields(kind) for kind in described], **scratch,
        )  # fmt: skip
        self.packed_metadata = (options["num_warps"], 1, 0)
        self.src, self.name, self.hash = source, source.fn.__name__, ""
        self.module, self._module_pid, self.function = 0, None, id(self)
        self._run = nvidia.CudaLauncher(source, self.metadata)


def _descriptor_fields(kind: str) -> dict[str, Any]:
    match = re.match(r"tensordesc<(\w+)\[([^\]]*)\]", kind)
    assert match is not None
    sizes = [int(size) for size in match[2].split(",")]
    return {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": sizes, "fp4_padded": False}


class _KernelArg:
    def __init__(self, nested_tuple: Any, type: Any) -> None:
        self.nested_tuple, self.type = nested_tuple, type


def _always(tensor: torch.Tensor) -> bool:
    return True


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Within, CPU tensors are launched like a GPU's, into nothing. For a process of its own without the interpreter."""
    assert not dispatch.INTERPRETED
    stand_in = StandIn()
    module = SimpleNamespace(launch=stand_in.launch)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", stand_in))
        stack.enter_context(mock.patch.object(triton.compiler, "compile", stand_in.compile))
        for name, value in {
            "PyKernelArg": _KernelArg, "ARG_CONSTEXPR": 0, "ARG_KERNEL": 1, "ARG_TUPLE": 2,
            "compile_module_from_src": lambda **_: module, "library_dirs": list,
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(nvidia, name, value, create=True))
        # CPU tensors run Triton, as under the interpreter
        stack.enter_context(mock.patch.object(dispatch, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(blocks, "_on_gpu", _always))
        yield stand_in


class Case(NamedTuple):
    """call: what is timed.  before: what must come before each.  within: what a batch of calls must run in."""

    call: Callable[[], Any]
    before: Callable[[], Any] = lambda: None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


ROUNDS, BATCH = 100, 10


def microseconds(cases: dict[str, Case]) -> dict[str, float]:
    """Each call's least mean over ROUNDS batches of BATCH calls; what comes before a call is not counted.

    Batches of all calls take turns: a slow moment of the machine falls on all alike.
    """
    on_gpu = torch.cuda.is_available()
    # On the CPU a backward runs on the thread that asks for it: other processes' time does not count.
    clock = time.perf_counter_ns if on_gpu else time.thread_time_ns
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(ROUNDS):
        for name, (call, before, within) in cases.items():
            total = 0
            with within():
                for n in range(-3, BATCH):  # the first ones find other calls' code in the caches
                    before()
                    start = clock()
                    call()
                    total += clock() - start if n >= 0 else 0
            best[name] = min(best[name], total / BATCH / 1e3)
            if on_gpu:
                torch.cuda.synchronize()
    return best


def _passes(name: str, forward: Callable[..., Any], *inputs: torch.Tensor, path: str | None = None) -> dict[str, Case]:
    """The forward of inputs that want gradients, its backward, and the forward under no_grad; attention's on a path."""
    gradient = torch.ones_like(inputs[0])
    made: list[torch.Tensor] = []

    @contextmanager
    def within(grad: bool = True) -> Iterator[None]:
        with paths.use(path), torch.set_grad_enabled(grad):
            yield

    def graph() -> None:
        made[:] = [forward(*inputs)]

    return {
        f"{name} forward": Case(lambda: forward(*inputs), within=within),
        f"{name} inference": Case(lambda: forward(*inputs), within=lambda: within(False)),
        f"{name} backward": Case(lambda: torch.autograd.grad(made[0], inputs, gradient), graph, within),
    }


class _Floor(torch.autograd.Function):
    """What no launch through an autograd.Function goes below: `made` fresh tensors, two saved, nothing computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        y, statistic = torch.empty_like(inputs[0]), inputs[0].new_empty(1, dtype=torch.float32)
        ctx.save_for_backward(*inputs, statistic)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple([torch.empty_like(x) for x in ctx.saved_tensors[:-1]])


def cases(device: torch.device, rows: int, length: int) -> dict[str, Case]:
    """rms_norm of (rows, 4096) and attention of (1, 16, length, 128), ours and torch's, in bf16.

    On a CPU torch's are stood in for too: its rms_norm is several operators there, and its kernels do their work. So
    it is layer_norm, one operator as rms_norm is on a GPU, and attention, of so few numbers that the kernel's part is
    small; nothing of it is a launch. floor: an autograd.Function that only allocates, past its own apply.
    """
    on_gpu = device.type == "cuda"

    def wanting(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()

    def norm(x: torch.Tensor, weight: torch.Tensor) -> Any:
        if on_gpu:
            return F.rms_norm(x, weight.shape, weight, 1e-6)
        return F.layer_norm(x, weight.shape, weight, None, 1e-6)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    normed = wanting(rows, 4096), wanting(4096)
    attended = [wanting(1, 16, length, 128) for _ in range(3)]
    small_rows, small_heads = (wanting(1, 8), wanting(8)), [wanting(1, 1, 1, 8) for _ in range(3)]
    return {
        **_passes("rms_norm torch", norm, *(normed if on_gpu else small_rows)),
        **_passes("rms_norm floor", bare_apply(_Floor), *normed),
        **_passes("rms_norm ours", rms_norm, *normed),
        **_passes("attention torch", sdpa, *(attended if on_gpu else small_heads)),
        **_passes("attention floor", bare_apply(_Floor), *attended),
        **_passes("attention portable", flash_attention, *attended, path="portable"),
        **_passes("attention hopper", flash_attention, *attended, path="hopper"),
    }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    with ExitStack() as stack:
        if not on_gpu:
            stack.enter_context(standing_in()).keep = False
        device = torch.device("cuda" if on_gpu else "cpu")
        found = microseconds(cases(device, *((64, 512) if on_gpu else (1, 16))))
        for name, time_of in found.items():
            kernel, _, pass_ = name.split()
            print(f"{name:30} {time_of:8.1f}  {time_of / found[f'{kernel} torch {pass_}']:6.2f}", flush=True)


if __name__ == "__main__":
    main()
