"""Ceilings are kept per machine and version, and never trusted elsewhere."""

import dataclasses
from pathlib import Path

import pytest
import torch

from rooflight.bench import ceilings, harness
from rooflight.model.ceilings import Ceilings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def here() -> Ceilings:
    where = harness.machine(CPU)
    return Ceilings(
        gemm_flops={"float32": 1e11},
        copy_bandwidth=1e10,
        exp_rate=1e9,
        attention_flops={128: 1e10},
        device=where["device"],
        date=where["date"],
        versions={"torch": where["torch"]},
    )


def test_nothing_measured_is_none():
    assert ceilings.load_ceilings(CPU) is None


def test_what_is_kept_is_read_back(tmp_path: Path):
    path = ceilings.save_ceilings(here(), CPU)
    assert path.is_relative_to(tmp_path)
    assert ceilings.load_ceilings(CPU) == here()


@pytest.mark.parametrize("change", [{"device": "another processor"}, {"versions": {"torch": "1.0"}}])
def test_another_machine_or_version_is_not_trusted(change: dict):
    ceilings.save_ceilings(dataclasses.replace(here(), **change), CPU)
    assert ceilings.load_ceilings(CPU) is None


def test_a_damaged_file_is_measured_again():
    ceilings.save_ceilings(here(), CPU).write_text('{"gemm_flops": ')
    assert ceilings.load_ceilings(CPU) is None


def test_measuring_gives_every_rate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ceilings, "ATTENTION_LENGTHS", {"cpu": (16, 32)})
    monkeypatch.setattr(ceilings, "ATTENTION_TOKENS", {"cpu": 64})
    monkeypatch.setattr(ceilings, "measure_peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(ceilings, "_best_seconds", lambda call, device: (call(), 0.5)[1])
    measured = ceilings.measure_ceilings(CPU)
    assert set(measured.gemm_flops) == {"float32", "bfloat16"}
    assert measured.copy_bandwidth == 2 * 2**28 / 0.5
    assert set(measured.attention_flops) == set(measured.attention_backward_flops) == {16, 32}
    # 4 D FLOPs for each of the T (T + 1) / 2 visible pairs of each of the 64 / T heads
    assert measured.attention_flops[16] == 4 * 64 * 136 * 4 / 0.5
    assert measured.attention_backward_flops[16] == 2.5 * measured.attention_flops[16]
