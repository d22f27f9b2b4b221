"""Ceilings are kept per machine and version, and never trusted elsewhere."""

import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rooflight.bench.bench_commands import bench
from rooflight.bench.measure import harness
from rooflight.bench.rates import ceilings, kernel_rates, schedule
from rooflight.model import PRESETS, estimate
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


@pytest.mark.parametrize(
    "content",
    [
        b'{"gemm_flops": ', b"", b"\xff\xfe", b"[]", b"null", b'"text"', b"{}",
        b'{"gemm_flops": [1], "copy_bandwidth": 1}',
        b'{"gemm_flops": {"float32": "fast"}, "copy_bandwidth": 1}',
        b'{"gemm_flops": {}, "copy_bandwidth": 1, "kernels": {"gemm float32": [1]}}',
        b'{"gemm_flops": {}, "copy_bandwidth": 1, "kernels": {"gemm float32": {"wide": 1}}}',
        b'{"gemm_flops": {}, "copy_bandwidth": 1, "versions": null}',
        b'{"gemm_flops": {}, "copy_bandwidth": 1, "memory_bytes": "64 GB"}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(content: bytes, monkeypatch: pytest.MonkeyPatch):
    path = ceilings.save_ceilings(here(), CPU)
    path.write_bytes(content)
    assert ceilings.load_ceilings(CPU) is None
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_, **__: here())
    monkeypatch.setattr(ceilings, "unmeasured", lambda *_: [])
    assert ceilings.ceilings_of(CPU, "float32") == ceilings.load_ceilings(CPU) == here()


@pytest.mark.parametrize("place", ["a file", "a file above", "no home", "a folder in the file's place"])
def test_where_they_cannot_be_kept_they_are_measured_all_the_same(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
    elif place == "a folder in the file's place":
        (ceilings.path_of(CPU) / "within").mkdir(parents=True)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / ("" if place == "a file" else "below")))
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_, keep, **__: (keep(here()), here())[1])
    assert ceilings.load_ceilings(CPU) is None
    assert ceilings.ceilings_of(CPU, "float32") == here()
    told = capsys.readouterr().err
    assert told.count("rates are not kept for the next run") == 1
    assert "XDG_CACHE_HOME" in told


def homeless() -> Path:
    """As Path.home for a container's user that no password file knows."""
    raise RuntimeError("Could not determine home directory.")


def test_without_a_measurement_the_command_to_run_is_named():
    with pytest.raises(ValueError, match=r"^no ceilings measured on this cpu .*: run `rooflight bench ceilings`$"):
        ceilings.require_ceilings(CPU)


