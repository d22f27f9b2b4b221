"""What is measured: a case is an operation at a shape, its inputs, who computes it, the truth, and its cost.

Declarative on purpose: the harness checks and times any case in the same way, `pytest --benchmark` and
`rooflight bench kernels` both run these lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import kernels
from ..kernels import cost, reference

Provider = Callable[..., Any]  # returns one tensor


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype.

    inputs(device) makes the tensors that a provider takes, all of them leaves that require a gradient.  truth takes
    them in a higher precision and returns the output to compare with.  cost(backward) is the closed form.
    """

    operation: str
    shape: Mapping[str, int | bool]
    dtype: torch.dtype
    inputs: Callable[[torch.device], tuple[Tensor, ...]]
    providers: Mapping[str, Provider]
    truth: Provider
    cost: Callable[[bool], cost.Cost]

    @property
    def name(self) -> str:
        shape = "-".join(f"{key}{int(value)}" for key, value in self.shape.items())
        return f"{self.operation}-{shape}-{str(self.dtype).removeprefix('torch.')}"


def _leaves(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes)


def rms_norm_case(M: int, N: int, dtype: torch.dtype, device: torch.device) -> Case:
    """RMSNorm of M rows of N; peers are torch's own function, eager and (on a GPU) compiled, and the plain oracle."""

    def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (N,), weight, 1e-6)

    providers: dict[str, Provider] = {
        "rooflight": kernels.rms_norm,
        "torch": torch_rms_norm,
        "eager": reference.rms_norm,
    }
    if device.type == "cuda":
        providers["torch.compile"] = torch.compile(torch_rms_norm, dynamic=False)
    return Case(
        "rms_norm",
        {"M": M, "N": N},
        dtype,
        partial(_leaves, [(M, N), (N,)], dtype),
        providers,
        reference.rms_norm,
        lambda backward: cost.rms_norm_cost(M, N, dtype, backward=backward),
    )


def _sdpa(backend: SDPBackend | None, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call()
    with sdpa_kernel(backend):
        return call()


def attention_case(
    B: int, H: int, K: int, T: int, D: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    """Attention over T positions; peers are torch's scaled_dot_product_attention backends."""
    providers: dict[str, Provider] = {"rooflight": partial(kernels.flash_attention, causal=causal)}
    if device.type == "cuda":
        providers["torch flash"] = partial(_sdpa, SDPBackend.FLASH_ATTENTION, causal)
        providers["torch cuDNN"] = partial(_sdpa, SDPBackend.CUDNN_ATTENTION, causal)
    else:
        providers["torch"] = partial(_sdpa, None, causal)
        providers["eager"] = partial(reference.flash_attention, causal=causal)
    return Case(
        "flash_attention",
        {"B": B, "H": H, "K": K, "T": T, "D": D, "causal": causal},
        dtype,
        partial(_leaves, [(B, H, T, D), (B, K, T, D), (B, K, T, D)], dtype),
        providers,
        partial(_sdpa, None, causal),
        lambda backward: cost.flash_attention_cost(B, H, K, T, T, D, causal, None, dtype, backward=backward),
    )


def cases(device: torch.device) -> list[Case]:
    """The shapes worth watching: sizes of real models on a GPU, the same kinds scaled down on a CPU."""
    bf16 = torch.bfloat16
    if device.type == "cuda":
        norms = [(16384, 4096), (8192, 8192), (4096, 16384), (131072, 128), (64, 4096)]
        return [rms_norm_case(M, N, bf16, device) for M, N in norms] + [
            attention_case(max(1, 16384 // T), 16, K, T, D, causal, bf16, device)
            for T, K, D, causal in [
                (512, 16, 128, True),  # short: launch-bound
                (4096, 16, 128, True),
                (8192, 16, 128, True),
                (16384, 16, 128, True),
                (8192, 16, 128, False),
                (8192, 16, 64, True),
                (8192, 2, 128, True),  # grouped queries
            ]
        ]
    return [
        rms_norm_case(4096, 256, torch.float32, device),
        rms_norm_case(1024, 4096, bf16, device),  # wide rows
        attention_case(4, 4, 4, 256, 32, True, torch.float32, device),  # the demo's shape
        attention_case(1, 8, 2, 1024, 64, True, bf16, device),  # grouped queries
        attention_case(1, 8, 8, 1024, 64, False, torch.float32, device),
    ]
