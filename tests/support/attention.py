"""What the attention tests share: drawn inputs, small tiles, the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rooflight.kernels import reference
from rooflight.kernels.attention import flash_attention, flash_attention_varlen
from rooflight.kernels.attention.portable import tiles
from support.tolerance import gaussian, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def tile(block_m: int, block_n: int) -> Iterator[None]:
    """Every kernel with this tile: small ones make several, partial and skipped tiles out of short sequences."""
    with mock.patch.object(tiles, "choose", return_value=tiles.Tile(block_m, block_n)):
        yield


def draw(
    B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype, device: Any = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """q, k and v of a dense batch."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, H, T, D), "k": (B, K, S, D), "v": (B, K, S, D)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for name, shape in shapes.items()
    }


def draw_sinks(H: int, dtype: torch.dtype, device: Any = "cpu", seed: int = 0) -> Tensor:
    """One logit per head."""
    return torch.randn(H, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(device, dtype)


def draw_slopes(*shape: int, device: Any = "cpu", seed: int = 0) -> Tensor:
    """ALiBi's, (H,) or (B, H): from nearly no bias to one that leaves a query its next few keys."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 2)).to(device)


def draw_packed(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    H: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    device: Any = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """q, k and v of packed sequences and their bounds."""
    generator = torch.Generator().manual_seed(seed)
    packed: dict[str, Any] = {}
    for name, lengths, heads in (("q", lengths_q, H), ("k", lengths_k, K), ("v", lengths_k, K)):
        noise = torch.randn(sum(lengths), heads, D, generator=generator, dtype=torch.float64)
        packed[name] = noise.to(device, dtype)
    for side, lengths in (("q", lengths_q), ("k", lengths_k)):
        ends = list(accumulate(lengths, initial=0))
        packed[f"cu_seqlens_{side}"] = torch.tensor(ends, dtype=torch.int32, device=device)
        packed[f"max_seqlen_{side}"] = max(lengths, default=0)
    return packed


def draw_past_longest(
    lengths_q: Sequence[int], lengths_k: Sequence[int], longest_q: int, longest_k: int, *args: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Packed sequences of which some are longer than max_seqlen, NaN from there on; the same cut off there; and which
    rows (of q, k and v) those keep.  args: draw_packed's after the lengths.
    """
    longest = {"q": longest_q, "k": longest_k, "v": longest_k}
    short = draw_packed([min(n, longest_q) for n in lengths_q], [min(n, longest_k) for n in lengths_k], *args)
    long = draw_packed(lengths_q, lengths_k, *args) | {f"max_seqlen_{n}": longest[n] for n in "qk"}
    kept = {}
    for name, lengths in (("q", lengths_q), ("k", lengths_k), ("v", lengths_k)):
        kept[name] = torch.cat([torch.arange(n) < longest[name] for n in lengths])
        long[name].fill_(torch.nan)[kept[name]] = short[name]
    return long, short, kept


def _fused(x: Tensor) -> Tensor:
    """A slice of one wide (B, T, heads, D) buffer, as a fused qkv projection gives."""
    B, H, T, D = x.shape
    buffer = x.new_zeros(B, T, 3 * H, D)
    buffer[:, :, H : 2 * H] = x.transpose(1, 2)
    return buffer[:, :, H : 2 * H].transpose(1, 2)


def _every_other(x: Tensor) -> Tensor:
    """A stride of 2 along the head size."""
    return x.repeat_interleave(2, -1)[..., ::2]


def _odd_offset(x: Tensor) -> Tensor:
    """Rows that start at no multiple of 16 bytes, in a padded buffer."""
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "(B, T, H, D)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "(T, B, H, D)": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "(B, H, D, T)": lambda x: x.mT.contiguous().mT,
    "fused": _fused,
    "every other": _every_other,
    "odd offset": _odd_offset,
    "expanded over T": lambda x: x[:, :, :1].expand_as(x),
    "expanded over B and H": lambda x: x[:1, :1].expand_as(x),
    "expanded over D": lambda x: x[..., :1].expand_as(x),
}


def lay_out_grad(layout: str) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What makes the gradient of an output, (B, H, T, D) or (B, H, T), in this layout."""

    def grad(output: Tensor, generator: torch.Generator) -> Tensor:
        noise = gaussian(output, generator)
        return LAYOUTS[layout](noise) if noise.dim() == 4 else LAYOUTS[layout](noise[..., None])[..., 0]

    return grad


def judge_attention(
    inputs: dict[str, Any],
    *,
    varlen: bool = False,
    grad: Callable[..., Tensor] = gaussian,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Output, log-sum-exp and every gradient against the oracle in fp64; nothing may be NaN."""
    ours, oracle = (
        (flash_attention_varlen, reference.flash_attention_varlen)
        if varlen
        else (flash_attention, reference.flash_attention)
    )
    frozen = (*frozen, "alibi_slopes")  # constants
    judge(ours, oracle, inputs, grad=grad, frozen=frozen, return_lse=True, **options)
