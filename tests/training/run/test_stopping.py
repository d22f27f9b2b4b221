"""What ends a run before its end leaves checkpoints whole, and one sentence."""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
import re
import signal
import time

import pytest
import torch
from rich.console import Console

from rooflight.model import estimate
from rooflight.training import graph, learner, loop
from rooflight.training.checkpoint import list_checkpoints, load_model, saving
from rooflight.training.loop import train
from rooflight.training.run.stopping import (
    STOPPING,
    StopSignals,
    TrainingDiverged,
    TrainingFailed,
    check_memory,
    predicted_step,
    what_fits,
)
from support.runs import after, assert_equal, log_of, weights_of


@pytest.fixture(scope="module")
def whole_run() -> dict:
    return {}


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_saves_and_the_run_resumes(config, quiet, tmp_path, monkeypatch, number, whole_run):
    if not whole_run:  # once for the three
        whole_run.update(weights_of(train(config, console=quiet)))
    cut = dataclasses.replace(config, out_dir=tmp_path / "cut")
    before = signal.signal(number, signal.default_int_handler)  # these tests may run under nohup
    handlers = [signal.getsignal(n) for n in STOPPING]
    with monkeypatch.context() as patch:
        kill = after(12, graph.clip_grad_norm, lambda: os.kill(os.getpid(), number))
        patch.setattr(graph, "clip_grad_norm", kill)
        result = train(cut, console=quiet)
    assert (result.stopped, result.signal, result.step) == ("interrupted", number, 13)  # the step in hand is finished
    assert result.checkpoint.name == "step-00000013"
    assert result.val_loss == result.first_val_loss  # no time is spent on another validation
    assert [signal.getsignal(n) for n in STOPPING] == handlers
    signal.signal(number, before)
    resumed = train(dataclasses.replace(cut, resume=True), console=quiet)
    assert resumed.stopped == "steps"
    assert_equal(whole_run, weights_of(resumed))


