"""Drawn cases: every option with every other, on drawn shapes, dtypes, strides and tiles.

The first cases run by default, the first few of them on a GPU too, the rest with `pytest -m slow`. A case is its
number: a failure names the command that runs it again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from support.attention import (
    DTYPES,
    LAYOUTS,
    draw,
    draw_packed,
    draw_sinks,
    draw_slopes,
    judge_attention,
    lay_out_grad,
    tile,
)
from support.marks import on_cpu
from support.tolerance import gaussian

CASES = 250  # with 97 % of the pairs of options, layouts, dtypes and kinds of lengths that twice as many have
DEFAULT = 20
ON_GPU = 8  # where each compiles kernels of its own


@dataclass(frozen=True)
class Case:
    """One call and its tile. Lengths holds (T, S) of a dense batch, or each sequence's of a packed one."""

    B: int
    H: int
    K: int
    D: int
    lengths: tuple[tuple[int, int], ...]
    varlen: bool
    dtype: torch.dtype
    layouts: tuple[str, str, str]
    grad_layout: str
    sinks: torch.dtype | None
    slopes: str | None  # "by head" or "by sequence"
    options: tuple[tuple[str, Any], ...]
    tile: tuple[int, int]
    frozen: tuple[str, ...]


def draw_case(seed: int) -> Case:
    """The case of this number; uniform over kinds, with the edges (0, 1, a whole tile, equal lengths) made likely."""
    r = random.Random(seed)
    varlen = r.random() < 0.3
    block = r.choice([(16, 16), (16, 32), (32, 16), (32, 32)])

    def length(least: int) -> int:
        return r.choice([r.randint(least, 50), r.randint(least, 50), r.choice([least, *block, 2 * block[0]]), 0])

    # Where every query sees one key, or every value is the same, dp - delta is nothing but the difference of two
    # roundings, which eager PyTorch happens to make alike: nothing to judge by. Hence four keys, and v not constant.
    def pair() -> tuple[int, int]:
        n_key = length(4)
        return (n_key, n_key) if r.random() < 0.4 else (length(1), n_key)

    causal = r.random() < 0.6
    window = r.choice([None, None, r.randint(3, 40), (r.randint(3, 40), r.randint(0, 20))])
    options = {"causal": causal, "window": window}
    if r.random() < 0.3:
        options["softcap"] = r.choice([0.5, 5.0, 50.0])
    if r.random() < 0.3:
        options["scale"] = r.choice([0.05, 0.5, 1.0])
    dtype = r.choice(DTYPES)
    n_kv_head = r.randint(1, 2)
    return Case(
        B=r.randint(1, 2),
        H=n_kv_head * r.randint(1, 3),
        K=n_kv_head,
        D=r.choice([r.randint(1, 40), r.randint(1, 40), 64, 80]),
        lengths=tuple(pair() for _ in range(r.randint(1, 3) if varlen else 1)),
        varlen=varlen,
        dtype=dtype,
        layouts=(*(r.choice(list(LAYOUTS)) for _ in "qk"), r.choice([x for x in LAYOUTS if x != "expanded over T"])),
        grad_layout=r.choice(list(LAYOUTS)),
        sinks=r.choice([None, None, dtype, torch.float32]),
        options=tuple(options.items()),
        tile=block,
        frozen=r.choice([(), (), (), ("q",), ("k", "v"), ("v", "sinks")]),
        slopes=r.choice([None, None, "by head", "by sequence"]),  # drawn last: the rest is as it was without
    )


def lay_out_packed(x: Tensor, layout: str) -> Tensor:
    """A packed (total, H, D) tensor in a layout of (1, H, total, D)."""
    return LAYOUTS[layout](x[None].transpose(1, 2)).transpose(1, 2)[0]


def run_case(case: Case, seed: int, device: torch.device) -> None:
    if case.varlen:
        lengths_q, lengths_k = zip(*case.lengths, strict=True)
        inputs = draw_packed(lengths_q, lengths_k, case.H, case.K, case.D, case.dtype, device, seed)
        inputs |= {n: lay_out_packed(inputs[n], layout) for n, layout in zip("qkv", case.layouts, strict=True)}
        grad = gaussian
    else:
        inputs = draw(case.B, case.H, case.K, *case.lengths[0], case.D, case.dtype, device, seed)
        inputs |= {n: LAYOUTS[layout](inputs[n]) for n, layout in zip("qkv", case.layouts, strict=True)}
        grad = lay_out_grad(case.grad_layout)
    frozen = case.frozen
    if case.sinks is not None:
        inputs["sinks"] = draw_sinks(case.H, case.sinks, device, seed)
        # a sum for each of so few heads that eager's error is often small by luck: test_attention judges them
        if case.sinks == torch.float32 or case.H < 4:
            frozen += ("sinks",)
    if case.slopes is not None:
        n_batch = len(case.lengths) if case.varlen else case.B
        shape = (case.H,) if case.slopes == "by head" else (n_batch, case.H)
        inputs["alibi_slopes"] = draw_slopes(*shape, device=device, seed=seed)
    with tile(*case.tile):
        judge_attention(inputs, varlen=case.varlen, grad=grad, frozen=frozen, **dict(case.options))


@pytest.mark.parametrize(
    "seed",
    [
        *range(ON_GPU),
        *on_cpu(*range(ON_GPU, DEFAULT)),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(DEFAULT, CASES)),
    ],
)
def test_case(seed, device):
    case = draw_case(seed)
    try:
        run_case(case, seed, device)
    except Exception as error:
        error.add_note(f"again: pytest 'tests/kernels/attention/test_attention_fuzz.py::test_case[{seed}]'  # {case}")
        raise


def test_the_cases_differ_and_are_the_same_in_every_run():
    cases = [draw_case(seed) for seed in range(CASES)]
    assert len(set(cases)) == CASES
    assert cases[:50] == [draw_case(seed) for seed in range(50)]
