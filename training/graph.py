"""A step of training on one batch, as it is or as CUDA graphs: captured once, then replayed without the host.

A replay launches what was launched during the capture, on the same addresses: what changes from step to step must be
read from memory. Batches are copied into the capture's own tensors; learning rates are scalars on the device (group
["lr"]), as are the optimizers' counts of steps and the factor of clipping. Nothing in a step waits for the device.

Under gradient accumulation there are two graphs, one for a micro-batch and one for the update, and gradients stay where
they are, to be added to. Validation is a graph of its own. All share one pool of memory: they never run at once, and
what one leaves to be read (losses, norms) is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from .data import IGNORED
from .distributed import ALONE, World
from .optim import clip_grad_norm

__all__ = ["Captured", "CudaGraphs", "Graphs", "TrainStep", "autocast", "make_rates_tensors", "set_rates"]

# Steps that run as they are before the capture: they compile kernels, and make moments and cuBLAS's workspaces.
WARMUP = 2


class Graphs(Protocol):
    """What captures and replays: CudaGraphs, or what a test puts in its place."""

    def run(self, function: Callable[[], Any]) -> Any:
        """function(), where a capture would take place."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays function's work, and function's result, which every replay writes anew. Runs nothing."""


class CudaGraphs:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = function()
        return graph.replay, result


class Captured:
    """function(*tensors), captured after `warmup` calls and replayed from then on.

    Tensors of other shapes than the captured ones are given to the function itself. A result stays where it is: the
    next replay overwrites it. Where the capture fails, `failed` is told why, once, and the function runs as it is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        graphs: Graphs,
        *,
        warmup: int = WARMUP,
        failed: Callable[[RuntimeError], object],
    ) -> None:
        self.function, self.graphs, self.warmup, self.failed = function, graphs, warmup, failed
        self.inputs: list[Tensor] = []
        self.result: Any = None
        self._replay: Callable[[], None] | None = None
        self._refused = False

    def __call__(self, *tensors: Tensor) -> Any:
        if self._replay is None and not self._refused:
            if self.warmup > 0:
                self.warmup -= 1
                return self.graphs.run(lambda: self.function(*tensors))
            self._capture(tensors)
        if self._replay is None or any(x.shape != y.shape for x, y in zip(self.inputs, tensors, strict=True)):
            return self.function(*tensors)
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self._replay()
        return self.result

    def _capture(self, tensors: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in tensors]
        try:
            self._replay, self.result = self.graphs.capture(lambda: self.function(*self.inputs))
        except RuntimeError as error:
            self._refused = True
            self.failed(error)


class TrainStep:
    """step(inputs, targets): forward, backward, clipping and update; returns (mean loss, gradient norm) on the device.

    forward: (inputs, targets) to a mean loss; a batch of more tensors gives it those too.  dtype: autocast's.
    micro_batches: equal parts of a batch that follow each other, with gradients added up.  by_tokens: the step's loss
    is the mean over its targets that are not IGNORED, of which micro-batches may have more or fewer; else over
    micro-batches.  max_norm: of all gradients together.
    graphs: where to capture the step; None: it always runs as it is.  say: told in a sentence why it cannot be.
    world: the processes that each give the step their rows of a batch; loss and norm are of all rows.  no_sync: a
    context for the backward passes before a step's last, whose gradients are not to be exchanged yet.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        parameters: Iterable[Tensor],
        optimizers: Sequence[Optimizer],
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batches: int = 1,
        by_tokens: bool = False,
        max_norm: float = math.inf,
        graphs: Graphs | None = None,
        say: Callable[[str], object] = print,
        world: World = ALONE,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.world, self.no_sync = world, no_sync
        self.forward, self.parameters, self.optimizers = forward, list(parameters), optimizers
        self.device, self.dtype, self.max_norm, self.say = device, dtype, max_norm, say
        self.micro_batches = micro_batches
        self.weighs = by_tokens and (micro_batches > 1 or world.size > 1)
        self.total = torch.zeros((), device=device)
        self.keeps_gradients = graphs is not None and micro_batches > 1
        self._whole: Callable[..., Any] = self._run_whole
        self._micro: Callable[..., Any] = self._run_micro
        self._update: Callable[..., Any] = self._run_update
        if graphs is None:
            return
        make_rates_tensors(optimizers, device)
        if micro_batches == 1:
            self._whole = Captured(self._run_whole, graphs, failed=self._failed)
        else:
            self._micro = Captured(self._run_micro, graphs, warmup=WARMUP * micro_batches, failed=self._failed)
            self._update = Captured(self._run_update, graphs, failed=self._failed)

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        if self.micro_batches == 1 and self.world.size == 1:
            return self._whole(*batch)
        self._accumulate(self._micro, *batch)
        return self._update()

    def _accumulate(self, micro: Callable[..., Any], *batch: Tensor) -> None:
        *others, last = self.split(*batch)
        for micro_batch in others:
            with self.no_sync():
                micro(*micro_batch)
        micro(*last)

    def split(self, *batch: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The arguments of the micro-batches: parts of the batch's tensors and, by tokens, each one's share."""
        n = self.micro_batches
        if self.weighs:
            counts = (batch[1] != IGNORED).reshape(n, -1).sum(1)
            # the processes' gradients are averaged, so that the shares of all add up to their number
            whole = self.world.mean(counts.sum().double()) if self.world.size > 1 else counts.sum()
            batch = (*batch, (counts / whole.clamp(min=1 / self.world.size)).float())
        return zip(*(x.chunk(n) for x in batch), strict=True)

    def _run_whole(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        self._run_micro(*batch)
        return self._run_update()

    def _run_micro(self, *micro_batch: Tensor) -> None:
        with autocast(self.device, self.dtype):
            if self.weighs:
                *tensors, share = micro_batch
                loss = self.forward(*tensors) * share.squeeze()
            else:
                loss = self.forward(*micro_batch) / self.micro_batches
        loss.backward()
        self.total += loss.detach()

    def _run_update(self) -> tuple[Tensor, Tensor]:
        result = self._measured()
        self.update()
        return result

    def _measured(self) -> tuple[Tensor, Tensor]:
        norm = clip_grad_norm(self.parameters, self.max_norm, self.optimizers)
        loss = self.world.mean(self.total.clone())
        self.total.zero_()
        return loss, norm

    def gradients(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The step's first half, never captured: its loss and norm, with the gradients left for `update`."""
        self._accumulate(self._run_micro, *batch)
        return self._measured()

    def update(self) -> None:
        """The step's second half."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def forget_graphs(self) -> None:
        """Run as it is from now on; the graphs' memory is free, and no gradients are left."""
        self._whole, self._micro, self._update = self._run_whole, self._run_micro, self._run_update
        self.keeps_gradients = False
        self.total.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def _failed(self, error: RuntimeError) -> None:
        if not self.keeps_gradients:  # those of the capture hold nothing
            for parameter in self.parameters:
                parameter.grad = None
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        self.say(f"the step runs without a CUDA graph, which cannot hold it: {reason}")


def make_rates_tensors(optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """Learning rates as scalars on the device, which graphs read."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)


def set_rates(optimizers: Iterable[Optimizer], rates: Iterable[Iterable[float]]) -> None:
    """Set each group's learning rate, in place where it is a scalar on the device."""
    for optimizer, some in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, some, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision in that dtype; nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
