"""The rate of every kernel that a training step launches, each timed by itself at a few sizes.

A kernel is a function (make, *sizes) -> call: `make(*shape)` draws a leaf, the call runs the operation on the leaves,
and its backward is the gradient for all of them. Layouts are those that the model hands over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...kernels import dispatch, fp8, reference
from ...kernels.cost import flash_attention_cost, linear_cross_entropy_cost, matmul_cost, muon_cost
from ...model.ceilings import Sizes
from ...model.parts import BACKWARD
from ...training.optim import AdamW, Muon
from ..measure.clock import Call, launch_times, median_seconds, on_capture_stream
from .schedule import Budget, plan

Rates = dict[str, dict[Sizes, float]]  # kernel -> {sizes: work/s}

SECONDS = 0.5  # for a kernel's sizes, forward and backward together
RUNS = {"cpu": 5, "cuda": 8}  # of a call at least, for its time: warming up, on a GPU the capture, three rounds
PASSES = 4  # a forward and a backward, in forwards
HURRY = 0.05  # seconds left for each task, below which one round is all that a call gets
LEAST_SECONDS = 1e-4  # of the device for a call of the least size, about: a hundred of them are issued
HEADS = 4  # of the q that is rotated, and of the k
WIDTH = 256  # of the embedding's rows
FP8_WIDTH = 2048  # of a matrix that is cast to fp8
TENSOR = 2**18  # elements of one parameter that AdamW updates
MATRICES = 4  # of one shape, that Muon updates at once
ROTATED = {"cpu": 2**8, "cuda": 2**11}  # tokens of a sequence, whose cosines all sequences share
ATTENTION_ROWS = {"cpu": 2**13, "cuda": 2**19}  # heads x tokens: enough to fill the device


def ops_on(device: torch.device) -> tuple[str, ModuleType]:
    """What the model's operations run there, by the estimate's name: Triton's kernels, or eager on a plain CPU.

    Nobody times Triton's interpreter: where it is on, the oracles stand in.
    """
    if device.type == "cuda":
        return "triton", kernels
    return ("eager", reference) if dispatch.INTERPRETED else ("cpu", kernels)


@dataclass
class Leaves:
    """Draws the tensors that a kernel takes, and remembers which of them get a gradient."""

    dtype: torch.dtype
    device: torch.device
    made: list[Tensor] = field(default_factory=list)

    @property
    def ops(self) -> ModuleType:
        return ops_on(self.device)[1]

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        leaf = (scale * torch.randn(shape, device=self.device)).to(dtype or self.dtype).requires_grad_()
        self.made.append(leaf)
        return leaf

    def tokens(self, count: int, limit: int) -> Tensor:
        return torch.randint(limit, (count,), device=self.device)


def _gemm(make: Leaves, M: int, N: int, K: int) -> Call:
    x, weight = make(M, K), make(N, K)
    return lambda: F.linear(x, weight)


def _attention(make: Leaves, T: int, D: int) -> Call:
    q, k, v = (make(1, T, _attention_heads(make.device, T), D).transpose(1, 2) for _ in range(3))
    return lambda: make.ops.flash_attention(q, k, v)


def _attention_heads(device: torch.device, T: int) -> int:
    return max(1, ATTENTION_ROWS[device.type] // T)


def _rms_norm(make: Leaves, elements: int, N: int) -> Call:
    x, weight = make(elements // N, N), make(N, dtype=torch.float32)  # parameters stay fp32
    return lambda: make.ops.rms_norm(x, weight)


def _rms_norm_residual(make: Leaves, elements: int, N: int) -> Call:
    x, residual, weight = make(elements // N, N), make(elements // N, N), make(N, dtype=torch.float32)
    return lambda: make.ops.rms_norm(x, weight, residual=residual)


def _rope(make: Leaves, elements: int, D: int) -> Call:
    rows = elements // (2 * HEADS * D)
    T = min(rows, ROTATED[make.device.type])
    q, k = (make(rows // T, T, HEADS, D).transpose(1, 2) for _ in range(2))
    table = torch.ones(T, D // 2, device=make.device)
    return lambda: make.ops.rope(q, k, table, table)


def _swiglu(make: Leaves, elements: int, N: int) -> Call:
    gate, up = make(elements // N, N), make(elements // N, N)
    return lambda: make.ops.swiglu(gate, up)


def _gelu(make: Leaves, elements: int, N: int) -> Call:
    x = make(elements // N, N)
    return lambda: make.ops.gelu(x)


def _add(make: Leaves, elements: int) -> Call:
    a, b = make(elements).detach(), make(elements).detach()
    return lambda: a + b


def _linear_cross_entropy(make: Leaves, M: int, N: int, V: int) -> Call:
    # logits of a model's size: larger ones underflow in the softmax, and a CPU is ten times slower over denormals
    weight = make(V, N, dtype=torch.float32, scale=N**-0.5)
    x, target = make(M, N), make.tokens(M, V)
    # the two passes apart: a step that keeps the gradients is their sum, less the logits computed again
    return lambda: make.ops.linear_cross_entropy(x, weight, target, keep_gradients=False)


def _scale(make: Leaves, elements: int) -> Call:
    """What the loss's backward does to gradients that its forward has made; most of them are the fp32 weight's."""
    gradients, factor = make(elements, dtype=torch.float32).detach(), torch.ones(1, device=make.device)
    return lambda: torch.mul(gradients, factor, out=torch.empty_like(gradients))


def _embedding(make: Leaves, elements: int) -> Call:
    rows = elements // WIDTH
    table, tokens = make(rows, WIDTH, dtype=torch.float32), make.tokens(rows, rows)
    return lambda: F.embedding(tokens, table).to(make.dtype)


def _cast(make: Leaves, elements: int) -> Call:
    weight = make(elements, dtype=torch.float32)
    return lambda: weight.to(make.dtype)


def _fp8_cast(make: Leaves, elements: int) -> Call:
    rows = make(elements // FP8_WIDTH, FP8_WIDTH).detach()
    return lambda: fp8.quantize(rows, torch.float8_e4m3fn)


def _adamw(make: Leaves, elements: int) -> Call:
    parameters = [make(size, dtype=torch.float32) for size in [TENSOR] * (elements // TENSOR) or [elements]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return AdamW(parameters).step


def _muon(make: Leaves, short: int, long: int) -> Call:
    matrices = [make(short, long, dtype=torch.float32) for _ in range(MATRICES)]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return Muon(matrices, dtype=make.dtype).step


@dataclass(frozen=True)
class Kernel:
    """How a kernel is made, the sizes it is timed at on each kind of device, and what its rate counts."""

    make: Callable[..., Call]
    sizes: dict[str, tuple[Sizes, ...]]
    count: Callable[..., int] | None = None  # (device, backward, *sizes); None: the first of the sizes
    unit: str = "elements"
    backward: bool = True

    def work(self, device: torch.device, sizes: Sizes, backward: bool) -> int:
        return self.count(device, backward, *sizes) if self.count else sizes[0]


def _attention_flops(device: torch.device, backward: bool, T: int, D: int) -> int:
    H = _attention_heads(device, T)
    return flash_attention_cost(1, H, H, T, T, D, backward=backward).flops


def _gemm_flops(device: torch.device, backward: bool, M: int, N: int, K: int) -> int:
    return matmul_cost(M, N, K, backward=backward).flops


def _muon_flops(device: torch.device, backward: bool, short: int, long: int) -> int:
    return MATRICES * muon_cost(short, long).flops


def _loss_flops(device: torch.device, backward: bool, M: int, N: int, V: int) -> int:
    return linear_cross_entropy_cost(M, N, V, backward=backward).flops


def _embedding_elements(device: torch.device, backward: bool, elements: int) -> int:
    """Backward, the gradient of every row of the table is written too: as many as there are tokens, here."""
    return 2 * elements if backward else elements


def _grid(cpu: tuple[tuple[int, ...], ...], cuda: tuple[tuple[int, ...], ...]) -> dict[str, tuple[Sizes, ...]]:
    return {"cpu": tuple(product(*cpu)), "cuda": tuple(product(*cuda))}


ELEMENTS = (2**15, 2**17, 2**19, 2**21, 2**23), (2**18, 2**21, 2**24, 2**27)
FLAT = _grid((ELEMENTS[0],), (ELEMENTS[1],))
ROWS = _grid((ELEMENTS[0], (32, 256)), (ELEMENTS[1], (64, 1024, 4096)))
WIDE = _grid((ELEMENTS[0], (512,)), (ELEMENTS[1], (4096,)))
MATRIX: dict[str, tuple[Sizes, ...]] = {
    kind: tuple((short, times * short) for short in sides for times in (1, 4))
    for kind, sides in {"cpu": (64, 128, 256, 512), "cuda": (512, 1024, 2048, 4096)}.items()
}

KERNELS: dict[str, Kernel] = {
    # first, since its rate depends on the length more than any other on its size
    "attention": Kernel(
        _attention,
        _grid(((64, 256, 1024), (32, 64, 128)), ((512, 1024, 2048, 4096, 8192, 16384), (64, 128))),
        _attention_flops,
        "FLOP",
    ),
    "gemm": Kernel(
        _gemm,
        _grid(
            ((512, 4096), (64, 128, 384, 1024), (64, 128, 384, 1024)),
            ((4096, 16384), (768, 1024, 2048, 4096, 8192), (768, 1024, 2048, 4096, 8192)),
        ),
        _gemm_flops,
        "FLOP",
    ),
    "linear_cross_entropy": Kernel(
        _linear_cross_entropy,
        _grid(((512, 2048), (128, 512), (1024, 4096)), ((16384,), (1024, 4096), (32768, 131072))),
        _loss_flops,
        "FLOP",
    ),
    "rms_norm": Kernel(_rms_norm, ROWS),
    "rms_norm residual": Kernel(_rms_norm_residual, ROWS),
    "rope": Kernel(_rope, _grid((ELEMENTS[0], (32, 128)), (ELEMENTS[1], (64, 128)))),
    "swiglu": Kernel(_swiglu, WIDE),
    "gelu": Kernel(_gelu, WIDE),
    "add": Kernel(_add, FLAT, backward=False),
    "scale": Kernel(_scale, FLAT, backward=False),
    "embedding": Kernel(_embedding, FLAT, _embedding_elements),
    "cast": Kernel(_cast, FLAT),
    "fp8_cast": Kernel(_fp8_cast, FLAT | {"cpu": ()}, backward=False),
    "adamw": Kernel(_adamw, FLAT, backward=False),
    "muon": Kernel(_muon, MATRIX, _muon_flops, "FLOP", backward=False),
}


def both_passes(call: Callable[[], Any], leaves: list[Tensor]) -> tuple[Call, Call]:
    """(the forward with its graph, the backward alone of a graph that is kept) of a call on these leaves."""
    outputs = call()
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    upstream = [torch.randn_like(y) for y in outputs]

    return call, lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True, allow_unused=True)


def grids(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Sizes, ...]]:
    """{kernel: the sizes it is timed at} of every kernel that a step in that dtype launches there."""
    needless = [*(["cast"] if dtype == torch.float32 else []), *([] if has_fp8(device) else ["fp8_cast"])]
    return {name: kernel.sizes[device.type] for name, kernel in KERNELS.items() if name not in needless}


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in fp8; a CPU imitates it."""
    return device.type == "cuda" and fp8.refusal(device) is None


