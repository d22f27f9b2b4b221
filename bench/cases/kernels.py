"""What is measured: a case is an operation at a shape, its inputs, who computes it, the truth, and its cost.

Declarative on purpose: the harness checks and times any case in the same way, `pytest --benchmark` and
`rooflight bench kernels` both run these lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import kernels
from ...kernels import cost, reference
from ...kernels.attention import paths
from ...model.parts import BACKWARD, Work

Provider = Callable[..., Any]  # returns a tensor, or a tuple of them
HOPPER = "rooflight hopper"


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype.

    inputs(device) makes the tensors that a provider takes, all of them leaves that require a gradient.  truth takes
    them in a higher precision and returns the output to compare with.  cost(backward) is the closed form.
    kernel, sizes: whose rate, and at which sizes, the estimate takes for it (model/parts.py).
    timed: False where only the result is looked at.  repeats: how many backward runs must agree to the last bit.
    """

    operation: str
    shape: Mapping[str, int | bool]
    dtype: torch.dtype
    inputs: Callable[[torch.device], tuple[Tensor, ...]]
    providers: Mapping[str, Provider]
    truth: Provider
    cost: Callable[[bool], cost.Cost]
    kernel: str
    sizes: tuple[int, ...]
    timed: bool = True
    repeats: int = 0

    @property
    def name(self) -> str:
        shape = "-".join(f"{key}{int(value)}" for key, value in self.shape.items())
        use = "" if self.timed else "-check"
        return f"{self.operation}-{shape}-{str(self.dtype).removeprefix('torch.')}{use}"

    @property
    def kind(self) -> tuple[int | bool | None, ...]:
        """What decides which code of the hopper path a case runs."""
        return self.shape.get("D"), "window" in self.shape, "documents" in self.shape

    def work(self, backward: bool) -> Work:
        """One pass of the case as the estimate knows it."""
        price, kernel = self.cost(backward), self.kernel + BACKWARD * backward
        if self.operation == "flash_attention":
            return Work(price, kernel, self.sizes, price.flops, executed=price.flops)
        return Work(price, kernel, self.sizes, self.sizes[0])

    def path(self, provider: str) -> AbstractContextManager[None]:
        """What the provider, forward and backward, must run in."""
        return paths.use("hopper") if provider == HOPPER else nullcontext()


def _leaves(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes)


def rms_norm_case(M: int, N: int, dtype: torch.dtype, device: torch.device, *, residual: bool = False) -> Case:
    """RMSNorm of M rows of N; peers are torch's own function, eager and (on a GPU) compiled, and the plain oracle."""

    def torch_rms_norm(x: Tensor, weight: Tensor, *added: Tensor) -> Any:
        h = x + added[0] if added else x
        y = F.rms_norm(h, (N,), weight, 1e-6)
        return (y, h) if added else y

    def named(function: Provider, x: Tensor, weight: Tensor, *added: Tensor) -> Any:
        return function(x, weight, residual=added[0]) if added else function(x, weight)

    providers: dict[str, Provider] = {
        "rooflight": partial(named, kernels.rms_norm),
        "torch": torch_rms_norm,
        "eager": partial(named, reference.rms_norm),
    }
    if device.type == "cuda":
        providers["torch.compile"] = torch.compile(torch_rms_norm, dynamic=False)
    return Case(
        "rms_norm",
        {"M": M, "N": N} | ({"residual": True} if residual else {}),
        dtype,
        partial(_leaves, [(M, N), (N,), *([(M, N)] if residual else [])], dtype),
        providers,
        partial(named, reference.rms_norm),
        lambda backward: cost.rms_norm_cost(M, N, dtype, residual=residual, backward=backward),
        "rms_norm" + " residual" * residual,
        (M * N, N),
    )


