"""`pytest --benchmark` as its users run it: what a saved benchmark says, and what makes one fail."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rooflight.bench.cases.kernels import attention_case, rms_norm_case
from rooflight.bench.measure import harness
from rooflight.bench.rates import ceilings, kernel_rates
from rooflight.kernels.cost import Cost, rms_norm_cost
from rooflight.model import PRESETS, estimate
from rooflight.model.ceilings import Ceilings

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a user does: not interpreted, and no worker of the pytest that runs this test: workers do not benchmark."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", *arguments, "-p", "no:xdist", "-p", "no:cacheprovider"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment, timeout=300)


def benchmark(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Quick runs of bench/, with ceilings at hand so that none are measured."""
    where = harness.machine(CPU)
    # of those that are timed again before they are trusted, sizes that are not
    rates = {
        f"{kernel}{suffix} {dtype}": {
            (4096 * 256, 256, 1)[: len(sizes[0])] if kernel in ceilings.PROBED else sizes[0]: 1e9
        }
        for dtype in ("float32", "bfloat16")
        for kernel, sizes in kernel_rates.grids(getattr(torch, dtype), CPU).items()
        for suffix in ("", " backward")
    }
    known = Ceilings(
        dict.fromkeys(("float32", "bfloat16"), 1e11),
        1e10,
        1e9,
        rates | {"rms_norm float32": {(4096 * 256, 256): 2e9}},
        device=where["device"],
        versions={"torch": where["torch"]},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        ceilings.save_ceilings(known, CPU)
    quick = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.01", "--benchmark-warmup=off")
    threads = str(torch.get_num_threads())
    return run_pytest("--benchmark", *quick, *arguments, XDG_CACHE_HOME=str(cache), OMP_NUM_THREADS=threads)


def read_table(output: str) -> list[dict[str, str]]:
    """The rows of the table that pytest ends with; columns are two spaces apart at least."""
    lines = output.partition(" predicted and measured ")[2].splitlines()
    table = itertools.takewhile(lambda line: "  " in line, lines[1:])
    header, *rows = [re.split("  +", line.strip()) for line in table]
    return [dict(zip(header, row, strict=True)) for row in rows]


NORM = "rms_norm-M4096-N256"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    """(what the terminal showed, what was saved) of a norm, ours and its peers', and of a training step."""
    if torch.cuda.is_available():
        pytest.skip("the cases that it names are a CPU's; a GPU runs others")
    folder = tmp_path_factory.mktemp("benchmarks")
    only = f"({NORM} and (forward or rooflight)) or (train_step and float32)"
    done = benchmark(folder, f"--benchmark-json={folder / 'saved.json'}", "-k", only)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "saved.json").read_text())["benchmarks"]


def test_a_saved_benchmark_has_its_cost_its_rates_and_its_prediction(done: tuple[str, list[dict]]):
    forward = [b for b in done[1] if b["group"] == f"{NORM}-float32 forward"]
    runs = {b["extra_info"]["provider"]: b for b in forward}
    assert runs.keys() == {"rooflight", "torch", "eager"}
    for run in runs.values():
        info, median = run["extra_info"], run["stats"]["median"]
        assert (info["flops"], info["bytes"]) == (4 * 4096 * 256, (2 * 4096 * 256 + 256) * 4 + 4096 * 4)
        assert info["bound by"] == "memory"
        assert info["GB/s"] == pytest.approx(info["bytes"] / median / 1e9)
        assert info["TFLOP/s"] == pytest.approx(info["flops"] / median / 1e12)
        assert info["share of ceiling"] == pytest.approx(info["bytes"] / 1e10 / median)
        assert info["predicted_seconds"] == pytest.approx(4096 * 256 / 2e9)
        assert info["predicted / measured"] == pytest.approx(info["predicted_seconds"] / median)


def test_the_terminal_ends_with_predicted_beside_measured(done: tuple[str, list[dict]]):
    rows = {(row["benchmark"], row["provider"]): row for row in read_table(done[0])}
    step, name = f"train step, tiny, batch 8 x {PRESETS['tiny'].context_length}, float32", f"{NORM}-float32"
    ours = {(f"{name} {mode}", "rooflight") for mode in ("forward", "backward")} | {(step, "rooflight")}
    peers = {(f"{name} forward", "torch"), (f"{name} forward", "eager")}
    assert set(rows) == ours | peers
    assert all(rows[peer]["predicted ms"] == rows[peer]["ratio"] == "-" for peer in peers)
    for key in ours:
        numbers = {column: float(cell.rstrip("%").replace(",", "")) for column, cell in list(rows[key].items())[2:]}
        assert numbers["ratio"] == pytest.approx(numbers["predicted ms"] / numbers["measured ms"], abs=1e-3, rel=1e-3)
        if key[0] == step:
            closed = estimate(PRESETS["tiny"], batch_size=8, dtype="float32", causal="full")
            flops, moved = closed.flops, sum(component.bytes for component in closed.components)
            least = flops / 1e11
        else:
            cost = rms_norm_cost(4096, 256, torch.float32, backward=key[0].endswith("backward"))
            flops, moved, least = cost.flops, cost.bytes, cost.bytes / 1e10
            rate = 1e9 if key[0].endswith("backward") else 2e9
            assert numbers["predicted ms"] == pytest.approx(4096 * 256 / rate * 1e3, abs=1e-4)
        assert numbers["MFLOP"] == pytest.approx(flops / 1e6, abs=1e-3)
        assert numbers["MB"] == pytest.approx(moved / 1e6, abs=1e-3)
        assert numbers["of ceiling"] == pytest.approx(1e5 * least / numbers["measured ms"], abs=0.06, rel=1e-3)


def test_without_the_flag_benchmarks_are_skipped():
    done = run_pytest("bench", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a benchmark: run `pytest --benchmark`" in done.stdout
    assert "passed" not in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_oracles_flops_are_the_closed_forms(dtype: torch.dtype):
    harness.check_flops(attention_case(1, 4, 2, 32, 16, True, dtype, CPU), CPU)
    harness.check_flops(rms_norm_case(4, 8, dtype, CPU), CPU)  # no products: nothing for torch to count


def test_flops_that_torch_does_not_count_are_refused():
    case = attention_case(1, 2, 2, 32, 16, True, torch.float32, CPU)
    providers = {"eager": lambda q, k, v: case.providers["eager"](q, k, v) + 0 * (q @ k.transpose(-1, -2)).sum()}
    with pytest.raises(
        harness.WrongResult, match=r"counts \[196608, 393216\] FLOPs, the closed form \[131072, 262144\]"
    ):
        harness.check_flops(dataclasses.replace(case, providers=providers), CPU)


def test_a_case_takes_the_rate_of_its_kernel():
    known = Ceilings({"float32": 1e9}, 1e9, kernels={"attention backward float32": {(32, 16): 1e6}})
    case = attention_case(1, 2, 2, 32, 16, True, torch.float32, CPU)
    assert case.work(True).seconds(known, "float32")[0] == case.cost(True).flops / 1e6
    assert case.work(False).roof(known, "float32") == case.work(False).seconds(known, "float32")
    slow = dataclasses.replace(case, cost=lambda backward: Cost(10**9, 1))
    assert slow.work(False).roof(known, "float32") == (1.0, "products")
