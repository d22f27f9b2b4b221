"""Records beside the log: TensorBoard and Weights & Biases, and what is said where they are not installed.

Neither is a dependency, so that their stand-ins here take the calls that the real ones were seen to take
(tensorboard 2.21.0, wandb 0.31.0).
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rooflight.training.config import TrainConfig
from rooflight.training.loop import train
from rooflight.training.run.progress import RunLog
from rooflight.training.run.stopping import TrainingFailed


@pytest.fixture
def config(config: TrainConfig, write_tokens) -> TrainConfig:
    tokens = write_tokens(list(range(32)) * 9)
    steps = {"max_steps": 4, "log_every": 1, "checkpoint_every": 2}
    return dataclasses.replace(config, train_data=tokens, val_data=None, batch_size=2, **steps)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="somewhere")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("option", [{"tensorboard": True}, {"wandb": "project"}])
def test_what_is_not_installed_is_said_before_anything_is_written(config, monkeypatch, tmp_path, option):
    (name,) = option
    monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / name).mkdir()  # wandb's own folder in the working directory is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        ValueError, match=rf"{name} needs the package {name}, which is not installed: pip install {name}"
    ):
        train(dataclasses.replace(config, **option), console=Console(file=io.StringIO()))
    assert not config.out_dir.exists()


def test_a_log_goes_on_in_a_line_of_its_own_where_a_crash_took_an_end(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}')
    again = RunLog(log, keep_to=2)
    again.write({"step": 3})
    again.close(failed=False)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_tensorboard_gets_every_number(config, monkeypatch):
    scalars: dict[tuple[str, int], float] = {}
    opened = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None) -> None:
            opened.append((log_dir, purge_step))

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            scalars[tag, global_step] = scalar_value

        def flush(self) -> None: ...

        def close(self) -> None:
            opened.append("closed")

    _module(monkeypatch, "tensorboard")
    _module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    config = dataclasses.replace(config, tensorboard=True)
    result = train(config, console=Console(file=io.StringIO()))
    assert scalars["loss", 4] == result.train_loss
    assert scalars["tokens", 3] == 3 * 2 * 8
    assert {tag for tag, _ in scalars} >= {"loss", "grad_norm", "lr", "tokens_per_second", "mfu"}
    train(dataclasses.replace(config, resume=True, max_steps=5), console=Console(file=io.StringIO()))
    folder = str(config.out_dir / "tensorboard")
    assert opened == [(folder, None), "closed", (folder, 5), "closed"]


def test_wandb_goes_on_in_its_run(config, monkeypatch):
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        id = "abc"

        def log(self, data: dict[str, float], step: int) -> None:
            logged.append((step, data))

        def finish(self, exit_code: int) -> None:
            logged.append((-1 - exit_code, {}))

    _module(monkeypatch, "wandb", init=lambda **options: begun.append(options) or Run())
    config = dataclasses.replace(config, wandb="project")
    result = train(config, console=Console(file=io.StringIO()))
    assert [step for step, _ in logged] == [1, 2, 3, 4, -1]
    assert logged[3][1]["loss"] == result.train_loss
    train(dataclasses.replace(config, resume=True, max_steps=5), console=Console(file=io.StringIO()))
    assert [options["id"] for options in begun] == [None, "abc"]
    for options in begun:
        assert (options["project"], options["dir"], options["resume"]) == ("project", str(config.out_dir), "allow")
        assert TrainConfig.from_dict(options["config"]).lr == config.lr
    assert Path(config.out_dir, "wandb.id").read_text() == "abc\n"

    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(TrainingFailed):
        train(dataclasses.replace(config, resume=True, max_steps=6), console=Console(file=io.StringIO()))
    assert logged[-1][0] == -2  # a run that failed


def test_wandb_that_cannot_begin_is_one_sentence(config, monkeypatch):
    def init(**_):
        raise RuntimeError("no key")

    _module(monkeypatch, "wandb", init=init)
    with pytest.raises(ValueError, match="wandb could not begin a run of project 'p': no key"):
        train(dataclasses.replace(config, wandb="p"), console=Console(file=io.StringIO()))
