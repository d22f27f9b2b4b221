"""Every address that the Hopper kernels give TMA is a multiple of 16 bytes: hardware ends the whole context otherwise.

A tile's address is its tensor's plus its coordinates times their strides. Tensors and strides that are no multiples of
16 bytes are refused (tma_obstacle), so what is left is the innermost coordinate, in elements: in the source it must be
0, or a multiple of a whole row tile. The emulator, which refuses every other address, confirms it on drawn problems.
"""

from __future__ import annotations

import ast
import random
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rooflight.kernels.attention import hopper
from rooflight.kernels.attention.hopper import backward, forward, gradients
from rooflight.kernels.attention.hopper.blocks import tma_obstacle
from support.gluon_emulator import emulated
from support.gluon_hardware import Descriptor

pytestmark = pytest.mark.cpu

ACCESSES = {"tma_load", "tma_store", "tma_add"}
FOLDER = Path(next(iter(hopper.__path__)))
WHOLE_TILE = "(2 * BLOCK_M)"  # fp32 values: lse2 and delta of a row tile


def accesses() -> list[tuple[str, ast.expr]]:
    """(file and line, innermost coordinate) of every TMA access in the kernels' source."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ACCESSES:
                coordinates = node.args[1]
                assert isinstance(coordinates, ast.List), f"{path.name}:{node.lineno}: coordinates are no list"
                found.append((f"{path.name}:{node.lineno}", coordinates.elts[-1]))
    return found


def test_innermost_coordinates_are_multiples_of_16_bytes() -> None:
    found = accesses()
    for place, innermost in found:
        text = ast.unparse(innermost)
        assert text == "0" or text.endswith(f" * {WHOLE_TILE}"), f"{place}: {text}"
    assert all(2 * rows * 4 % 16 == 0 for rows in backward.BLOCK_M.values())
    # queries, keys, values and the output of the forward; k, v, q, dout, rows, and dq both ways of the backward
    assert len(found) >= 9


@pytest.mark.parametrize("varlen", [False, True])
def test_other_tensors_are_refused(varlen: bool) -> None:
    def obstacle(x: Tensor) -> str | None:
        return tma_obstacle("q", x[0].transpose(0, 1) if varlen else x, varlen)

    room = torch.zeros(1, 3, 20, 80).bfloat16()
    assert obstacle(room[..., :64]) is None
    assert obstacle(room[..., 8:72]) is None
    for at in (1, 2, 4, 7):
        assert "aligned" in str(obstacle(room[..., at : at + 64]))
        assert "aligned" in str(obstacle(torch.zeros(1, 3, 20, 64 + at).bfloat16()[..., :64]))


def draw(draws: random.Random) -> tuple[dict[str, Any], list[int] | None, list[int] | None]:
    """Sizes, and the lengths of packed sequences: few rows, at starts that are multiples of nothing."""
    K = draws.choice((1, 2))
    sizes = {"K": K, "H": K * draws.choice((1, 3)), "D": draws.choice((64, 128))}
    if draws.random() < 0.5:
        return sizes | {"T": draws.randint(1, 140), "S": draws.randint(1, 140)}, None, None
    lengths_q, lengths_k = ([draws.randint(0, 70) for _ in range(3)] + [draws.randint(1, 70)] for _ in "qk")
    return sizes | {"T": max(lengths_q), "S": max(lengths_k)}, lengths_q, lengths_k


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(n, marks=pytest.mark.slow) for n in range(12, 100))])
def test_addresses_of_drawn_problems(seed: int) -> None:
    sizes, lengths_q, lengths_k = draw(random.Random(seed))
    H, K, T, S, D = (sizes[name] for name in "HKTSD")
    ends: list[Tensor | None] = [None, None]
    if lengths_q is None or lengths_k is None:
        q, out, dout, dq = (torch.zeros(2, H, T, D).bfloat16() for _ in range(4))
        k, v, dk, dv = (torch.zeros(2, K, S, D).bfloat16() for _ in range(4))
        lse = torch.zeros(2, H, T)
    else:
        q, out, dout, dq = (torch.zeros(sum(lengths_q), H, D).bfloat16() for _ in range(4))
        k, v, dk, dv = (torch.zeros(sum(lengths_k), K, D).bfloat16() for _ in range(4))
        lse = torch.zeros(H, sum(lengths_q))
        ends = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k)]
    checked: Counter[tuple[int, ...]] = Counter()
    check = Descriptor.check_aligned

    def count(self: Descriptor, coordinates: list[int]) -> None:
        check(self, coordinates)
        checked[tuple(self.block_shape)] += 1

    with mock.patch.object(Descriptor, "check_aligned", count), emulated(forward, backward, gradients, seed=seed):
        forward.launch_forward(q, k, v, out, lse, *ends, T, S, None, 0, 0.1)
        backward.launch_backward(q, k, v, out, dout, lse, None, dq, dk, dv, None, *ends, T, S, None, None, 0.1)
    block_m = backward.BLOCK_M[D]
    assert checked[2 * block_m,] > 0
    assert checked[block_m * D // 32, 32] > 0
