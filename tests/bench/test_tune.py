"""Tuning without a GPU: the interpreter computes, a made-up clock times."""

import dataclasses
import itertools

import pytest
import torch
from triton.runtime.errors import OutOfResources

from rooflight.bench import tune
from rooflight.bench.measure import harness
from rooflight.kernels.attention import tuned
from rooflight.kernels.attention.portable import tiles
from rooflight.kernels.attention.tuned import Identity, Tile, UserTable

CPU = torch.device("cpu")
GPU = Identity("Made-up", "sm_90", "3.7.1")
FIRST, SECOND, WRONG, LARGE = Tile(64, 64), Tile(32, 32), Tile(16, 32), Tile(32, 16)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def clock(**milliseconds):
    """A timer that runs the call, then says what the kernel's tile in use is to take."""

    def timer(call, device):
        call()
        ((kernel, tile),) = tiles._asked.items()
        return milliseconds[f"{kernel}_{tile.block_m}"]

    return timer


def run(kernels, timer, candidates=(FIRST, SECOND)):
    return tune.tune(
        CPU, names=kernels, head_dims=[16], dtypes=[torch.float32], shape=(1, 2, 1, 40), timer=timer,
        candidates=lambda *call: candidates,
    )  # fmt: skip


def kept(trials):
    return [(t.kernel, t.candidate) for t in trials if t.kept]


def test_the_fastest_is_kept_and_found_again(monkeypatch):
    trials = run(["fwd", "dkdv", "dq"], clock(fwd_64=2.0, fwd_32=1.0, dkdv_64=1.0, dkdv_32=2.0, dq_64=1.0, dq_32=0.99))
    # a hundredth is noise: dq keeps the tile that ships
    assert kept(trials) == [("fwd", SECOND), ("dkdv", FIRST), ("dq", FIRST)]
    path = tune.save(trials, GPU)
    assert path == GPU.path
    assert tuned.read(GPU).tiles[("fwd", "float32", 16)] == SECOND
    later = [dataclasses.replace(t, candidate=LARGE) for t in trials if t.kernel == "dq"]
    tune.save(later, GPU)
    assert tuned.read(GPU).tiles == {
        ("fwd", "float32", 16): SECOND,
        ("dkdv", "float32", 16): FIRST,
        ("dq", "float32", 16): LARGE,
    }


def test_wrong_results_are_never_timed_and_what_does_not_fit_is_skipped(monkeypatch):
    real = harness.Checker.check

    def check(self, name):
        (tile,) = tiles._asked.values()
        if tile == LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if tile == WRONG:
            raise harness.WrongResult("off")
        real(self, name)

    monkeypatch.setattr(harness.Checker, "check", check)
    trials = run(["fwd"], clock(fwd_64=2.0, fwd_32=1.5), (FIRST, WRONG, LARGE, SECOND))
    assert [t.milliseconds for t in trials] == [2.0, None, None, 1.5]
    assert trials[1].note == "wrong: off"
    assert "232448" in trials[2].note
    assert kept(trials) == [("fwd", SECOND)]


def test_an_error_that_is_no_candidates_fault_is_raised(monkeypatch):
    def fail(self, name):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(harness.Checker, "check", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(["fwd"], clock())
    assert tiles._asked == {}


def test_paths_are_timed_with_the_tiles_that_won():
    case = tune._case((1, 2, 1, 20), 16, torch.float32, CPU)
    tile = tune.Trial("fwd", "float32", 16, SECOND, 1.0, kept=True)
    times = itertools.chain([3.0, 2.0, 1.0, 2.0])
    seen = []

    def timer(call, device):
        seen.append((tune.paths._asked, dict(tiles._asked)))
        return next(times)

    trials = tune._time_paths(case, [tile], CPU, timer, lambda what: None)
    assert seen == [("portable", {"fwd": SECOND}), ("hopper", {"fwd": SECOND})] * 2
    assert kept(trials) == [("forward", "hopper"), ("backward", "portable")]
    assert tune.merged(UserTable(), trials).paths == {
        ("forward", "float32", 16): "hopper",
        ("backward", "float32", 16): "portable",
    }


def test_a_broken_table_is_written_anew():
    GPU.path.parent.mkdir(parents=True)
    GPU.path.write_text("{")
    tune.save([tune.Trial("fwd", "bfloat16", 64, SECOND, 1.0, kept=True)], GPU)
    assert tuned.read(GPU).tiles == {("fwd", "bfloat16", 64): SECOND}


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="expected a GPU to time on, found none"):
        tune.require_gpu(CPU)
    with pytest.raises(ValueError, match="kernel: expected one of fwd, dkdv, dq, got 'bwd'"):
        tune.tune(CPU, names=["bwd"])
    with pytest.raises(ValueError, match="head-dim: expected 1 to 512, got 0"):
        tune.tune(CPU, head_dims=[0])
    with pytest.raises(ValueError, match="dtype: expected one of bfloat16"):
        tune.read_dtypes(["int8"])


def test_the_table_shows_every_candidate():
    trials = [
        tune.Trial("fwd", "bfloat16", 64, FIRST, 1.25, kept=True),
        tune.Trial("fwd", "bfloat16", 64, LARGE, None, "x"),
    ]
    table = tune.trials_table(trials)
    assert table.row_count == 2
    assert list(table.columns[4].cells) == ["1.250", ""]
    assert list(table.columns[5].cells) == ["kept", "x"]
