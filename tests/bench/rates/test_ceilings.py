"""Ceilings are kept per machine and version, and never trusted elsewhere."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rooflight.bench.measure import harness
from rooflight.bench.rates import ceilings, kernel_rates
from rooflight.model import PRESETS
from rooflight.model.ceilings import Ceilings
from rooflight.model.parts import parts

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
        kernels={"attention float32": {(128, 64): 1e10}},
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


def test_without_a_measurement_the_command_to_run_is_named():
    with pytest.raises(ValueError, match=r"^no ceilings measured on this cpu .*: run `rooflight bench ceilings`$"):
        ceilings.require_ceilings(CPU)


def test_the_rates_of_one_number_of_threads_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch):
    ceilings.save_ceilings(here(), CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert ceilings.load_ceilings(CPU) is None


def test_measuring_gives_every_rate(monkeypatch: pytest.MonkeyPatch):
    small = {
        "gemm": (32, 16, 8), "attention": (16, 8), "linear_cross_entropy": (8, 4, 16), "rms_norm": (64, 8),
        "rms_norm residual": (64, 8), "rope": (256, 8), "swiglu": (64, 8), "gelu": (64, 8), "add": (64,),
        "embedding": (512,), "cast": (64,), "adamw": (64,),
    }  # fmt: skip
    for name, sizes in small.items():
        monkeypatch.setitem(
            kernel_rates.KERNELS, name, dataclasses.replace(kernel_rates.KERNELS[name], sizes={"cpu": (sizes,)})
        )
    monkeypatch.setattr(kernel_rates, "ATTENTION_ROWS", {"cpu": 64})
    monkeypatch.setattr(ceilings, "measure_peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(ceilings, "best_seconds", lambda call, device: (call(), 0.5)[1])
    monkeypatch.setattr(
        kernel_rates, "median_seconds", lambda calls, device, seconds: [(call(), 0.5)[1] for call in calls]
    )
    told: list[str] = []
    measured = ceilings.measure_ceilings(CPU, progress=told.append)
    assert told[1] == "gemm, float32"
    assert set(measured.gemm_flops) == {"float32", "bfloat16"}
    assert measured.copy_bandwidth == 2 * 2**28 / 0.5
    for dtype in measured.gemm_flops:
        rates = {name: measured.kernels[f"{name} {dtype}"] for name in small if (name, dtype) != ("cast", "float32")}
        # FLOPs of the products: 2 M N K; 4 D for each of the T (T + 1) / 2 visible pairs of each of the 64 / T heads
        assert rates["gemm"] == {(32, 16, 8): 2 * 32 * 16 * 8 / 0.5}
        assert measured.kernels[f"gemm backward {dtype}"] == {(32, 16, 8): 2 * 2 * 32 * 16 * 8 / 0.5}
        assert rates["attention"] == {(16, 8): 4 * 8 * 136 * 4 / 0.5}
        assert measured.kernels[f"attention backward {dtype}"][16, 8] == 2.5 * rates["attention"][16, 8]
        # elements everywhere else
        assert rates["rms_norm"] == rates["swiglu"] == {(64, 8): 64 / 0.5}
        assert rates["adamw"] == {(64,): 64 / 0.5}
    assert Ceilings.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_what_was_not_measured_yet_is_measured_and_kept_beside_the_rest(monkeypatch: pytest.MonkeyPatch):
    known = here()
    ceilings.save_ceilings(known, CPU)
    assert ceilings.ceilings_of(CPU, "float32") == known  # and nothing is measured

    def measure(device: torch.device, dtypes: tuple) -> Ceilings:
        assert dtypes == (torch.bfloat16,)
        return dataclasses.replace(known, gemm_flops={"bfloat16": 4e11}, kernels={"add bfloat16": {(8,): 1e9}})

    monkeypatch.setattr(ceilings, "measure_ceilings", measure)
    both = ceilings.ceilings_of(CPU, "bfloat16")
    assert both.gemm_flops == {"float32": 1e11, "bfloat16": 4e11}
    assert set(both.kernels) == {"attention float32", "add bfloat16"}
    assert ceilings.load_ceilings(CPU) == both


def test_every_kernel_of_a_step_has_its_rate():
    """What the estimate asks for is what is measured, by the same names and as many sizes."""
    asked = {}
    for config in (PRESETS["tiny"], dataclasses.replace(PRESETS["gpt2-small"], qk_norm=True)):
        for part in parts(config, 2, 64, "bfloat16", checkpointing=False, gpus=1, optimizer="muon"):
            for work in (*part.forward, *part.backward, *part.update):
                asked[work.kernel] = len(work.sizes)
    timed = {}
    for name, kernel in kernel_rates.KERNELS.items():
        for suffix in ("", " backward") if kernel.backward else ("",):
            timed[name + suffix] = len(kernel.sizes["cpu"][0])
    assert asked == timed
