"""The check of every length, with the oracle in the kernels' place: it covers what it says, and finds what is wrong."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from rooflight.bench.measure.lengths import KINDS, check, faults, oracle, problems

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")


def eager(problem, tensors, ends):
    return oracle(problem, tensors, ends, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_comes_and_eager_is_right(kind):
    drawn = list(islice(problems(kind, 64), 320))
    assert drawn == list(islice(problems(kind, 64), 320))
    assert set(range(1, 301)) <= {max(p.T) if kind != "packed" else T for p in drawn for T in p.T}
    assert {p.schedule[0] for p in drawn} == {"tile", "static", "dynamic"}
    assert any(p.T != p.S for p in drawn)
    torch.manual_seed(0)
    for problem in (p for p in drawn[:40] if sum(p.T) <= 300):
        assert check(problem, CPU, eager) == []


@pytest.mark.parametrize("at", range(5))
def test_a_wrong_result_is_found(at):
    """One row of out, lse or a gradient from elsewhere, and one that nobody wrote."""
    problem = next(p for p in problems("causal", 64) if p.T == p.S == [130])

    def wrong(value):
        def compute(problem, tensors, ends):
            found = [x.clone() for x in eager(problem, tensors, ends)]
            found[at][0, 0, 77] = found[at][0, 0, 20] if value is None else value
            return tuple(found)

        return compute

    torch.manual_seed(0)
    for value in (None, torch.nan):
        (fault,) = check(problem, CPU, wrong(value))
        assert fault.startswith(("out", "lse", "dq", "dk", "dv")[at])


def test_a_row_without_keys():
    """Its log-sum-exp is -inf: a finite one is a fault."""
    lse = torch.tensor([[[-torch.inf, 1.0]]])
    none = torch.zeros(0)
    assert faults((none, lse, none, none, none), (none, lse, none, none, none), (none, lse, none, none, none)) == []
    finite = lse.nan_to_num(neginf=-100.0)
    assert faults((none, finite, none, none, none), (none, lse, none, none, none), (none, lse, none, none, none)) != []