def kernel_rates(
    dtype: torch.dtype,
    device: torch.device,
    *,
    names: Container[str] = KERNELS,
    deadline: float = float("inf"),
    peak: float = float("inf"),
    progress: Callable[[str], object] = lambda what: None,
    keep: Callable[[Rates], object] = lambda rates: None,
) -> Rates:
    """{"gemm": {sizes: work/s}, "gemm backward": ...} of the named kernels in that dtype.

    Each at one size at least, at the others as far as they end before `deadline` (time.perf_counter's) and fit into
    memory. peak: FLOP/s of large products; where they are so slow that a kernel's first sizes would take more than its
    share of the time, the middle one of those that would not comes first. keep gets what is there after each step: an
    interrupt loses no more than the step it falls into.
    """
    wanted = {name: grid for name, grid in grids(dtype, device).items() if name in names}

    def work(name: str, sizes: Sizes) -> float:
        return float(KERNELS[name].work(device, sizes, backward=False))

    share_of_each = max(0.0, deadline - time.perf_counter()) / max(1, len(wanted))

    def dear(name: str, amount: float) -> bool:
        return KERNELS[name].unit == "FLOP" and RUNS[device.type] * PASSES * amount / peak > share_of_each

    # a CPU's sizes are timed in turn, so that its slow moments fall on all; a GPU's tensors are too large for that
    tasks = plan(wanted, work, together=device.type == "cpu", dear=dear)
    budget = Budget(deadline, RUNS[device.type])
    rates: Rates = {}
    for i, task in enumerate(tasks):
        if not budget.allows(task):
            continue
        sizes = "" if len(task.sizes) > 1 else " x ".join(map(str, task.sizes[0]))
        progress(f"{task.kernel} {sizes}, {str(dtype).removeprefix('torch.')} ({i + 1} of {len(tasks)})")
        start = time.perf_counter()
        left = max(0.0, deadline - start) / (len(tasks) - i)
        share = min(left, SECONDS * len(task.sizes) / len(wanted[task.kernel]))
        rounds = (3 if left > HURRY else 1, 25)
        try:
            times = _time(KERNELS[task.kernel], task.sizes, dtype, device, share, rounds)
        except torch.OutOfMemoryError:
            if device.type == "cuda":
                torch.cuda.empty_cache()
            times = {}
        for (backward, at), seconds in times.items():
            done = KERNELS[task.kernel].work(device, at, backward)
            rates.setdefault(task.kernel + BACKWARD * backward, {})[at] = done / seconds
        budget.took(task, time.perf_counter() - start, sum(times.values()))
        keep(rates)
    return rates


