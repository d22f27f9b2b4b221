"""The planted bugs of tests/mutants.py still fit the sources. Planting them all takes minutes: run that file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, survives

pytestmark = pytest.mark.cpu

KERNELS = ROOT / "kernels"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_mutant_applies(mutant):
    source = (KERNELS / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.original) == mutant.times
    assert mutant.bug not in source or mutant.bug in mutant.original
    file, name = mutant.test.partition("[")[0].split("::")
    assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


def test_a_mutant_is_caught_and_the_unchanged_copy_is_not():
    mutant = next(m for m in MUTANTS if m.file == "swiglu.py")
    alive, caught_by = survives(mutant)
    assert not alive
    assert "test_swiglu.py" in caught_by
    assert survives(replace(mutant, bug=mutant.original))[0]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_mutant_is_caught(mutant):
    assert not survives(mutant)[0]
