"""The sweep of RMSNorm's tiles: what it runs is right, what is wrong is told, and the table names every candidate."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from rooflight.bench.measure import norms
from rooflight.kernels import rms_norm_tiles as tiles


def test_the_table_has_the_shipped_tile_of_each_shape_first(capsys):
    assert norms.main(device=torch.device("cpu")) == 0
    assert capsys.readouterr().out.splitlines() == norms.table()
    seen = set()
    for candidate in norms.CANDIDATES:
        where = candidate[:3]
        assert (candidate.tile is None) == (where not in seen)
        seen.add(where)
        assert candidate.tile is None or candidate.tile.columns >= candidate.N


@pytest.mark.parametrize("candidate", [c for c in norms.CANDIDATES if c.tile], ids=str)
def test_each_candidate_is_right(candidate, device):
    """In the interpreter, on few rows."""
    inputs = norms._inputs(3, candidate.N, device)
    exact = norms._exact(*inputs)
    found = norms._call(candidate, *inputs, exact["rstd"])()
    assert norms.check(found, exact) is None
    assert norms.check({name: 1.02 * x for name, x in found.items()}, exact)
    assert norms.check({name: x * torch.nan for name, x in found.items()}, exact)


def test_another_tile_is_another_plan(device):
    inputs = norms._inputs(3, 64, device)
    exact = norms._exact(*inputs)
    for pass_ in ("forward", "backward"):
        plans = []
        module = import_module("rooflight.kernels.rms_norm")
        for tile in (None, tiles.Tile(2, 64, 4, 1), tiles.Tile(1, 128, 4, 1)):
            call = norms._call(norms.Candidate(pass_, 3, 64, tile, ""), *inputs, exact["rstd"])
            misses = (module._forward_plan if pass_ == "forward" else module._backward_plans).cache_info
            before = misses().misses
            assert norms.check(call(), exact) is None
            plans.append(misses().misses - before)
        assert plans[1:] == [1, 1]


def test_use_is_undone_and_names_a_pass():
    other = tiles.Tile(1, 64, 4, 1)
    shipped = tiles.forward_tile(64, 2, False)
    with tiles.use("forward", other):
        assert tiles.forward_tile(64, 2, False) == other
        with tiles.use("forward", shipped):
            assert tiles.forward_tile(64, 2, False) == shipped
        assert tiles.forward_tile(64, 2, False) == other
        assert tiles.backward_tile(64, 64, 2, 2, False) != other
    assert tiles.forward_tile(64, 2, False) == shipped
    with pytest.raises(ValueError, match="pass_: expected forward or backward"), tiles.use("fwd", other):
        pass