def test_an_ignored_hang_up_stays_ignored():
    """nohup asks for that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_aborts(config, quiet, monkeypatch):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(graph, "clip_grad_norm", after(3, graph.clip_grad_norm, interrupt_twice))
    with pytest.raises(KeyboardInterrupt):
        train(config, console=quiet)
    assert list_checkpoints(config.out_dir / "checkpoints") == []


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_spoils_no_checkpoint(config, quiet, monkeypatch, what):
    """An error at the record of step 35, and step 20's checkpoint stays.

    The loss is infinite from step 31 on; the gradient from step 35 on, whose own loss is still finite.
    """
    healthy = 30 if what == "loss" else 34

    class Model(learner.Transformer):
        calls = 0

        def forward(self, tokens, targets):
            loss = super().forward(tokens, targets)
            if torch.is_grad_enabled():
                Model.calls += 1
            if Model.calls > healthy:
                # sqrt at 0: a finite loss whose gradient is infinite
                return loss * math.inf if what == "loss" else loss + (self.norm.weight[0] * 0).sqrt()
            return loss

    monkeypatch.setattr(learner, "Transformer", Model)
    with pytest.raises(TrainingDiverged, match=r"by step 35, .*; the last checkpoint is .*step-00000020"):
        train(config, console=quiet)
    assert [p.name for p in list_checkpoints(config.out_dir / "checkpoints")] == ["step-00000020"]
    assert all(torch.isfinite(w).all() for w in load_model(config.out_dir).state_dict().values())
    assert all(math.isfinite(r["loss"]) for r in log_of(config)[1:])


def test_ids_past_the_vocabulary_end_the_run(config, quiet, write_tokens):
    data = write_tokens([99] * 1000, "lying.bin")
    with pytest.raises(ValueError, match=r"lying\.bin: token \d+ is 99, and the model's vocab_size 32"):
        train(dataclasses.replace(config, train_data=data, val_data=None), console=quiet)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_ends_the_run_with_its_last_checkpoint(config, quiet, monkeypatch, background):
    """The log may be what does not fit, too; the same command with resume goes on."""
    config = dataclasses.replace(config, async_checkpoints=background)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", after(1, torch.save, full))
        with pytest.raises(
            TrainingFailed, match=r"step-00000040: .*No space left.*; the last checkpoint is .*-00000020"
        ):
            train(config, console=quiet)
    assert [p.name for p in (config.out_dir / "checkpoints").iterdir()] == ["step-00000020"]
    assert train(dataclasses.replace(config, resume=True), console=quiet).step == 40


def test_a_second_signal_leaves_the_last_write_alone(config, quiet, monkeypatch):
    """Slurm tells processes, and torchrun tells them again, while a thread still writes what the first asked for."""
    config = dataclasses.replace(config, async_checkpoints=True)
    write, done = saving._write, []

    def slow(*args):
        time.sleep(0.3)  # by now the run only waits
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(write(*args))
        return done[-1]

    monkeypatch.setattr(graph, "clip_grad_norm", after(3, graph.clip_grad_norm, lambda: signal.raise_signal(15)))
    monkeypatch.setattr(saving, "_write", slow)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the run's own handler had gone"))
    try:
        result = train(config, console=quiet)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.stopped, [result.checkpoint]) == ("interrupted", done)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_says_what_fits(config, monkeypatch, error):
    def allocate():
        raise error

    monkeypatch.setattr(graph, "clip_grad_norm", after(3, graph.clip_grad_norm, allocate))
    monkeypatch.setattr(loop, "device_memory", lambda device: 400_000)
    monkeypatch.setattr(loop, "check_memory", lambda *_: None)
    said = io.StringIO()
    with pytest.raises(
        TrainingFailed, match=r"out of memory, of 0\.0 GB: batch_size (\d+) fits \(predicted\)"
    ) as raised:
        train(dataclasses.replace(config, batch_size=1024), console=Console(file=said, width=200))
    fits = int(re.search(r"batch_size (\d+)", str(raised.value))[1])
    n = int(re.search(r"gradient_accumulation (\d+) with batch_size 1024", str(raised.value))[1])
    assert 1 <= 1024 // n <= fits < 1024
    held = [
        estimate(config.model, batch_size=b, dtype="float32", ops="eager", optimizer="muon") for b in (fits, fits + 1)
    ]
    assert held[0].memory.peak <= 400_000 < held[1].memory.peak
    assert "peak memory" in said.getvalue()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_fits_is_said_of_all_processes(config, parallel):
    """As batch_size is: what to write in the file. Of fsdp's processes each holds a part of the moments."""
    config = dataclasses.replace(config, batch_size=4096, gradient_accumulation=2, parallel=parallel, optimizer="adamw")
    alone, shared = predicted_step(config, "eager"), predicted_step(config, "eager", 4)
    assert (alone.batch_size, shared.batch_size, shared.gpus, shared.parallel) == (2048, 512, 4, parallel)
    said = what_fits(config, "eager", 400_000, 4)
    fits, n = (
        int(x) for x in re.match(r"batch_size (\d+) fits .*accumulation (\d+) with batch_size 4096", said).groups()
    )
    assert fits % 4 == 0
    held = [
        estimate(config.model, batch_size=b, dtype="float32", ops="eager", gpus=4, parallel=parallel).memory.peak
        for b in (4096 // (4 * n), fits // 4, fits // 4 + 1)
    ]
    assert held[0] <= held[1] <= 400_000 < held[2]
    with pytest.raises(ValueError, match=rf"batch_size 4096 needs .*: batch_size {fits} fits"):
        check_memory(config, "eager", 400_000, 4)
    muon = dataclasses.replace(config, optimizer="muon")
    assert predicted_step(muon, "eager", 4).optimizer == "muon"
    assert predicted_step(muon, "eager", 4).memory.optimizer < shared.memory.optimizer
    # a checkpoint's copy stands beside the step
    config = dataclasses.replace(config, batch_size=fits, gradient_accumulation=1)
    copied = dataclasses.replace(config, async_checkpoints=True)
    least = shared.memory.parameters + shared.memory.optimizer + 400_000
    check_memory(config, "eager", 500_000, 4)
    with pytest.raises(ValueError, match=rf"batch_size {fits} needs .*: batch_size \d+ fits"):
        check_memory(copied, "eager", least - 20_000, 4)
    check_memory(copied, "eager", least + 100_000, 4)
