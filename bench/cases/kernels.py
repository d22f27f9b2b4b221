"""What is measured: the cases of the kernels, the most telling first, and the probes that come before their speed.

`pytest --benchmark` and `rooflight bench kernels` both run these lists.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .attention import attention_case, document_lengths
from .case import HOPPER, OURS, PATHS, PORTABLE, Case, Provider
from .rows import cross_entropy_case, linear_cross_entropy_case, rms_norm_case, rope_case, swiglu_case

__all__ = ["HOPPER", "OURS", "PORTABLE", "Case", "Provider", "attention_case", "cases", "probes", "rms_norm_case"]


def _probe(case: Case) -> Case:
    """A case for the results of ours alone: every path by its name, and the default where it mixes them."""
    ours, named = case.providers[OURS], PATHS.keys() & case.providers.keys()
    if not named:
        providers = {OURS: ours}
    else:
        providers = dict.fromkeys(PATHS, ours) | ({OURS: ours} if named == PATHS.keys() else {})
    return replace(case, timed=False, providers=providers)


def probes(device: torch.device) -> list[Case]:
    """Small cases of our kernels alone, for their results: what comes first on hardware that a kernel never ran on."""
    bf16 = torch.bfloat16
    lengths = document_lengths(1500, 200)
    found = [
        attention_case(1, 2, 1, 128, 128, False, bf16, device),
        attention_case(1, 2, 2, 1500, 128, False, torch.float16, device),
        attention_case(2, 4, 2, 1000, 128, True, bf16, device),  # no multiple of a tile, grouped queries
        attention_case(1, 2, 2, 256, 128, True, bf16, device),
        attention_case(1, 2, 2, 256, 64, True, bf16, device),
    ]
    for D in (128, 64):
        found += [
            attention_case(1, 4, 2, 1501, D, True, bf16, device),  # a head's statistics begin at odd addresses
            attention_case(1, 4, 2, 1500, D, True, bf16, device, window=200),
            attention_case(1, 4, 2, sum(lengths), D, True, bf16, device, lengths=lengths),
            replace(attention_case(1, 4, 2, 2048, D, True, bf16, device), repeats=100),
        ]
    return [_probe(case) for case in found]


def cases(device: torch.device) -> list[Case]:
    """The shapes worth watching: sizes of real models on a GPU, the same kinds scaled down on a CPU."""
    bf16 = torch.bfloat16
    if device.type == "cuda":
        packed = document_lengths(16384, 2048)

        def dense(B: int, H: int, K: int, T: int, D: int, *, causal: bool = True, flex: bool = False) -> Case:
            return attention_case(B, H, K, T, D, causal, bf16, device, flex=flex)

        return [
            dense(2, 16, 16, 8192, 128, flex=True),
            rms_norm_case(8192, 8192, bf16, device),
            dense(16, 25, 25, 1024, 64, flex=True),  # GPT-2 XL
            rms_norm_case(16384, 1600, bf16, device),  # GPT-2 XL
            rms_norm_case(16384, 4096, bf16, device),
            dense(1, 16, 16, 16384, 128),
            dense(4, 16, 16, 4096, 128),
            dense(8, 16, 16, 2048, 128),
            dense(16, 16, 16, 1024, 128),
            dense(32, 16, 16, 512, 128),
            dense(2, 16, 16, 8192, 64),
            rms_norm_case(8192, 8192, bf16, device, residual=True),
            rms_norm_case(4096, 16384, bf16, device),
            rms_norm_case(2048, 32768, bf16, device),
            rms_norm_case(1024, 65536, bf16, device),
            linear_cross_entropy_case(16384, 1600, 50257, bf16, device, mean=True),  # rows at odd addresses
            linear_cross_entropy_case(16384, 1600, 50304, bf16, device, mean=True),
            linear_cross_entropy_case(16384, 1600, 50304, bf16, device),
            dense(1, 64, 8, 8192, 128),  # grouped queries
            attention_case(1, 16, 16, 16384, 128, True, bf16, device, window=1024),
            attention_case(1, 16, 16, 16384, 128, True, bf16, device, lengths=packed),
            dense(2, 16, 16, 8192, 128, causal=False),
            rms_norm_case(131072, 128, bf16, device),  # per head
            rms_norm_case(64, 4096, bf16, device),  # launch-bound
            rms_norm_case(4096, 2048, bf16, device),
            rms_norm_case(16384, 4096, bf16, device, residual=True),
            swiglu_case(16384, 6400, bf16, device),
            rope_case(4, 16, 16, 4096, 128, bf16, device),
            cross_entropy_case(8192, 50304, bf16, device),
            dense(2, 16, 16, 8192, 64, causal=False),
            dense(1, 16, 16, 16384, 64),
            dense(1, 16, 16, 512, 128),  # launch-bound
        ]
    return [
        rms_norm_case(4096, 256, torch.float32, device),
        rms_norm_case(1024, 4096, bf16, device),  # wide rows
        attention_case(4, 4, 4, 256, 32, True, torch.float32, device),  # the demo's shape
        attention_case(1, 8, 2, 1024, 64, True, bf16, device),  # grouped queries
        attention_case(1, 8, 8, 1024, 64, False, torch.float32, device),
    ]
