"""Those that stand beside us: torch's own operations, its compiler's, and libraries where they are installed.

A library is imported at its first call: one that does not import, or does not run, fails by itself.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .case import Provider

LIGER, QUACK = "liger_kernel.ops.rms_norm", "quack"
FLASH = {"FlashAttention 4": "flash_attn.cute", "FlashAttention 3": "flash_attn_interface"}


def installed(module: str) -> bool:
    """Whether the module is there, found without importing it or anything above it."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not rest:
        return spec is not None
    inside = (Path(folder, *rest) for folder in spec.submodule_search_locations or ())
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in inside)


def compiled(function: Provider) -> Provider:
    """The function by torch.compile, whole or not at all; whose import, seconds of it, waits for the first call."""

    @cache
    def made() -> Provider:
        return torch.compile(function, dynamic=False, fullgraph=True)

    return lambda *inputs: made()(*inputs)


def rms_norm_peers(eps: float) -> dict[str, Provider]:
    """Libraries' RMSNorm of (x, weight) and, where they have it, of (x, weight, residual)."""

    def liger(x: Tensor, weight: Tensor) -> Tensor:
        function = import_module(LIGER).LigerRMSNormFunction
        return function.apply(x, weight, eps, 0.0, "llama", False)  # offset, casts, dx written over dy

    def quack(x: Tensor, weight: Tensor, *residual: Tensor) -> Any:
        rmsnorm = import_module(QUACK).rmsnorm
        if residual:
            return rmsnorm(x, weight, residual=residual[0], eps=eps, prenorm=True)
        return rmsnorm(x, weight, eps=eps)

    found: dict[str, Provider] = {}
    if installed(LIGER):
        found["Liger"] = liger
    if installed(QUACK):
        found["quack"] = quack
    return found


def flash_attention_peers(causal: bool, window: int | None) -> dict[str, Provider]:
    """FlashAttention's own packages, of (B, H, T, D) as ours."""
    options = {"causal": causal} | ({} if window is None else {"window_size": (window, 0)})

    def attend(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = import_module(module).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return {name: partial(attend, module) for name, module in FLASH.items() if installed(module)}


def sdpa(backend: SDPBackend | None, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention by this backend; None lets it choose."""
    call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call()
    with sdpa_kernel(backend):
        return call()


def flex_attention(T: int, causal: bool, window: int | None, ends: Tensor | None, device: torch.device) -> Provider:
    """FlexAttention with the same mask, compiled at its first call."""

    @cache
    def made() -> tuple[Provider, Any]:
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as attention

        document = None if ends is None else torch.bucketize(torch.arange(T, device=device), ends[1:], right=True)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            shown = i >= j if causal else i >= 0
            if window is not None:
                shown = shown & (i - j <= window)
            return shown if document is None else shown & (document[i] == document[j])

        mask = None
        if causal or document is not None:
            mask = create_block_mask(visible, None, None, T, T, device=str(device))
        return torch.compile(attention, dynamic=False, fullgraph=True), mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call, mask = made()
        if ends is not None:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = call(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out if ends is None else out[0].transpose(0, 1)

    return attend
