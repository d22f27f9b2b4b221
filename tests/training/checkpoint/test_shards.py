"""Checkpoints of several ranks: what any number of them saved, any other number reads, bit for bit."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import time
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from rooflight.kernels import reference
from rooflight.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_extra,
    load_model,
    read_model_config,
    save_checkpoint,
)
from rooflight.training.checkpoint.shards import Shards
from support.saving import (
    CONFIG,
    build,
    fail,
    join,
    load_all,
    run,
    save_all,
    save_and_load,
    save_apart,
    save_for_ever,
    start,
    wrong,
)

pytestmark = pytest.mark.cpu


def test_any_number_of_ranks_reads_what_any_other_saved(tmp_path):
    """One process, two and three, replicated and sharded: weights, moments, steps, generators and extra."""
    folder = tmp_path / "checkpoints"
    save_all(0, str(folder), 1)
    run(3, tmp_path, save_and_load, str(folder), 3)
    run(2, tmp_path, save_and_load, str(folder), 2)
    load_all(0, str(folder), 1)
    paths = list_checkpoints(folder)
    assert [int(p.name[-2:]) for p in paths] == [10, 21, 22, 31, 32]
    for path in paths:
        step = int(path.name[-2:])
        model = load_model(path, ops=reference)
        assert wrong(model, [], step) == []
        assert not model.training
        assert load_extra(path)["step"] == step
        assert read_model_config(path) == CONFIG
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        shards = {"shards/.metadata", *(f"shards/__{rank}_0.distcp" for rank in range(step // 10))}
        assert files == {"manifest.json", "model.json", "state.pt"} | ({"model.safetensors"} if step == 10 else shards)
        assert str(tmp_path) not in (path / "manifest.json").read_text()
    # a rank of two writes about half, whether it holds all or half
    for name in ("step-00000021", "step-00000022"):
        sizes = sorted((folder / name / "shards" / f"__{rank}_0.distcp").stat().st_size for rank in range(2))
        assert sizes[1] < 2 * sizes[0]


def test_a_rank_that_fails_fails_for_all(tmp_path):
    """A full disk, wrong arguments and damaged shards, which are named and passed over; and an evaluated model."""
    folder = tmp_path / "checkpoints"
    run(2, tmp_path, fail, str(folder))
    # a rank wrote about half, though the forward pass had gathered all
    sizes = sorted(p.stat().st_size for p in (folder / "step-00000003").rglob("*.distcp"))
    assert sizes[1] < 2 * sizes[0]
    assert wrong(load_model(folder, ops=reference), [], 3) == []


def test_ranks_need_one_file_system(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    run(2, tmp_path, save_apart, [str(folder) for folder in folders])
    assert list((folders[0] / "checkpoints").iterdir()) == []


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("name", ["os.mkdir", "torch.load", "torch.hub.load", "builtins.eval"])
def test_an_index_names_nothing_but_tensors(tmp_path, monkeypatch, name):
    """A pickle runs what it names: one that somebody else wrote must not."""
    monkeypatch.chdir(tmp_path)
    module, _, function = name.rpartition(".")
    call = b"c" + module.encode() + b"\n" + function.encode() + b"\n(S'evil'\ntR."
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil()) if name == "os.mkdir" else call)
    with pytest.raises(pickle.UnpicklingError, match="an index of tensors has no"):
        Shards(tmp_path)
    assert not (tmp_path / "evil").exists()


def _begun(directory: Path) -> list[Path]:
    """The folders of checkpoints that are being written, and not those of old ones that are being removed."""
    latest = list_checkpoints(directory)[-1].name
    return [p for p in directory.glob(".tmp-step*") if p.name.removeprefix(".tmp-").rpartition("-")[0] > latest]


def _kill_in_a_save(tmp_path: Path, kills: int, seed: int) -> None:
    """Ranks that do nothing but save, one of which is killed at a random moment of a write."""
    chance = random.Random(seed)
    for n in range(kills):
        directory = tmp_path / f"{n}" / "checkpoints"
        context = start(2, tmp_path / f"{n}", save_for_ever, str(directory), ("fsdp", "ddp")[n % 2], n % 3 == 1)
        while not list_checkpoints(directory):
            time.sleep(0.02)
        doomed = n // 2 % 2
        pid = context.processes[doomed].pid
        time.sleep(chance.uniform(0, 0.5))
        for _ in range(1000):  # held still, to see whether it is within a write
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.01)
            if _begun(directory):
                break
            os.kill(pid, signal.SIGCONT)  # between two
            time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        context.processes[1 - doomed].join(60)  # it learns of it by the connection, and ends by itself
        assert context.processes[1 - doomed].exitcode == 1
        assert re.match("RuntimeError: .*gloo", directory.with_name(str(1 - doomed)).read_text())  # no OSError
        with pytest.raises((ProcessExitedException, ProcessRaisedException)):
            join(context)
        assert bool(_begun(directory)) == (doomed == 0)  # a living rank 0 removes what it began

        for path in (paths := list_checkpoints(directory)):  # what has a checkpoint's name is whole
            model, optimizers = build()
            step, _ = load_checkpoint(path, model, optimizers)
            assert (path.name, wrong(model, optimizers, step)) == (f"step-{step:08d}", [])
        assert 1 <= len(paths) <= 3
        save_checkpoint(directory, model, optimizers, step=step + 1, keep=1)
        assert [p.name for p in directory.iterdir()] == [f"step-{step + 1:08d}"]


def test_a_killed_rank_leaves_the_last_checkpoint_whole(tmp_path):
    _kill_in_a_save(tmp_path, 4, seed=0)


@pytest.mark.slow
def test_twenty_killed_ranks_leave_the_last_checkpoint_whole(tmp_path):
    _kill_in_a_save(tmp_path, 20, seed=1)
