"""flash_attention, forward and every gradient, against the oracle in fp64."""

from __future__ import annotations

import pytest

from support.attention import DTYPES, draw, judge_attention, tile

# (B, H, K, T, S): grouped queries over whole, partial and skipped tiles of 16
GROUPED = (1, 2, 1, 40, 40)

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},  # narrower than a tile: no block is visible to every row
    "wide window": {"window": 37},  # partial, whole and partial blocks in one row of tiles
    "two-sided window": {"causal": False, "window": (20, 5)},
    "right window": {"causal": False, "window": (100, 3)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, dtype, device):
    with tile(16, 16):
        judge_attention(draw(*GROUPED, 24, dtype, device), **MASKS[mask])
