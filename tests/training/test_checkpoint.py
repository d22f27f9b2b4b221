from __future__ import annotations

import os
import shutil

import pytest
import torch

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer
from rooflight.training import checkpoint
from rooflight.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    save_checkpoint,
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
        owner = {"save_file": checkpoint.safetensors.torch, "save": torch, "rmtree": shutil}.get(moment, os)
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
    assert renamed == [{"model.safetensors", "model.json", "state.pt", ".tmp-step-00000001"}]
    assert tmp_path.name in synced


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
    with pytest.raises(ValueError, match="holds 2 optimizers, expected 1"):
        load_checkpoint(path, *_trained(optimizer="adamw"))