def test_the_rates_of_one_number_of_threads_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch):
    ceilings.save_ceilings(here(), CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert ceilings.load_ceilings(CPU) is None


SMALL = {
    "gemm": (32, 16, 8), "attention": (16, 8), "linear_cross_entropy": (8, 4, 16), "rms_norm": (64, 8),
    "rms_norm residual": (64, 8), "rope": (256, 8), "swiglu": (64, 8), "gelu": (64, 8), "add": (64,),
    "scale": (64,), "embedding": (512,), "cast": (64,), "fp8_cast": (64,), "adamw": (64,), "muon": (8, 16),
}  # fmt: skip

CPUS = SMALL.keys() - {"fp8_cast"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every kernel at two sizes that take no time; the rates of products and copies are given."""
    monkeypatch.setattr(kernel_rates, "FP8_WIDTH", 16)
    for name, kernel in kernel_rates.KERNELS.items():
        sizes = SMALL[name], (2 * SMALL[name][0], *SMALL[name][1:])
        monkeypatch.setitem(kernel_rates.KERNELS, name, dataclasses.replace(kernel, sizes={"cpu": sizes}))
    monkeypatch.setattr(kernel_rates, "ATTENTION_ROWS", {"cpu": 64})
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(ceilings, "measure_peak_flops", lambda device, dtype, seconds: 1e9)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(ceilings, "best_seconds", lambda call, device, **_: 0.5)
    return monkeypatch


def test_measuring_gives_every_rate(monkeypatch: pytest.MonkeyPatch):
    for name, sizes in SMALL.items():
        monkeypatch.setitem(
            kernel_rates.KERNELS, name, dataclasses.replace(kernel_rates.KERNELS[name], sizes={"cpu": (sizes,)})
        )
    monkeypatch.setattr(kernel_rates, "ATTENTION_ROWS", {"cpu": 64})
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(ceilings, "measure_peak_flops", lambda device, dtype, seconds: 1e9)
    monkeypatch.setattr(ceilings, "best_seconds", lambda call, device, **_: (call(), 0.5)[1])
    monkeypatch.setattr(
        kernel_rates, "median_seconds", lambda calls, device, **how: [(call(), 0.5)[1] for call in calls]
    )
    told: list[str] = []
    dtypes = torch.float32, torch.bfloat16
    measured = ceilings.measure_ceilings(CPU, dtypes=dtypes, progress=told.append)
    assert told[1] == "attention 16 x 8, float32 (1 of 13)"
    assert set(measured.gemm_flops) == {"float32", "bfloat16"}
    assert measured.copy_bandwidth == 2 * 2**16 / 0.5
    for dtype in measured.gemm_flops:
        needless = {"fp8_cast", "cast"} if dtype == "float32" else {"fp8_cast"}  # a CPU only imitates fp8
        rates = {name: measured.kernels[f"{name} {dtype}"] for name in SMALL.keys() - needless}
        # FLOPs of the products: 2 M N K; 4 D for each of the T (T + 1) / 2 visible pairs of each of the 64 / T heads
        assert rates["gemm"] == {(32, 16, 8): 2 * 32 * 16 * 8 / 0.5}
        assert measured.kernels[f"gemm backward {dtype}"] == {(32, 16, 8): 2 * 2 * 32 * 16 * 8 / 0.5}
        assert rates["attention"] == {(16, 8): 4 * 8 * 136 * 4 / 0.5}
        assert measured.kernels[f"attention backward {dtype}"][16, 8] == 2.5 * rates["attention"][16, 8]
        # elements everywhere else
        assert rates["rms_norm"] == rates["swiglu"] == {(64, 8): 64 / 0.5}
        assert rates["adamw"] == {(64,): 64 / 0.5}
    assert measured.fp8_flops == {}
    assert Ceilings.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_a_device_that_multiplies_in_fp8_has_rates_of_it(small: pytest.MonkeyPatch):
    """A CPU's interpreter in the place of a GPU: the products as each pass sums them, and the casts."""
    asked = []

    def product(a, b, scale_a, scale_b, dtype, *, fast):
        asked.append((a.dtype, b.dtype, tuple(a.shape), dtype, fast))
        return a

    small.setattr(ceilings.fp8, "product", product)
    small.setattr(ceilings, "has_fp8", lambda device: True)
    small.setattr(kernel_rates, "has_fp8", lambda device: True)
    small.setattr(ceilings, "FP8_SIDE", 32)
    small.setattr(ceilings, "best_seconds", lambda call, device, *_, **__: (call(), 0.5)[1])
    measured = ceilings.measure_ceilings(CPU, seconds=5.0, names=("fp8_cast",))
    assert measured.fp8_flops == {"forward": 2 * 32**3 / 0.5, "backward": 2 * 32**3 / 0.5}
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert asked == [(a, e4m3, (32, 32), torch.bfloat16, fast) for a, fast in ((e4m3, True), (e5m2, False))]
    assert set(measured.kernels) == {"fp8_cast bfloat16"}
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(ceilings.ceilings_table(measured))
    assert "products, fp8 backward" in shown.export_text()
    # another dtype's rates, measured later, leave it
    beside = ceilings._beside(measured, here())
    assert (beside.fp8_flops, set(beside.gemm_flops)) == (measured.fp8_flops, {"bfloat16", "float32"})


@pytest.mark.parametrize(("then", "again"), [(0.5, True), (0.9, False), (2.0, False)])
def test_rates_of_a_busy_hour_are_measured_again(small: pytest.MonkeyPatch, then: float, again: bool):
    """Kept at half of today's they were another day's; a machine that is busy today changes nothing."""
    clock = Clock(small)
    took = [1.0]

    def time_(kernel, group, dtype, device, seconds, rounds):
        clock.now += 0.01
        passes = (False, True) if kernel.backward else (False,)
        return {(backward, sizes): took[0] for sizes in group for backward in passes}

    small.setattr(kernel_rates, "_time", time_)
    small.setattr(ceilings, "SECONDS", 5.0)
    quiet = ceilings.keep_ceilings(CPU, dtypes=(torch.float32,), seconds=5.0)
    took[0] = 1 / then
    busy = ceilings.keep_ceilings(CPU, dtypes=(torch.float32,), seconds=5.0)
    took[0] = 1.0
    assert ceilings.faster_now(busy, CPU, "float32") == pytest.approx(1 / then)
    found = ceilings.ceilings_of(CPU, "float32", seconds=5.0)
    assert found.kernels == (quiet if again else busy).kernels
    assert ceilings.load_ceilings(CPU) == found


def test_the_probe_takes_its_share_of_a_second(small: pytest.MonkeyPatch):
    known = ceilings.keep_ceilings(CPU, dtypes=(torch.float32,), seconds=5.0)
    asked = []

    def probe(dtype, device, **options):
        asked.append(options["deadline"] - 100.0)
        return {"gemm": {(1, 1, 1): 1.0}}

    Clock(small)
    small.setattr(ceilings, "kernel_rates", probe)
    assert ceilings.faster_now(known, CPU, "float32") == 1.0  # of sizes that are not kept
    assert asked == [pytest.approx(ceilings.PROBE_SECONDS)]
    assert ceilings.faster_now(here(), CPU, "bfloat16") == 1.0  # nothing of it is kept, and nothing probed
    assert len(asked) == 1


class Clock:
    """Stands still but for what a stub adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in (ceilings, kernel_rates, schedule):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_slow_kernels_leave_sizes_out_and_no_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ceilings, "measure_peak_flops", lambda device, dtype, seconds: 1e9)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(ceilings, "best_seconds", lambda call, device, **_: 0.5)
    clock = Clock(monkeypatch)

    def slow(kernel, group, dtype, device, seconds, rounds):
        clock.now += 2.0 * len(group)  # a size takes 2 s, most of it before it runs
        return {
            (backward, sizes): 0.1 for sizes in group for backward in ((False, True) if kernel.backward else (False,))
        }

    monkeypatch.setattr(kernel_rates, "_time", slow)
    grids = kernel_rates.grids(torch.bfloat16, CPU)
    # "together" is a CPU's way; a GPU's sizes come one after another
    monkeypatch.setattr(
        kernel_rates, "plan", lambda grids, work, together, dear: schedule.plan(grids, work, together=False)
    )
    for seconds, bound in ((60.0, 60.0), (1.0, 2.0 * len(grids))):
        start = clock.now
        measured = ceilings.measure_ceilings(CPU, seconds=seconds)
        assert clock.now - start <= bound
        assert clock.now - start > bound - 4  # and the time is made use of
        assert {f"{name} bfloat16" for name in grids} <= set(measured.kernels)
        missing = ceilings.sizes_left_out(measured, CPU)
        assert len(missing["gemm bfloat16"]) + len(measured.kernels["gemm bfloat16"]) == 32
        assert any(line.startswith("left out: gemm bfloat16") for line in ceilings.left_out_lines(measured, CPU))


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM"])
def test_an_interrupt_keeps_what_was_measured(small: pytest.MonkeyPatch, stop: str):
    measure, tasks = kernel_rates._time, []

    def until_stopped(kernel, *arguments):
        tasks.append(kernel)
        if len(tasks) == 4:
            os.kill(os.getpid(), signal.SIGTERM if stop == "SIGTERM" else signal.SIGINT)
        return measure(kernel, *arguments)

    known = here()
    ceilings.save_ceilings(known, CPU)
    with small.context() as patch:
        patch.setattr(kernel_rates, "_time", until_stopped)
        result = CliRunner().invoke(bench, ["ceilings", "--device", "cpu", "--seconds", "5"])
    assert result.exit_code == 130, result.output
    kept = ceilings.load_ceilings(CPU)
    assert kept is not None
    assert set(kept.gemm_flops) == {"float32", "bfloat16"}
    assert kept.kernels["attention float32"] == known.kernels["attention float32"]
    names = {"gemm", "attention", "linear_cross_entropy"}
    done = {f"{name}{suffix} bfloat16" for name in names for suffix in ("", " backward")}
    assert set(kept.kernels) == done | {"attention float32"}
    assert "left out: rms_norm bfloat16, 2 sizes (64 x 8, 128 x 8)" in result.output
    # the estimate takes what is there, and ceilings_of what is missing, on a machine that is as fast as it was
    small.setattr(ceilings, "faster_now", lambda *_: 1.0)
    assert estimate(PRESETS["tiny"], batch_size=1, ceilings=kept).seconds > 0
    whole = ceilings.ceilings_of(CPU, "bfloat16", seconds=5.0)
    assert {name: whole.kernels[name] for name in done} == {name: kept.kernels[name] for name in done}
    assert ceilings.load_ceilings(CPU) == whole
    assert {f"{name} bfloat16" for name in CPUS} <= set(whole.kernels)


def test_the_command_ends_in_time_and_keeps_its_rates(small: pytest.MonkeyPatch):
    result = CliRunner().invoke(bench, ["ceilings", "--device", "cpu", "--dtype", "float32", "--seconds", "5"])
    assert result.exit_code == 0, result.output
    kept = ceilings.load_ceilings(CPU)
    assert kept is not None
    assert set(kept.gemm_flops) == {"float32"}
    assert ceilings.sizes_left_out(kept, CPU) == {}
    assert "gemm 64 x 16 x 8, float32 (" in result.output  # the progress
    for sentence in ("dtype: expected one of", "seconds: expected > 0, got 0.0"):
        wrong = ["--dtype", "int8"] if "dtype" in sentence else ["--seconds", "0"]
        error = CliRunner().invoke(bench, ["ceilings", "--device", "cpu", *wrong]).exception
        assert isinstance(error, ValueError)
        assert sentence in str(error)


def test_a_size_that_does_not_fit_into_memory_is_left_out(small: pytest.MonkeyPatch):
    measure = kernel_rates._time

    def too_large(kernel, group, *arguments):
        if group == ((64, 16, 8),):
            raise torch.OutOfMemoryError
        return measure(kernel, group, *arguments)

    small.setattr(kernel_rates, "_time", too_large)
    measured = ceilings.measure_ceilings(CPU, seconds=5.0)
    assert ceilings.sizes_left_out(measured, CPU) == {"gemm bfloat16": [(64, 16, 8)]}


def test_what_was_not_measured_yet_is_measured_and_kept_beside_the_rest(small: pytest.MonkeyPatch):
    small.setattr(ceilings, "faster_now", lambda *_: 1.0)
    known = ceilings.keep_ceilings(CPU, dtypes=(torch.float32,), seconds=5.0)
    assert ceilings.ceilings_of(CPU, "float32") == known  # and nothing is measured
    both = ceilings.ceilings_of(CPU, "bfloat16", seconds=5.0)
    assert set(both.gemm_flops) == {"float32", "bfloat16"}
    assert {name: both.kernels[name] for name in known.kernels} == known.kernels
    assert {f"{name} bfloat16" for name in CPUS} <= set(both.kernels)
    assert ceilings.load_ceilings(CPU) == both


def test_every_kernel_of_a_step_has_its_rate():
    """What the estimate asks for is what is measured, by the same names and as many sizes."""
    asked = {}
    other = dataclasses.replace(PRESETS["gpt2-small"], qk_norm=True)
    for config, fp8 in ((PRESETS["tiny"], ""), (other, ""), (other, "native")):
        for part in parts(config, 2, 64, "bfloat16", checkpointing=False, gpus=1, optimizer="muon", fp8=fp8):
            for work in (*part.forward, *part.backward, *part.update):
                asked[work.kernel] = len(work.sizes)
    timed = {}
    for name, kernel in kernel_rates.KERNELS.items():
        for suffix in ("", " backward") if kernel.backward else ("",):
            timed[name + suffix] = len(kernel.sizes["cuda"][0])
    assert asked == timed