def _sdpa(backend: SDPBackend | None, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call()
    with sdpa_kernel(backend):
        return call()


def _plain(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's choice of backend, keys and values repeated for each group: not all backends group, the oracle's must."""
    n_group = q.shape[1] // k.shape[1]
    return _sdpa(None, causal, q, *(x.repeat_interleave(n_group, 1) if n_group > 1 else x for x in (k, v)))


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


def _flex(T: int, causal: bool, window: int | None, ends: Tensor | None, device: torch.device) -> Provider:
    """FlexAttention with the same mask, compiled at its first call."""

    @cache
    def compiled() -> tuple[Provider, Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document = None if ends is None else torch.bucketize(torch.arange(T, device=device), ends[1:], right=True)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            shown = i >= j if causal else i >= 0
            if window is not None:
                shown = shown & (i - j <= window)
            return shown if document is None else shown & (document[i] == document[j])

        mask = None
        if causal or document is not None:
            mask = create_block_mask(visible, None, None, T, T, device=str(device))
        return torch.compile(flex_attention, dynamic=False), mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call, mask = compiled()
        if ends is not None:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = call(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out if ends is None else out[0].transpose(0, 1)

    return attend


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
) -> Case:
    """Attention over T positions; peers are torch's scaled_dot_product_attention backends and, on a GPU, FlexAttention.

    window: how many keys before its own a query sees, causal only.  lengths: of packed documents, T in all (B = 1).
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

    providers: dict[str, Provider] = {"rooflight": ours}
    if device.type == "cuda":
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        both_passes = all(D in heads for heads in paths.HOPPER_HEADS.values())
        if hopper and both_passes and dtype in paths.HOPPER_DTYPES:
            providers[HOPPER] = ours
        if window is None and not lengths:
            providers["torch flash"] = partial(_sdpa, SDPBackend.FLASH_ATTENTION, causal)
            providers["torch cuDNN"] = partial(_sdpa, SDPBackend.CUDNN_ATTENTION, causal)
        providers["FlexAttention"] = _flex(T, causal, window, ends, device)
    elif window is None and not lengths:
        providers["torch"] = partial(_sdpa, None, causal)
        providers["eager"] = partial(reference.flash_attention, causal=causal)

    def price(backward: bool) -> cost.Cost:
        if lengths:
            return cost.flash_attention_varlen_cost(lengths, lengths, H, K, D, causal, None, dtype, backward=backward)
        return cost.flash_attention_cost(B, H, K, T, T, D, causal, window, dtype, backward=backward)

    inputs = partial(_leaves, [q_shape, k_shape, k_shape], dtype)
    return Case("flash_attention", shape, dtype, inputs, providers, truth, price, "attention", (T, D))


def document_lengths(total: int, mean: int) -> tuple[int, ...]:
    """Lengths like those of packed text: drawn once and for all, from short to eight times the mean, `total` in all."""
    generator = torch.Generator().manual_seed(0)
    ends = [0]
    while ends[-1] < total:
        drawn = -mean * torch.rand((), generator=generator, dtype=torch.float64).log().item()
        ends.append(min(total, ends[-1] + min(8 * mean, 1 + int(drawn))))
    return tuple(after - before for before, after in pairwise(ends))


def probes(device: torch.device) -> list[Case]:
    """Small cases of our kernels alone, for their results: what comes first on hardware that a kernel never ran on."""
    bf16 = torch.bfloat16
    lengths = document_lengths(1500, 200)
    found = []
    for D in (128, 64):
        found += [
            attention_case(1, 2, 1, 128, D, False, bf16, device),
            attention_case(1, 2, 2, 256, D, True, bf16, device),
            attention_case(2, 4, 2, 1000, D, True, bf16, device),  # no multiple of a tile, grouped queries
            attention_case(1, 2, 2, 1500, D, False, torch.float16, device),
            attention_case(1, 4, 2, 1500, D, True, bf16, device, window=200),
            attention_case(1, 4, 2, sum(lengths), D, True, bf16, device, lengths=lengths),
            replace(attention_case(1, 4, 2, 2048, D, True, bf16, device), repeats=100),
        ]
    ours = ("rooflight", HOPPER)
    return [
        replace(case, timed=False, providers={name: case.providers[name] for name in ours if name in case.providers})
        for case in found
    ]


def cases(device: torch.device) -> list[Case]:
    """The shapes worth watching: sizes of real models on a GPU, the same kinds scaled down on a CPU."""
    bf16 = torch.bfloat16
    if device.type == "cuda":
        attention = [
            attention_case(max(1, 16384 // T), 16, 16, T, D, causal, bf16, device)
            for D, causal, T in [
                (128, True, 8192),
                (128, True, 4096),
                (128, True, 16384),
                (64, True, 8192),
                (128, False, 8192),
                (64, False, 8192),
                (64, True, 16384),
                (128, True, 512),
            ]
        ]
        packed = document_lengths(16384, 2048)
        return [
            *attention[:3],
            rms_norm_case(8192, 8192, bf16, device),
            rms_norm_case(16384, 4096, bf16, device),
            *attention[3:6],
            attention_case(1, 64, 8, 8192, 128, True, bf16, device),  # grouped queries
            attention_case(1, 16, 16, 16384, 128, True, bf16, device, window=1024),
            attention_case(1, 16, 16, 16384, 128, True, bf16, device, lengths=packed),
            rms_norm_case(8192, 8192, bf16, device, residual=True),
            attention_case(1, 16, 16, 512, 128, True, bf16, device),  # launch-bound
            rms_norm_case(64, 4096, bf16, device),  # launch-bound
            rms_norm_case(16384, 4096, bf16, device, residual=True),
            rms_norm_case(4096, 16384, bf16, device),
            rms_norm_case(4096, 2048, bf16, device),
            rms_norm_case(131072, 128, bf16, device),  # per head
            *attention[6:],
        ]
    return [
        rms_norm_case(4096, 256, torch.float32, device),
        rms_norm_case(1024, 4096, bf16, device),  # wide rows
        attention_case(4, 4, 4, 256, 32, True, torch.float32, device),  # the demo's shape
        attention_case(1, 8, 2, 1024, 64, True, bf16, device),  # grouped queries
        attention_case(1, 8, 8, 1024, 64, False, torch.float32, device),
    ]
