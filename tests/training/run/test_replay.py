"""A step that is not finite is found, dumped, and computed again from its dump alone."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rooflight.training import graph, learner
from rooflight.training.checkpoint import DamagedCheckpoint, load_extra, load_model
from rooflight.training.commands import app
from rooflight.training.config import TrainConfig
from rooflight.training.data import batch_generator, get_batch, open_tokens
from rooflight.training.loop import train
from rooflight.training.run.replay import replay
from rooflight.training.run.stopping import TrainingDiverged
from support.saving import diverge, run

BAD = 30  # steps done before the one whose loss or gradient is not finite


@pytest.fixture
def config(config: TrainConfig, write_tokens) -> TrainConfig:
    tokens = write_tokens(np.random.default_rng(0).integers(0, 32, 2000))
    return dataclasses.replace(config, train_data=tokens, val_data=None, batch_size=4, log_every=10)


@pytest.fixture
def spoil(config, monkeypatch):
    """Makes a model whose loss, or gradient alone, is not finite on the batch of step BAD, and only there."""
    tokens = open_tokens(config.train_data).tokens
    bad, _ = get_batch(tokens, 4, 8, generator=batch_generator(config.seed, BAD))

    def apply(patch: pytest.MonkeyPatch, what: str) -> None:
        class Model(learner.Transformer):
            def forward(self, inputs, targets):
                loss = super().forward(inputs, targets)
                if torch.equal(inputs, bad):
                    # sqrt at 0: a finite loss whose gradient is infinite
                    return loss * math.inf if what == "loss" else loss + (self.norm.weight[0] * 0).sqrt()
                return loss

        patch.setattr(learner, "Transformer", Model)

    return apply


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("checkpoint_every", [20, 1000])  # from a checkpoint, and from the start
def test_the_step_is_found_and_replayed(config, tmp_path, monkeypatch, spoil, what, checkpoint_every):
    quiet = Console(file=io.StringIO())
    healthy = dataclasses.replace(config, out_dir=tmp_path / "healthy", checkpoint_every=BAD)
    train(healthy, console=quiet)
    dump = config.out_dir / "diverged" / f"step-{BAD:08d}"
    changed = dataclasses.replace(config, async_checkpoints=what == "loss")
    with monkeypatch.context() as patch:
        spoil(patch, what)
        with pytest.raises(TrainingDiverged, match=rf"step {BAD + 1} is the first, which `rooflight replay {dump}`"):
            train(dataclasses.replace(changed, checkpoint_every=checkpoint_every), console=quiet)
        shutil.move(dump, tmp_path / "dump")  # it needs nothing else of the run
        shutil.rmtree(config.out_dir)
        config.train_data.unlink()
        again = replay(tmp_path / "dump")
        assert again.reproduced
        assert (again.step, again.first_module) == (BAD, "loss" if what == "loss" else None)
        assert repr((again.loss, again.grad_norm)) == repr((again.loss_then, again.grad_norm_then))
        assert (again.loss == math.inf) == (what == "loss")
        assert not math.isfinite(again.grad_norm)
        assert "norm.weight" in again.gradients
        result = CliRunner().invoke(app, ["replay", str(tmp_path / "dump")])
        assert result.exit_code == 0
        assert result.stdout.startswith(f"step {BAD + 1}: loss {again.loss} ({again.loss} in the run)")
    # the parameters are those of the run at that step, bit for bit
    ours, theirs = (
        load_model(p).state_dict() for p in (tmp_path / "dump", healthy.out_dir / "checkpoints" / dump.name)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    result = CliRunner().invoke(app, ["replay", str(tmp_path / "dump")])  # by a model without the fault
    assert result.exit_code == 1
    assert "not reproduced: finite this time" in result.stdout


def test_a_module_is_named(config):
    """A rate and a decay far too high: after a step every matrix is infinite."""
    config = dataclasses.replace(config, optimizer="adamw", lr=3e38, weight_decay=1e10, warmup=0.0)
    with pytest.raises(TrainingDiverged):
        train(config, console=Console(file=io.StringIO()))
    again = replay(config.out_dir / "diverged")
    assert again.reproduced
    assert (again.step, again.first_module) == (1, "embedding")
    assert "first output that is not finite: embedding" in again.lines()


@pytest.mark.cpu
def test_one_process_computes_again_what_two_had(config, tmp_path, monkeypatch):
    """The dump of two is in shards and has the batch of both, of which one process holds no more at once than they did.
    Its predecessor, of an earlier run, is removed."""
    config = dataclasses.replace(config, optimizer="adamw", lr=3e38, weight_decay=1e10, warmup=0.0, parallel="fsdp")
    (config.out_dir / "diverged" / "step-00000001").mkdir(parents=True)
    (config.out_dir / "rooflight.json").write_text('{"format": "rooflight-run", "version": 1}')
    first = dataclasses.replace(config, out_dir=tmp_path / "first", lr=1e-3, parallel="none", max_steps=1)
    train(dataclasses.replace(first, weight_decay=0.0), console=Console(file=io.StringIO()))
    config = dataclasses.replace(config, init_from=first.out_dir)
    run(2, tmp_path, diverge, config)
    shutil.rmtree(first.out_dir)  # a dump needs nothing else
    rows = []

    class Step(graph.TrainStep):
        def _run_micro(self, *micro_batch):
            rows.append(len(micro_batch[0]))
            super()._run_micro(*micro_batch)

    monkeypatch.setattr(learner, "TrainStep", Step)
    again = replay(config.out_dir / "diverged")
    assert again.reproduced
    assert rows == [2, 2]
    assert (again.step, again.first_module) == (1, "embedding")
    assert load_extra(config.out_dir / "diverged")["inputs"].shape == (4, 8)


def test_a_step_that_is_finite_again(config, monkeypatch):
    """A fault of the machine: nothing to dump, and said."""
    calls = iter(range(10**9))

    class Model(learner.Transformer):
        def forward(self, inputs, targets):
            loss = super().forward(inputs, targets)
            return loss * math.inf if next(calls) == BAD else loss

    monkeypatch.setattr(learner, "Transformer", Model)
    with pytest.raises(TrainingDiverged, match="run again, every step was finite"):
        train(config, console=Console(file=io.StringIO()))
    assert not (config.out_dir / "diverged").exists()


def test_refuses(config, tmp_path):
    checkpoint = train(dataclasses.replace(config, max_steps=1), console=Console(file=io.StringIO())).checkpoint
    with pytest.raises(ValueError, match="is a checkpoint, and no dump"):
        replay(checkpoint)
    (checkpoint / "state.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint):
        replay(checkpoint)
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "absent")])
    assert isinstance(result.exception, FileNotFoundError)
