"""Cases of everything but attention: norms, gates, rotations and losses, row by row."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...kernels import cost, reference
from .case import OURS, Case, Provider, leaves
from .peers import compiled, rms_norm_peers

EPSILON = 1e-6


def _beside(ours: Provider, peer: Provider, oracle: Provider, device: torch.device) -> dict[str, Provider]:
    """Ours, torch's eager operators, and on a GPU the same compiled; on a CPU, which has the time, the oracle."""
    providers = {OURS: ours, "torch": peer}
    if device.type == "cuda":
        return providers | {"torch.compile": compiled(peer)}
    return providers | {"eager": oracle}


def rms_norm_case(M: int, N: int, dtype: torch.dtype, device: torch.device, *, residual: bool = False) -> Case:
    """RMSNorm of M rows of N."""

    def torch_rms_norm(x: Tensor, weight: Tensor, *added: Tensor) -> Any:
        h = x + added[0] if added else x
        y = F.rms_norm(h, (N,), weight, EPSILON)
        return (y, h) if added else y

    def named(function: Provider, x: Tensor, weight: Tensor, *added: Tensor) -> Any:
        return function(x, weight, residual=added[0]) if added else function(x, weight)

    oracle = partial(named, reference.rms_norm)
    providers = _beside(partial(named, kernels.rms_norm), torch_rms_norm, oracle, device)
    if device.type == "cuda":
        peers = rms_norm_peers(EPSILON)
        providers |= {name: peer for name, peer in peers.items() if not residual or name != "Liger"}
    return Case(
        "rms_norm",
        {"M": M, "N": N} | ({"residual": True} if residual else {}),
        dtype,
        partial(leaves, [(M, N), (N,), *([(M, N)] if residual else [])], dtype),
        providers,
        oracle,
        lambda backward: cost.rms_norm_cost(M, N, dtype, residual=residual, backward=backward),
        "rms_norm" + " residual" * residual,
        (M * N, N),
    )


def swiglu_case(M: int, N: int, dtype: torch.dtype, device: torch.device) -> Case:
    """silu(gate) * up of M rows of N."""

    def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    return Case(
        "swiglu",
        {"M": M, "N": N},
        dtype,
        partial(leaves, [(M, N), (M, N)], dtype),
        _beside(kernels.swiglu, torch_swiglu, reference.swiglu, device),
        reference.swiglu,
        lambda backward: cost.swiglu_cost(M, N, dtype, backward=backward),
        "swiglu",
        (M * N, N),
    )


def rope_case(B: int, H: int, K: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    """q (B, H, T, D) and k (B, K, T, D) turned by their positions' angles."""
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)
    angles = torch.arange(T, device=device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def turned(function: Provider, q: Tensor, k: Tensor) -> Any:
        return function(q, k, cos, sin)

    def torch_rope(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        def turn(x: Tensor) -> Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

        return turn(q), turn(k)

    oracle = partial(turned, reference.rope)
    return Case(
        "rope",
        {"B": B, "H": H, "K": K, "T": T, "D": D},
        dtype,
        partial(leaves, [(B, H, T, D), (B, K, T, D)], dtype),
        _beside(partial(turned, kernels.rope), torch_rope, oracle, device),
        oracle,
        lambda backward: cost.rope_cost(B, H, K, T, D, dtype, backward=backward),
        "rope",
        (B * (H + K) * T * D, D),
    )


def _targets(M: int, V: int, device: torch.device) -> Tensor:
    return torch.randint(V, (M,), generator=torch.Generator().manual_seed(2)).to(device)


def cross_entropy_case(M: int, V: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The losses of M rows of V logits."""
    target = _targets(M, V, device)

    def losses(function: Provider, logits: Tensor) -> Any:
        return function(logits, target, reduction="none")

    def torch_cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, reduction="none")

    oracle = partial(losses, reference.cross_entropy)
    return Case(
        "cross_entropy",
        {"M": M, "V": V},
        dtype,
        partial(leaves, [(M, V)], dtype),
        _beside(partial(losses, kernels.cross_entropy), torch_cross_entropy, oracle, device),
        oracle,
        lambda backward: cost.cross_entropy_cost(M, V, dtype, backward=backward),
        "cross_entropy",
        (M * V, V),
    )


def linear_cross_entropy_case(
    M: int, N: int, V: int, dtype: torch.dtype, device: torch.device, *, mean: bool = False
) -> Case:
    """The losses of M rows of N whose logits are their products with V rows of a weight.

    mean: their mean, as training runs it: ours then makes the gradients in the forward, so that both passes are timed
    as one.
    """
    target, reduction = _targets(M, V, device), "mean" if mean else "none"

    def losses(function: Provider, x: Tensor, weight: Tensor) -> Any:
        return function(x, weight, target, reduction=reduction)

    def torch_linear_cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction)

    def draw(place: torch.device) -> tuple[Tensor, ...]:
        return leaves([(M, N), (V, N)], dtype, place, (1.0, N**-0.5))  # logits of a model's size

    oracle = partial(losses, reference.linear_cross_entropy)
    return Case(
        "linear_cross_entropy",
        {"M": M, "N": N, "V": V} | ({"mean": True} if mean else {}),
        dtype,
        draw,
        _beside(partial(losses, kernels.linear_cross_entropy), torch_linear_cross_entropy, oracle, device),
        oracle,
        lambda backward: cost.linear_cross_entropy_cost(M, N, V, dtype, backward=backward, keep_gradients=mean),
        "linear_cross_entropy",
        (M, N, V),
        modes=("training",) if mean else ("forward", "backward"),
    )
