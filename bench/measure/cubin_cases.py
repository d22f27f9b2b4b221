"""The calls whose kernels cubins.py compiles here and launches elsewhere: what ships for sm_90, by kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...kernels.attention import paths

LENGTHS = (1000, 7, 513, 2049, 300, 129, 1, 98)  # of packed sequences

Function = Callable[..., Any]  # of the inputs: a tensor, or a tuple of them
# (inputs, the function, the same in torch): every output gets a gradient
Built = tuple[tuple[Tensor, ...], Function, Function]


class _Maker:
    """Tensors: random ones on a GPU, uninitialised where calls are compiled only."""

    def __init__(self, device: str) -> None:
        self.device = device
        torch.manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        make = torch.empty if self.device == "cpu" else torch.randn
        return make(shape, device=self.device, dtype=torch.bfloat16).requires_grad_()


def _attention(make: _Maker, D: int, packed: bool = False) -> Built:
    if not packed:
        inputs = tuple(make(2, 16, 4096, D) for _ in range(3))
        return (
            inputs,
            kernels.flash_attention,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
    total = sum(LENGTHS)
    inputs = make(total, 8, D), make(total, 4, D), make(total, 4, D)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    ends = torch.tensor(starts, dtype=torch.int32, device=make.device)
    longest = max(LENGTHS)

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for a, b in itertools.pairwise(starts):
            one, keys, values = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(one, keys, values, is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    return inputs, lambda q, k, v: kernels.flash_attention_varlen(q, k, v, ends, ends, longest, longest), truth


def _norm(make: _Maker, N: int) -> Built:
    return (
        (make(4096, N), make(N)),
        lambda x, w: kernels.rms_norm(x, w, 1e-6),
        lambda x, w: F.rms_norm(x, (N,), w, 1e-6),
    )


def _loss(make: _Maker, V: int) -> Built:
    target = torch.arange(2048, device=make.device) * 7919 % V
    return (
        (make(2048, V),),
        lambda x: kernels.cross_entropy(x, target),
        lambda x: F.cross_entropy(x, target),
    )


def _gated(make: _Maker, N: int) -> Built:
    def truth(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return (make(2048, 2 * N),), lambda x: kernels.swiglu(*x.chunk(2, -1)), truth


def _turned(make: _Maker, D: int) -> Built:
    table = torch.outer(torch.arange(1024), 10000.0 ** (-torch.arange(D // 2) * 2 / D)).to(make.device)
    cos, sin = table.cos(), table.sin()

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    inputs = tuple(make(2, 1024, heads, D).detach().transpose(1, 2).requires_grad_() for heads in (16, 4))
    return inputs, lambda q, k: kernels.rope(q, k, cos, sin), lambda q, k: (turn(q), turn(k))


# name -> how it is built, its arguments, and the attention's path
CASES: dict[str, tuple[Callable[..., Built], dict[str, Any], str | None]] = {
    **{
        f"{path} {D}{' packed' * packed}": (_attention, {"D": D, "packed": packed}, path)
        for path, D, packed in (
            ("hopper", 64, False), ("hopper", 128, False), ("hopper", 64, True), ("hopper", 128, True),
            ("portable", 64, False), ("portable", 128, False),
        )
    },
    **{f"rms_norm {N}": (_norm, {"N": N}, None) for N in (4096, 1600, 16384)},
    "cross_entropy": (_loss, {"V": 50304}, None),
    "swiglu": (_gated, {"N": 11008}, None),
    "rope": (_turned, {"D": 128}, None),
}  # fmt: skip


def passes(name: str, device: str) -> tuple[Callable[[], dict[str, Tensor]], Callable[[], dict[str, Tensor]]]:
    """(the case's call and its gradients, the same in fp32 torch): results by name, not called yet."""
    build, arguments, path = CASES[name]
    make = _Maker(device)
    inputs, forward, exact = build(make, **arguments)
    seeds: list[Tensor] = []

    def both(function: Function, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
        found = function(*given)
        outputs = found if isinstance(found, tuple) else (found,)
        if not seeds:
            seeds.extend(make(*y.shape).detach() for y in outputs)
        gradients = torch.autograd.grad(outputs, given, [g.to(y.dtype) for g, y in zip(seeds, outputs, strict=True)])
        return {f"out{i}": y.detach() for i, y in enumerate(outputs)} | {f"d{i}": g for i, g in enumerate(gradients)}

    def call() -> dict[str, Tensor]:
        with nullcontext() if path is None else paths.use(path):
            return both(forward, inputs)

    return call, lambda: both(exact, tuple(x.detach().float().requires_grad_() for x in inputs))
