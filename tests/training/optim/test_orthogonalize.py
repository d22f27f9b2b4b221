"""Muon's Newton-Schulz steps: what they approximate, and the two ways to take them."""

from __future__ import annotations

import math

import pytest
import torch

from rooflight.training.optim import muon as muon_module
from rooflight.training.optim import orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (16, 5), (1, 7), (3, 2, 12, 30)])
def test_orthogonalize(shape):
    """Singular values near 1, and the singular vectors those of the input: U' G V is diagonal."""
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ result @ vh.mT
    torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("smallest", [1.0, 1e-6])
def test_steps_on_the_gram_matrix_are_steps_on_the_matrix(smallest, monkeypatch):
    """In fp32, with singular values from 1 down to `smallest`."""
    torch.manual_seed(2)
    u, _, vh = torch.linalg.svd(torch.randn(2, 32, 96, dtype=torch.float64), full_matrices=False)
    matrices = (u * torch.logspace(0, math.log10(smallest), 32, dtype=torch.float64)) @ vh
    steps = orthogonalize(matrices.float())
    monkeypatch.setattr(muon_module, "_multiplies_exactly", lambda x: False)
    directly = orthogonalize(matrices)
    assert (steps.double() - directly).abs().max() < 2e-3 * directly.abs().max()
    assert not torch.equal(steps, orthogonalize(matrices.float()))  # it was another way


def test_products_that_are_not_exact_are_not_taken_on_the_gram_matrix():
    assert muon_module._multiplies_exactly(torch.ones(1))
    assert not muon_module._multiplies_exactly(torch.ones(1, dtype=torch.bfloat16))
    torch.set_float32_matmul_precision("medium")
    try:
        assert not muon_module._multiplies_exactly(torch.ones(1))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_orthogonalize_batches_like_single_matrices_and_survives_zero():
    torch.manual_seed(1)
    matrices = torch.randn(4, 6, 9, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e4, 0.0]).view(-1, 1, 1)
    torch.testing.assert_close(orthogonalize(matrices), torch.stack([orthogonalize(m) for m in matrices]))
    assert not orthogonalize(matrices)[3].any()
    assert orthogonalize(matrices, dtype=torch.bfloat16).dtype == torch.bfloat16
