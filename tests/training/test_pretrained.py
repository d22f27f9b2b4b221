"""Training that begins with the weights of another model, and the one door for both kinds of folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer, save_hf
from rooflight.training.checkpoint import load_model, save_checkpoint
from rooflight.training.config import TrainConfig
from rooflight.training.loop import train
from rooflight.training.pretrained import open_model

SMALL = ModelConfig(32, 16, 1, 2, d_model=16, d_ff=16, qkv_bias=True)


@pytest.fixture
def given(tmp_path: Path) -> Transformer:
    torch.manual_seed(7)
    model = Transformer(SMALL, reference)
    save_hf(model, tmp_path / "hf")
    save_checkpoint(tmp_path / "run" / "checkpoints", model, [], step=5)
    return model


def _options(tmp_path: Path, tokens: Path, folder: str, **fields: object) -> dict:
    return {
        "train_data": tokens, "out_dir": tmp_path / "new", "init_from": tmp_path / folder, "batch_size": 2,
        "max_steps": 1, "lr": 1e-9, "muon_lr": 1e-9, "weight_decay": 0.0, "dtype": "float32", "device": "cpu",
        "kernels": "eager", "peak_flops": 1e9, **fields,
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["hf", "run"])
def test_a_run_begins_with_the_weights_of_another(
    folder: str, given: Transformer, tmp_path: Path, write_tokens
) -> None:
    tokens = write_tokens(np.arange(200) % 32)
    options = _options(tmp_path, tokens, folder, model={"context_length": 8})
    config = TrainConfig.from_dict(options)
    assert config.model == replace(SMALL, context_length=8)
    train(config, console=Console(quiet=True))
    trained = load_model(tmp_path / "new", ops=reference)
    assert trained.config.context_length == 8
    for a, b in zip(trained.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # a resumed run goes on from its own
    (tmp_path / folder).rename(tmp_path / "gone")
    train(replace(config, resume=True, max_steps=2), console=Console(quiet=True))


def test_another_model_is_refused(given: Transformer, tmp_path: Path, write_tokens) -> None:
    options = _options(tmp_path, write_tokens(np.arange(200) % 32), "hf", model={"d_ff": 24})
    with pytest.raises(ValueError, match="holds another model: d_ff 16 there, 24 here"):
        train(TrainConfig.from_dict(options), console=Console(quiet=True))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        TrainConfig.from_dict(options | {"init_from": tmp_path / "nowhere", "model": None})


def test_a_model_that_is_not_there_leaves_the_folder_alone(given: Transformer, tmp_path: Path, write_tokens) -> None:
    tokens = write_tokens(np.arange(200) % 32)
    options = _options(tmp_path, tokens, "nowhere", model=SMALL.to_dict() | {"preset": "tiny"}, overwrite=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"init_from: no checkpoint at .*nowhere"):
        train(TrainConfig.from_dict(options), console=Console(quiet=True))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("folder", ["hf", "run"])
def test_one_door(folder: str, given: Transformer, tmp_path: Path) -> None:
    opened = open_model(tmp_path / folder, ops=reference)
    assert not opened.training
    assert opened.config == SMALL
    assert torch.equal(opened.output_weight, given.output_weight)
