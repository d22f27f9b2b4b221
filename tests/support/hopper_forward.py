"""The Hopper forward in the emulator, called as the oracle is, and judged against it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rooflight.kernels import reference
from rooflight.kernels.attention import checks
from rooflight.kernels.attention.hopper import forward as hopper_forward
from support.gluon_emulator import emulated
from support.tolerance import judge


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    module: ModuleType = hopper_forward,
    seed: int = 0,
    resident: int = 3,
    causal: bool = True,
    window: Any = None,
    return_lse: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """launch_forward in the emulator, called as the oracle is."""
    assert module.supports(q, k, v, cu_seqlens_q) is None
    shape = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else q.shape[:3]
    out, lse = torch.full_like(q, torch.nan), torch.full(shape, torch.nan)  # written by nobody else
    T, S = (q.shape[2], k.shape[2]) if cu_seqlens_q is None else (max_seqlen_q, max_seqlen_k)
    left, right = checks.reach(causal, window)
    scale, _ = checks.score_numbers(None, 0.0, q.shape[-1])
    with emulated(module, seed=seed, resident=resident):
        module.launch_forward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, T, S, left, right, scale, **options)
    return out, lse


def judge_forward(inputs: dict[str, Any], *, seed: int = 0, **options: Any) -> None:
    """Output and log-sum-exp against the oracle in fp64."""
    run = {name: options.pop(name) for name in ("schedule",) if name in options}
    oracle = reference.flash_attention_varlen if "cu_seqlens_q" in inputs else reference.flash_attention

    def ours(*args: Any, **given: Any) -> tuple[Tensor, Tensor]:
        return attend(*args, seed=seed, **run, **given)

    judge(ours, oracle, inputs, backward=False, return_lse=True, **options)
