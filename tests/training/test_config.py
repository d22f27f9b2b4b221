from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rooflight.model import PRESETS, ModelConfig
from rooflight.training.config import MAY_CHANGE, TrainConfig

MODEL = ModelConfig(32, 8, 1, 2, d_model=16)


def _config(**options: object) -> TrainConfig:
    return TrainConfig(**({"model": MODEL, "train_data": "a.bin", "out_dir": "run"} | options))


def test_paths_and_betas_are_normalised():
    config = _config(val_data="b.bin", betas=[0.8, 0.9])
    assert (config.train_data, config.val_data, config.out_dir) == (Path("a.bin"), Path("b.bin"), Path("run"))
    assert config.betas == (0.8, 0.9)


@pytest.mark.parametrize("data", ["a.bin", ["a.bin", "b"], {"a.bin": 2, "b": 0.5}])
def test_plain_values_round_trip(data):
    config = _config(train_data=data, val_data="b.bin", max_seconds=3, grad_clip=None, optimizer="adamw")
    assert config.to_dict()["train_data"] == data
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'train_data = "a.bin"\nout_dir = "run"\nlr = 0.01\nmax_steps = 5\n[model]\npreset = "tiny"\nn_layer = 2\n'
    )
    config = TrainConfig.from_toml(path, max_steps=7, seed=None)
    assert (config.lr, config.max_steps, config.seed) == (0.01, 7, 0)
    assert config.model == dataclasses.replace(PRESETS["tiny"], n_layer=2)

    path.write_text(
        'train_data = "a.bin"\nout_dir = "run"\n'
        "model = {vocab_size = 32, context_length = 8, n_layer = 1, n_head = 2, d_model = 16}\n"
    )
    assert TrainConfig.from_toml(path).model == MODEL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "is not TOML"),
        ("learning_rate = 1.0", "unknown training options: learning_rate; expected some of model, train_data,"),
        ("batchsize = 1", "unknown training options: batchsize; did you mean 'batch_size'"),
        ('train_data = "a.bin"', "missing training options: model, out_dir"),
        ('train_data = "a.bin"\nout_dir = "r"\nmodel = {preset = "tinny"}', "no preset 'tinny'"),
        ('train_data = "a.bin"\nout_dir = "r"\nmodel = {preset = "tiny", layers = 2}', "layers: not a field"),
        (
            'train_data = "a.bin"\nout_dir = "r"\nmodel = "tiny"',
            "model must be a ModelConfig, got str; in TOML, a table",
        ),
    ],
)
def test_toml_refuses(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_toml(path)


def test_missing_toml(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training configuration at .*absent\.toml"):
        TrainConfig.from_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number, got 2.0"),
        ({"batch_size": 6, "gradient_accumulation": 4}, "must be a divisor of batch_size 6, got 4"),
        ({"eval_batches": 0}, "eval_batches must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"muon_lr": float("nan")}, "muon_lr must be positive and finite, got nan"),
        ({"muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\), got 1.0"),
        ({"max_seconds": -1.0}, "max_seconds must be positive and finite, got -1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be positive and finite, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": -1}, "seed must be at least 0 and below 2\\^64, got -1"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
        ({"resume": True, "overwrite": True}, "overwrite must be false where resume is true, got True"),
        ({"compile": 1}, "compile must be true or false, got 1"),
        ({"optimizer": "sgd"}, "optimizer must be one of muon, adamw, got 'sgd'"),
        ({"dtype": "float16"}, "dtype float16 would need loss scaling to train; use bfloat16"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
        ({"kernels": "cuda"}, "kernels must be one of auto, triton, eager, got 'cuda'"),
        ({"parallel": "tp"}, "parallel must be one of none, ddp, fsdp, got 'tp'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, trapezoid, constant, got 'linear'"),
        ({"warmup": 1.5}, r"warmup must be in \[0, 1\], got 1.5"),
        ({"train_data": None}, "train_data must be a path, a list of paths or a table of paths and weights, got None"),
        ({"train_data": []}, "train_data must be a path, a list of paths or"),
        ({"train_data": ""}, "train_data must be a path, a list of paths or .*, got ''"),  # not the current folder
        ({"train_data": {"": 1.0}}, "train_data must be a table of paths and their weights"),
        ({"out_dir": ""}, "out_dir must be a path, got ''"),
        ({"train_data": ["a.bin", 3]}, "train_data must be a path, a list of paths or"),
        ({"train_data": {}}, "train_data must be a table of paths and their weights, positive and finite, got {}"),
        ({"train_data": {"a.bin": 0}}, "train_data must be a table of paths and their weights, positive and finite"),
        ({"train_data": {"a.bin": True}}, "train_data must be a table of paths and their weights"),
        ({"order": "sorted"}, "order must be one of random, epochs, got 'sorted'"),
        ({"eod": -1}, "eod must be an id, at least 0, got -1"),
        ({"model": "tiny"}, "model must be a ModelConfig, got str; in TOML, a table"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        _config(**options)


def test_what_a_resumed_run_may_change():
    """Every option is either in the list or refused, by its name."""
    began = _config(val_data="v.bin")
    others: dict[str, object] = {
        "model": dataclasses.replace(MODEL, n_layer=2), "optimizer": "adamw", "seed": 1,
        "train_data": "b.bin", "val_data": None, "out_dir": "other", "batch_size": 64, "gradient_accumulation": 2,
        "max_steps": 5, "max_seconds": 1.0, "lr": 0.1, "muon_lr": 0.1, "muon_momentum": 0.5, "betas": (0.5, 0.5),
        "weight_decay": 0.5, "schedule": "cosine", "warmup": 0.5, "decay": 0.25, "min_lr_ratio": 0.1, "grad_clip": None,
        "eval_every": 1, "eval_batches": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "async_checkpoints": True,
        "log_every": 1,
        "tensorboard": True, "wandb": "p", "dtype": "float32", "device": "cpu", "compile": True, "checkpointing": True,
        "kernels": "eager", "peak_flops": 1.0, "resume": True, "overwrite": True, "cuda_graph": False, "init_from": "m",
        "parallel": "ddp", "reshard": False, "order": "epochs", "documents": True, "eod": 1, "fp8": True,
    }  # fmt: skip
    assert others.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    refused = set()
    for name, value in others.items():
        now = dataclasses.replace(began, **{name: value})
        if name in MAY_CHANGE:
            assert list(now.changes_since(began.to_dict())) == [name]
            continue
        refused.add(name)
        with pytest.raises(ValueError, match=f"{name} must stay"):
            now.changes_since(began.to_dict())
    assert refused == {"model", "optimizer", "seed", "order", "documents", "eod"}
    # a checkpoint of before an option was there
    assert began.changes_since({k: v for k, v in began.to_dict().items() if k != "seed"}) == {}
