"""A run on several processes is the run of one: losses, gradients, parameters; and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.ranks import on_ranks
from support.together import CASES, everything, learn_all

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    torch.set_num_threads(1)
    return learn_all()


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [2, 3])
def test_every_step_is_that_of_one_process(tmp_path: Path, alone: dict[str, Any], size: int) -> None:
    """12 rows, of which each of 2 or 3 processes has 6 or 4; a vector of 32 and matrices of 40 rows do not divide by 3."""
    told, assignments = zip(*on_ranks(size, tmp_path, everything), strict=True)
    for name in CASES:
        expected = alone[name]
        for rank in told:
            found = rank[name]
            for step, (ours, theirs) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), (name, step)
                assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-6), (name, step)
                off = {n: _off(ours["gradients"][n], g) for n, g in theirs["gradients"].items()}
                assert max(off.values()) < 1e-6, (name, step, off)
            assert found["parameters"].keys() == expected["parameters"].keys()
            for n, p in found["parameters"].items():
                assert torch.equal(p, told[0][name]["parameters"][n]), (name, n)
                assert _off(p, expected["parameters"][n]) < 1e-6, (name, n)

    linear, others = 16 * 16, 2 * 50 * 16  # numbers of a Toy's matrices, of which the tied one has one less
    for rank, found in enumerate(assignments):
        changed = {"embedding.weight", "first.weight", "head.weight", "head.bias"} if rank else set()
        assert found.pop("ddp took rank 0's") == changed
        for name, value in found.items():
            if isinstance(value, bool):
                assert value, name
            elif isinstance(value, float):
                assert value < (1e-3 if "float16" in name else 1e-6), name
    for name in "fsdp None held", "fsdp torch.float16 held":
        assert sum(found[name] for found in assignments) == 2 * linear + others
    states = [found["states here"] for found in assignments]
    assert sum(states) == linear + others + 16
    assert max(states) < sum(states)
