"""One training step of a model on tokens of no meaning: what is timed, weighed and counted whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from ...kernels import fp8 as kernels_fp8
from ...kernels import reference
from ...model import ModelConfig, Transformer
from ...model.layers import use_fp8
from ...training.graph import CudaGraphs
from ...training.optim import build_optimizers, low_precision
from ..measure.clock import median_seconds
from ..measure.memory import peak_bytes
from ..rates.kernel_rates import ops_on


def take_step(
    forward: Callable[..., Tensor], inputs: Tensor, targets: Tensor, optimizers: Iterable[Optimizer], dtype: torch.dtype
) -> Tensor:
    """Forward, backward and update, issued and not waited for; the loss."""
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        loss = forward(inputs, targets)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def graphed(issue: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The replay of a step's CUDA graph, after three steps on the stream of the capture.

    Raises RuntimeError where a part of the step cannot be captured.
    """
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        graphs.run(issue)
    again, loss = graphs.capture(issue)

    def replay() -> Tensor:
        again()
        return loss

    return replay


class Step:
    """Forward, backward and update, as the training loop runs them, for B sequences of T tokens."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        compiled: bool = False,
        optimizer: str = "adamw",
        fp8: bool = False,
    ) -> None:
        self.device, self.dtype = device, dtype
        ops = ops_on(device)[1]
        with device:
            self.model = Transformer(config, ops)
            tokens = torch.randint(config.vocab_size, (batch_size, context_length + 1))
        if fp8:
            multiply_in_fp8(self.model.layers, ops, device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        copies = {} if compiled else low_precision(device, dtype)
        self.optimizers = build_optimizers(self.model, optimizer=optimizer, lr=1e-4, muon_dtype=dtype, **copies)
        self.forward = torch.compile(self.model) if compiled else self.model

    def issue(self) -> Tensor:
        """Forward, backward and update, as far as the host's part goes; the loss."""
        return take_step(self.forward, self.inputs, self.targets, self.optimizers, self.dtype)

    def __call__(self) -> None:
        self.issue()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, budget: float, *, graph: bool = False) -> tuple[float, float | None]:
        """(a step's median, the median until the host has issued it) in about `budget` seconds; no host on a CPU.

        graph: of the step as one CUDA graph; RuntimeError where it cannot be captured.
        """
        issued: list[float] = []
        issue = graphed(self.issue) if graph else self.issue

        def step() -> None:
            start = time.perf_counter()
            issue()
            issued.append(time.perf_counter() - start)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        (whole,) = median_seconds([step], self.device, seconds=budget, capture=False)
        return whole, statistics.median(issued[1:]) if self.device.type == "cuda" else None  # the first warms up

    def peak_bytes(self) -> int:
        """The step's peak memory: parameters and moments, and what the step allocates besides."""
        self()  # the moments are allocated in the first
        states = sum(p.nbytes for p in self.model.parameters())
        moments = (x for o in self.optimizers for state in o.state.values() for x in state.values())
        states += sum(x.nbytes for x in moments if isinstance(x, torch.Tensor))
        return states + peak_bytes(self, self.device)


def multiply_in_fp8(blocks: nn.ModuleList, ops: ModuleType, device: torch.device) -> None:
    """Have the blocks multiply in fp8, as training has it; ValueError where the device has no such products."""
    if (reason := kernels_fp8.refusal(device)) is not None:
        raise ValueError(f"device: {reason}")
    use_fp8(blocks, ops.fp8_linear)


def count_flops(
    config: ModelConfig, batch_size: int, context_length: int | None = None, fp8: bool = False
) -> tuple[int, int]:
    """(parameters, matrix-product FLOPs of a forward and backward) as torch counts them, on tensors without storage."""
    with torch.device("meta"):
        model = Transformer(config, ops=reference)
        tokens = torch.zeros(batch_size, context_length or config.context_length, dtype=torch.int64)
    if fp8:
        use_fp8(model.layers, reference.fp8_linear)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()
