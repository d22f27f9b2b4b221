from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer
from rooflight.training.checkpoint import (
    DamagedCheckpoint,
    check_tokenizer,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    load_model,
    save_checkpoint,
    set_aside,
)
from rooflight.training.optim import build_optimizers

CONFIG = ModelConfig(32, 8, 1, 2, d_model=16, d_ff=24)


def _trained(config: ModelConfig = CONFIG, optimizer: str = "muon", seed: int = 0):
    torch.manual_seed(seed)
    model = Transformer(config, ops=reference)
    optimizers = build_optimizers(model, optimizer=optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for o in optimizers:
        o.step()
    return model, optimizers


def _equal(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tied):
    config = ModelConfig(32, 8, 1, 2, d_model=16, d_ff=24, tie_embeddings=tied)
    model, optimizers = _trained(config)
    path = save_checkpoint(tmp_path, model, optimizers, step=3, extra={"loss": 1.5, "history": [1, 2]})
    draw = torch.rand(4)  # the generators' state is the checkpoint's

    other, other_optimizers = _trained(config, seed=1)
    assert not _equal(model, other)
    assert load_checkpoint(path, other, other_optimizers) == (3, {"loss": 1.5, "history": [1, 2]})
    assert _equal(model, other)
    assert torch.equal(torch.rand(4), draw)
    assert (other.output_weight is other.embedding.weight) == tied
    for o, p in zip(optimizers, other_optimizers, strict=True):
        for key, state in o.state_dict()["state"].items():
            for name, value in state.items():
                loaded = p.state_dict()["state"][key][name]
                assert torch.equal(value, loaded) if isinstance(value, torch.Tensor) else value == loaded

    alone = load_model(tmp_path, ops=reference)
    assert _equal(model, alone)
    assert alone.config == config
    assert not alone.training


def test_optimizers_keep_their_own_hyperparameters(tmp_path):
    model, _ = _trained()
    save_checkpoint(tmp_path, model, build_optimizers(model, lr=0.1, weight_decay=0.5), step=1)
    optimizers = build_optimizers(model, lr=0.2, weight_decay=0.25)
    load_checkpoint(tmp_path, model, optimizers)
    assert optimizers[0].param_groups[0]["lr"] == 0.2
    assert optimizers[1].param_groups[0]["weight_decay"] == 0.25


def test_only_the_latest_are_kept(tmp_path):
    model, optimizers = _trained()
    for step in (5, 90, 100, 123456789):
        save_checkpoint(tmp_path, model, optimizers, step=step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000100", "step-123456789"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-123456789"]
    assert find_checkpoint(tmp_path).name == "step-123456789"


@pytest.mark.parametrize("moment", ["save_file", "save", "fsync", "rename", "rmtree"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    """Whatever the save was doing when it died, a checkpoint can be loaded, and the next save cleans up."""
    model, optimizers = _trained()
    save_checkpoint(tmp_path, model, optimizers, step=1, keep=1)

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = {"save_file": safetensors.torch, "save": torch, "rmtree": shutil}.get(moment, os)
        patch.setattr(owner, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizers, step=2, keep=1)

    for path in list_checkpoints(tmp_path):
        assert load_checkpoint(path, *_trained(seed=1)) == (int(path.name[-1]), {})
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == (["2"] if moment == "rmtree" else ["1"])
    save_checkpoint(tmp_path, model, optimizers, step=3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    synced, renamed = set(), []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source, target):
        renamed.append(set(synced))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save_checkpoint(tmp_path, *_trained(), step=1)
    assert [{name.rsplit("-", 1)[0] if name.startswith(".tmp") else name for name in at} for at in renamed] == [
        {"model.safetensors", "model.json", "state.pt", "manifest.json", ".tmp-step-00000001"}
    ]
    assert tmp_path.name in synced


FILES = ("model.safetensors", "model.json", "state.pt", "manifest.json")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * len(content) // 3] ^= 1
    path.write_bytes(content)


def _damage(path: Path, how: str) -> None:
    """Damage to a file of a checkpoint, or to the checkpoint itself."""
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "scrambled":
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    elif how == "bit":
        _flip_a_bit(path)
    elif how == "not json":
        path.write_text("{" + "x" * (path.stat().st_size - 1))
    else:
        shutil.rmtree(path)
        path.mkdir() if how == "empty folder" else path.write_text("not a folder")


@pytest.mark.parametrize(
    ("how", "files"),
    [
        *((how, FILES) for how in ("missing", "empty", "truncated", "scrambled", "bit")),
        ("not json", ("model.json", "manifest.json")),
        ("empty folder", [""]),
        ("file", [""]),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it_used(tmp_path, how, files):
    """Training goes on from the previous one; whoever asks for the model is told of it, and gets no other."""
    model, optimizers = _trained()
    for step in (1, 2):
        save_checkpoint(tmp_path / "good", model, optimizers, step=step, extra={"step": step})
    for name in files:
        directory = tmp_path / f"{how} {name}"
        shutil.copytree(tmp_path / "good", directory)
        newest = directory / "step-00000002"
        _damage(newest / name if name else newest, how)
        other, other_optimizers = _trained(seed=1)
        message = rf"{newest} is damaged: .*{name}.*; the one before it is .*-00000001"
        for given in (directory, newest):
            with pytest.raises(DamagedCheckpoint, match=message):
                load_model(given)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(newest, other, other_optimizers)
        assert not _equal(model, other)  # nothing was restored from it
        path, step, extra, damaged = load_latest(directory, other, other_optimizers)
        assert (path.name, step, extra, [d.path for d in damaged]) == ("step-00000001", 1, {"step": 1}, [newest])
        assert _equal(model, other)

        assert set_aside(newest) == directory / "damaged-step-00000002"
        save_checkpoint(directory, other, other_optimizers, step=2, keep=1)
        assert sorted(p.name for p in directory.iterdir()) == ["damaged-step-00000002", "step-00000002"]


def test_every_bit_of_a_manifest_counts(tmp_path):
    path = save_checkpoint(tmp_path, *_trained(), step=1, tokenizer_hash="ab" * 32)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    accepted = []
    for i in range(len(content)):
        changed = bytearray(content)
        changed[i] ^= 1 << i % 8
        manifest.write_bytes(changed)
        try:
            load_model(path, ops=reference)
            accepted.append(changed[max(0, i - 9) : i + 9])
        except DamagedCheckpoint:
            pass
    assert accepted == []


def test_damage_keeps_no_place_among_the_kept(tmp_path):
    """A damaged checkpoint, older or newer, must not push a whole one out."""
    model, optimizers = _trained()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, optimizers, step=step, keep=9)
    (tmp_path / "step-00000002" / "state.pt").unlink()
    (tmp_path / "step-00000099").mkdir()
    save_checkpoint(tmp_path, model, optimizers, step=4, keep=2)
    assert [int(p.name[-2:]) for p in list_checkpoints(tmp_path)] == [2, 3, 4, 99]
    assert load_latest(tmp_path, model, optimizers)[1] == 4


def test_no_whole_checkpoint(tmp_path):
    model, optimizers = _trained()
    for step in (1, 2):
        _flip_a_bit(save_checkpoint(tmp_path, model, optimizers, step=step) / "state.pt")
    with pytest.raises(DamagedCheckpoint, match=r"step-00000002 is damaged: state\.pt .*; none before it is whole"):
        load_latest(tmp_path, model, optimizers)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_latest(tmp_path / "absent", model, optimizers)


@pytest.mark.parametrize("limit", [0, 100, 4000, 20000])
def test_a_full_disk_leaves_the_previous_one_alone(tmp_path, limit):
    """A limit on the size of files stands in for the disk: safetensors, torch and Python each meet it their own way."""
    model, optimizers = _trained()
    save_checkpoint(tmp_path, model, optimizers, step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*step-00000002: .*(File too large)"):
            save_checkpoint(tmp_path, model, optimizers, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path, model, optimizers) == (1, {})


def test_a_save_leaves_the_folder_of_a_living_writer(tmp_path):
    """Another process's temporary folder goes when that process has died, and not before."""
    code = (
        "import sys, time, pathlib; from rooflight.training.files import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1]) / 'step-00000009') as folder:\n"
        "    print(folder, flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        folder = Path(writer.stdout.readline().strip())
        save_checkpoint(tmp_path, *_trained(), step=1)
        assert folder.is_dir()
    finally:
        writer.kill()
        writer.communicate()
    save_checkpoint(tmp_path, *_trained(), step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_wrapped_models_save_the_plain_weights(tmp_path):
    """torch.compile's and DistributedDataParallel's wrappers put words before the names; a file has them plain."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, optimizers = _trained()
        compiled = torch.compile(model, backend="eager")
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for step, wrapped in enumerate((compiled, parallel, torch.compile(parallel, backend="eager")), 1):
            path = save_checkpoint(tmp_path, wrapped, optimizers, step=step)
            assert _equal(load_model(path, ops=reference), model)
            other, other_optimizers = _trained(seed=1)
            load_checkpoint(path, torch.compile(other, backend="eager"), other_optimizers)
            assert _equal(other, model)
    finally:
        torch.distributed.destroy_process_group()


def test_other_modules_are_refused_before_anything_is_written(tmp_path):
    model, _ = _trained()
    with pytest.raises(ValueError, match="model must be a Transformer, got Linear"):
        save_checkpoint(tmp_path / "a", torch.nn.Linear(2, 2), [], step=1)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    with pytest.raises(ValueError, match=r"the parameters of its config, got a difference in layers\.0\._orig_mod\."):
        save_checkpoint(tmp_path / "a", model, [], step=1)
    assert not (tmp_path / "a").exists()


def test_the_tokenizer_is_checked_by_its_hash(tmp_path):
    save_checkpoint(tmp_path, *_trained(), step=1, tokenizer_hash="a" * 64)
    check_tokenizer(tmp_path, "a" * 64, "mine")
    with pytest.raises(ValueError, match=r"was trained on tokens of the tokenizer aaaaaaaaaaaa, mine is bbbbbbbbbbbb"):
        check_tokenizer(tmp_path, "b" * 64, "mine")
    save_checkpoint(tmp_path, *_trained(), step=2)  # made without one, from one's own loop
    check_tokenizer(tmp_path, "b" * 64, "mine")


def test_refuses(tmp_path):
    model, optimizers = _trained()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_checkpoint(tmp_path, model, optimizers, step=1, keep=0)
    path = save_checkpoint(tmp_path, model, optimizers, step=1)
    with pytest.raises(ValueError, match="step 1 has a checkpoint already"):
        save_checkpoint(tmp_path, model, optimizers, step=1)

    wider, wider_optimizers = _trained(ModelConfig(32, 8, 1, 2, d_model=16, d_ff=32))
    with pytest.raises(ValueError, match=r"holds another model than config\.model: d_ff 24 against 32"):
        load_checkpoint(path, wider, wider_optimizers)
    with pytest.raises(ValueError, match="holds 2 optimizers, expected 1: is optimizer another one"):
        load_checkpoint(path, *_trained(optimizer="adamw"))