def host_seconds(dtype: torch.dtype, device: torch.device, names: Container[str] = KERNELS) -> dict[str, float]:
    """{"gemm": seconds until the host has issued a call, "gemm backward": ...} of the named kernels, on a GPU.

    Each at its least size: what the host does there does not depend on it, and the device keeps up.
    """
    times: dict[str, float] = {}
    for name in (name for name in grids(dtype, device) if name in names):
        kernel, least = KERNELS[name], min(KERNELS[name].sizes[device.type])
        for backward, call in enumerate(_calls(kernel, least, dtype, device)):
            times[name + BACKWARD * backward], _ = launch_times(call, device, LEAST_SECONDS)
    return times


def _calls(kernel: Kernel, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Call, ...]:
    """The forward, and where there is one the backward, at those sizes."""
    leaves = Leaves(dtype, device)
    call = kernel.make(leaves, *sizes)
    return both_passes(call, leaves.made) if kernel.backward else (call,)


def _time(
    kernel: Kernel,
    group: Sequence[Sizes],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
) -> dict[tuple[bool, Sizes], float]:
    """{(backward, sizes): seconds} of one kernel at a few sizes, timed in turn."""
    calls: list[Call] = []
    with on_capture_stream(device):
        for sizes in group:
            calls += _calls(kernel, sizes, dtype, device)
        times = median_seconds(calls, device, seconds=seconds, rounds=rounds)
    timed = [(backward, sizes) for sizes in group for backward in ((False, True) if kernel.backward else (False,))]
    return dict(zip(timed, times, strict=True))
