"""A case: an operation at a shape, its inputs, who computes it, the truth, and its cost.

Declarative on purpose: the harness checks and times any case in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.attention import paths
from ...kernels.cost import Cost
from ...model.parts import BACKWARD, Work

Provider = Callable[..., Any]  # returns a tensor, or a tuple of them

OURS = "rooflight"  # as a user gets it
HOPPER, PORTABLE = "rooflight hopper", "rooflight portable"
PATHS = {HOPPER: "hopper", PORTABLE: "portable"}
COMPILED = frozenset({"torch.compile", "FlexAttention"})
PRODUCTS = ("flash_attention", "linear_cross_entropy")  # whose rate is counted in FLOPs, the others' in elements


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype.

    inputs(device) makes the tensors that a provider takes, all of them leaves that require a gradient.  truth takes
    them in a higher precision and returns the output to compare with.  cost(backward) is the closed form.
    kernel, sizes: whose rate, and at which sizes, the estimate takes for it (model/parts.py).
    modes: what is timed: "forward" without a graph, "backward" of one that is kept, or "training", both as a step runs
    them.  timed: False where only the result is looked at.  repeats: how many backward runs must agree to the last bit.
    defaults: where there are several paths, which of them each mode takes when none is asked for.
    """

    operation: str
    shape: Mapping[str, int | bool]
    dtype: torch.dtype
    inputs: Callable[[torch.device], tuple[Tensor, ...]]
    providers: Mapping[str, Provider]
    truth: Provider
    cost: Callable[[bool], Cost]
    kernel: str
    sizes: tuple[int, ...]
    modes: tuple[str, ...] = ("forward", "backward")
    timed: bool = True
    repeats: int = 0
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        shape = "-".join(f"{key}{int(value)}" for key, value in self.shape.items())
        use = "" if self.timed else "-check"
        return f"{self.operation}-{shape}-{str(self.dtype).removeprefix('torch.')}{use}"

    @property
    def kind(self) -> tuple[int | bool | None, ...]:
        """What decides which code of the hopper path a case runs."""
        return self.shape.get("D"), "window" in self.shape, "documents" in self.shape

    def cost_of(self, mode: str) -> Cost:
        """The closed form of a mode."""
        return self.cost(False) + self.cost(True) if mode == "training" else self.cost(mode == "backward")

    def work(self, backward: bool) -> Work:
        """One pass of the case as the estimate knows it."""
        price, kernel = self.cost(backward), self.kernel + BACKWARD * backward
        if self.operation in PRODUCTS:
            return Work(price, kernel, self.sizes, price.flops, executed=price.flops)
        return Work(price, kernel, self.sizes, self.sizes[0])

    def path(self, provider: str) -> AbstractContextManager[None]:
        """What the provider, forward and backward, must run in."""
        return paths.use(PATHS[provider]) if provider in PATHS else nullcontext()

    def taken(self, provider: str, mode: str) -> str | None:
        """The path that a mode of the provider runs on; None for a peer, and where there is but one."""
        return self.defaults.get(mode) if provider == OURS else PATHS.get(provider)


def leaves(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, scales: Sequence[float] = ()
) -> tuple[Tensor, ...]:
    """Normal random numbers, the same on every call; scales: their deviations, 1 when left out."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    scaled = (x * scale for x, scale in zip(drawn, scales or [1.0] * len(shapes), strict=True))
    return tuple(x.to(dtype).requires_grad_() for x in scaled)
