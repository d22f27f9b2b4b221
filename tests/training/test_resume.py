"""A resumed run is the run that it goes on from, or says what is another."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from rooflight.training import meeting
from rooflight.training.checkpoint import load_model
from rooflight.training.loop import train
from support.runs import log_of, weights_of
from support.saving import go_on, run


def test_resume_passes_over_a_damaged_checkpoint(config, tmp_path):
    """And comes to the weights that it would have had without."""
    whole = train(config, console=Console(file=io.StringIO()))
    last = config.out_dir / "checkpoints" / "step-00000040"
    content = bytearray((last / "state.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (last / "state.pt").write_bytes(content)
    (last.parent / "step-00000099").mkdir()
    said = io.StringIO()
    weights = load_model(last.with_name("step-00000020")).state_dict()
    again = train(dataclasses.replace(config, resume=True), console=Console(file=said))
    assert "warning: checkpoint" in said.getvalue()
    assert f"{last} is damaged: state.pt has other bytes" in said.getvalue()
    assert "set aside as damaged-step-00000099" in said.getvalue()
    assert "going on from step 20" in said.getvalue()
    assert again.checkpoint == last
    assert (again.val_loss, again.tokens) == (whole.val_loss, whole.tokens)
    assert any(not torch.equal(weights[k], v) for k, v in weights_of(again).items())
    assert {p.name for p in last.parent.iterdir()} == {
        "step-00000020", "step-00000040", "damaged-step-00000040", "damaged-step-00000099",
    }  # fmt: skip


def test_resume_counts_tokens_and_says_what_is_another(config, write_tokens):
    said = io.StringIO()
    train(dataclasses.replace(config, max_steps=20), console=Console(file=said))
    more = dataclasses.replace(config, resume=True, batch_size=4, lr=0.001)
    result = train(more, console=Console(file=said))
    assert result.tokens == 20 * 8 * 8 + 20 * 4 * 8
    assert [r["tokens"] for r in log_of(config)][-1] == result.tokens
    assert "; batch_size 4, was 8; max_steps 40, was 20; lr 0.001, was 0.003" in said.getvalue()
    ids = np.arange(3400) % 32
    for change, message in (
        ({"seed": 1}, "seed must stay 0 as the run began, got 1"),
        (
            {"train_data": write_tokens(ids, "shorter.bin")},
            r"must be the 3,500 tokens that the run began with, .* 3,400",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(more, **change), console=Console(file=said))


def test_a_restart_goes_on_with_its_own_launch_alone(config, quiet, monkeypatch):
    """A launch that was refused an older run's folder does not get it when torchrun tries again."""
    config = dataclasses.replace(config, max_steps=20)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    train(config, console=quiet)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = dataclasses.replace(config, max_steps=40)
    assert train(again, console=quiet).step == 40
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    with pytest.raises(ValueError, match="holds a run already"):
        train(again, console=quiet)
    fresh = train(dataclasses.replace(config, overwrite=True), console=quiet)  # what its first life did not come to
    assert (fresh.step, (config.out_dir / "previous-1").is_dir()) == (20, True)
    assert train(dataclasses.replace(again, overwrite=True), console=quiet).step == 40
    assert not (config.out_dir / "previous-2").exists()


@pytest.fixture
def torchrun(monkeypatch):
    """A launch whose processes have torchrun's store; it counts no restart, as where another machine comes back."""
    store = dist.HashStore()
    monkeypatch.setattr(meeting, "_store", lambda *_: store)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    meeting.started_before.cache_clear()
    yield
    meeting.started_before.cache_clear()


def test_other_processes_of_a_launch_go_on(config, quiet, torchrun):
    config = dataclasses.replace(config, max_steps=2, val_data=None, overwrite=True)
    train(config, console=quiet)
    meeting.started_before.cache_clear()  # as they have none
    assert train(dataclasses.replace(config, max_steps=3), console=quiet).step == 3
    assert not (config.out_dir / "previous-1").exists()


def test_a_second_run_of_the_same_processes_is_no_restart(config, quiet, torchrun):
    config = dataclasses.replace(config, max_steps=2, val_data=None)
    train(config, console=quiet)
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, console=quiet)
    train(dataclasses.replace(config, overwrite=True), console=quiet)
    assert (config.out_dir / "previous-1").is_dir()


@pytest.mark.cpu
def test_a_run_goes_on_with_other_numbers_of_processes(config, tmp_path):
    """Two that share the parameters, then one, then three that each have all: the run of one, up to rounding.

    That a checkpoint itself is read to the bit is tested in checkpoint/test_shards.py.
    """
    config = dataclasses.replace(config, batch_size=6, lr=3e-4, muon_lr=3e-3, schedule="constant", warmup=0.0)
    config = dataclasses.replace(config, log_every=1, eval_every=4, checkpoint_every=3, async_checkpoints=True)
    train(dataclasses.replace(config, out_dir=tmp_path / "one", max_steps=12), console=Console(file=io.StringIO()))
    single = dataclasses.replace(config, out_dir=tmp_path / "one")
    expected = load_model(single.out_dir).state_dict()

    run(2, tmp_path, go_on, dataclasses.replace(config, max_steps=4, parallel="fsdp"))
    assert (config.out_dir / "checkpoints" / "step-00000004" / "shards").is_dir()
    config = dataclasses.replace(config, resume=True)
    train(dataclasses.replace(config, max_steps=8), console=Console(file=io.StringIO()))
    assert not (config.out_dir / "checkpoints" / "step-00000008" / "shards").exists()
    run(3, tmp_path, go_on, dataclasses.replace(config, max_steps=12, parallel="ddp"))
    for name in ("step", "loss", "grad_norm", "val_loss", "tokens"):
        found, theirs = ([r.get(name, 0) for r in log_of(c)] for c in (config, single))
        assert found == pytest.approx(theirs, rel=2e-6), name
    found = load_model(config.out_dir).state_dict()
    assert max(((found[n] - x).norm() / x.norm()).item() for n, x in expected.items()) < 3e-6
