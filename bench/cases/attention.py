"""Attention's cases: dense, grouped, windowed and packed, beside torch's backends and FlexAttention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ... import kernels
from ...kernels import cost, reference
from ...kernels.attention import paths
from ...kernels.attention.tuned import PASSES, architecture, table_of
from .case import OURS, PATHS, Case, Provider, leaves
from .peers import flash_attention_peers, flex_attention, sdpa


def _plain(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's choice of backend, keys and values repeated for each group: not all backends group, the oracle's must."""
    n_group = q.shape[1] // k.shape[1]
    return sdpa(None, causal, q, *(x.repeat_interleave(n_group, 1) if n_group > 1 else x for x in (k, v)))


def _windowed(window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention to the `window` keys before each query, a chunk of queries at a time."""
    out, n_group = [], q.shape[1] // k.shape[1]
    for first in range(0, q.shape[2], window):
        last, start = min(first + window, q.shape[2]), max(0, first - window)
        visible = reference.visible_mask(last - first, last - start, True, (window, 0), q.device)
        seen, weighed = (x[:, :, start:last].repeat_interleave(n_group, 1) for x in (k, v))
        out.append(F.scaled_dot_product_attention(q[:, :, first:last], seen, weighed, attn_mask=visible))
    return torch.cat(out, 2)


def _documents(lengths: Sequence[int], causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each packed document by itself; (total, heads, D) in and out."""
    parts = (x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v))
    out = [_plain(causal, *document) for document in zip(*parts, strict=True)]
    return torch.cat(out, 2)[0].transpose(0, 1)


def _varlen(ends: Tensor, longest: int, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return kernels.flash_attention_varlen(q, k, v, ends, ends, longest, longest, causal=causal)


def _defaults(D: int, dtype: torch.dtype, used: dict[str, bool], device: torch.device) -> dict[str, str]:
    """The path that each pass takes on this GPU when none is asked for. used: which of paths.OPTIONS the case uses."""
    options = frozenset(name for name, is_used in used.items() if is_used)
    measured, name = table_of(device).paths, str(dtype).removeprefix("torch.")
    return {
        pass_: paths.decide(
            paths.Call(pass_, architecture(), D, dtype, options), measured=measured.get((pass_, name, D))
        ).path
        for pass_ in PASSES
    }


def attention_case(
    B: int,
    H: int,
    K: int,
    T: int,
    D: int,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    *,
    window: int | None = None,
    lengths: Sequence[int] = (),
    flex: bool = True,
) -> Case:
    """Attention over T positions; peers are torch's scaled_dot_product_attention backends and, on a GPU, FlexAttention.

    window: how many keys before its own a query sees, causal only.  lengths: of packed documents, T in all (B = 1).
    flex: whether FlexAttention, which takes seconds to compile, is among the peers.
    Where the hopper path serves both passes, each path is a provider by its name, unless it is the default anyway.
    """
    shape: dict[str, int | bool] = {"B": B, "H": H, "K": K, "T": T, "D": D, "causal": causal}
    q_shape, k_shape, ends = (B, H, T, D), (B, K, T, D), None
    ours: Provider = partial(kernels.flash_attention, causal=causal, window=window)
    truth: Provider = partial(_plain, causal) if window is None else partial(_windowed, window)
    if window is not None:
        shape["window"] = window
    if lengths:
        shape["documents"] = len(lengths)
        q_shape, k_shape = (T, H, D), (T, K, D)  # type: ignore[assignment]
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        ours, truth = partial(_varlen, ends, max(lengths), causal), partial(_documents, lengths, causal)

    providers: dict[str, Provider] = {OURS: ours}
    defaults: dict[str, str] = {}
    dense = window is None and not lengths
    if device.type == "cuda":
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        both_passes = all(D in heads for heads in paths.HOPPER_HEADS.values())
        if hopper and both_passes and dtype in paths.HOPPER_DTYPES:
            short = max(lengths, default=T) < paths.SHORT
            used = {"window": window is not None, "packed": bool(lengths), "short": short}
            defaults = _defaults(D, dtype, used, device)
            providers |= {name: ours for name, path in PATHS.items() if set(defaults.values()) != {path}}
        if dense:
            providers["torch cuDNN"] = partial(sdpa, SDPBackend.CUDNN_ATTENTION, causal)
            providers["torch flash"] = partial(sdpa, SDPBackend.FLASH_ATTENTION, causal)
        if not lengths:
            providers |= flash_attention_peers(causal, window)
        if flex:
            providers["FlexAttention"] = flex_attention(T, causal, window, ends, device)
    elif dense:
        providers["torch"] = partial(sdpa, None, causal)
        providers["eager"] = partial(reference.flash_attention, causal=causal)

    def price(backward: bool) -> cost.Cost:
        if lengths:
            return cost.flash_attention_varlen_cost(lengths, lengths, H, K, D, causal, None, dtype, backward=backward)
        return cost.flash_attention_cost(B, H, K, T, T, D, causal, window, dtype, backward=backward)

    inputs = partial(leaves, [q_shape, k_shape, k_shape], dtype)
    return Case(
        "flash_attention", shape, dtype, inputs, providers, truth, price, "attention", (T, D), defaults=defaults
    )


def document_lengths(total: int, mean: int) -> tuple[int, ...]:
    """Lengths like those of packed text: drawn once and for all, from short to eight times the mean, `total` in all."""
    generator = torch.Generator().manual_seed(0)
    ends = [0]
    while ends[-1] < total:
        drawn = -mean * torch.rand((), generator=generator, dtype=torch.float64).log().item()
        ends.append(min(total, ends[-1] + min(8 * mean, 1 + int(drawn))))
    return tuple(after - before for before, after in pairwise(ends))
