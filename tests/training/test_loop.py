from __future__ import annotations

import dataclasses
import io
import json
import math
import threading

import numpy as np
import pytest
import torch
from rich.console import Console

from rooflight.kernels import dispatch
from rooflight.model import ModelConfig, estimate
from rooflight.training import graph, loop
from rooflight.training.checkpoint import list_checkpoints, load_model
from rooflight.training.config import TrainConfig
from rooflight.training.loop import train
from support.runs import after, assert_equal, assert_graphs_make, crash, log_of, weights_of

MODEL = ModelConfig(32, 8, 1, 2, d_model=16, d_ff=24)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns(config, quiet, optimizer, dtype):
    result = train(dataclasses.replace(config, optimizer=optimizer, dtype=dtype, lr=0.01), console=quiet)
    assert result.stopped == "steps"
    assert result.step == 40
    assert math.log(32) < result.first_val_loss < 1.3 * math.log(32)  # near uniform over 32 tokens
    assert result.val_loss < 0.7 * result.first_val_loss
    assert result.train_loss < 0.7 * result.first_val_loss


def test_result_and_log(config, quiet):
    result = train(config, console=quiet)
    records = log_of(config)
    assert [r["step"] for r in records] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 20, 40]
    last = records[-1]
    assert last["tokens"] == result.tokens == 40 * 8 * 8
    assert (last["loss"], last["val_loss"]) == (result.train_loss, result.val_loss)
    # the validation file has 2 bytes a token
    assert last["val_bpb"] == result.val_bits_per_byte == pytest.approx(result.val_loss / math.log(2) / 2)
    assert last["elapsed"] <= result.seconds
    assert last["grad_norm"] > 0
    work = estimate(MODEL, batch_size=8)
    per_token = (work.forward_flops + work.backward_flops) / 64
    for figures in (last["tokens_per_second"], last["mfu"]), (result.tokens_per_second, result.mfu):
        assert figures[1] == pytest.approx(figures[0] * per_token / 1e9)
    assert result.step_seconds > 0
    assert result.peak_memory_bytes >= 0
    assert [p.name for p in list_checkpoints(config.out_dir / "checkpoints")] == ["step-00000020", "step-00000040"]
    assert result.checkpoint == config.out_dir / "checkpoints" / "step-00000040"
    assert TrainConfig.from_dict(json.loads((config.out_dir / "config.json").read_text())) == config
    rates = [r["lr"] / config.lr for r in records[1:]]
    assert rates == pytest.approx([config.lr_factor((s - 0.5) / 40) for s in range(5, 45, 5)])
    assert last["muon_lr"] / config.muon_lr == pytest.approx(rates[-1])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_of_graphs_is_the_same_run(config, quiet, tmp_path, accumulation, monkeypatch):
    """Steps and validation, whose last batch is a shorter one; all but the learning rates' rounding to fp32."""
    config = dataclasses.replace(config, gradient_accumulation=accumulation, max_steps=10)
    plain = train(config, console=quiet)
    graphed = dataclasses.replace(config, out_dir=tmp_path / "graphed")
    assert_graphs_make(plain, graphed, quiet, monkeypatch)
    timeless = {"elapsed", "tokens_per_second", "mfu"}
    for a, b in zip(log_of(config), log_of(graphed), strict=True):
        assert {k: v for k, v in a.items() if k not in timeless} == pytest.approx(
            {k: v for k, v in b.items() if k not in timeless}, rel=1e-5
        )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_bitwise_the_same_run(config, quiet, tmp_path, optimizer, monkeypatch):
    """40 steps at once, and 40 steps cut off in the 27th: the same weights, bit for bit, and the same log."""
    config = dataclasses.replace(config, optimizer=optimizer, async_checkpoints=optimizer == "adamw")
    whole = train(config, console=quiet)
    cut = dataclasses.replace(config, out_dir=tmp_path / "cut", resume=True)  # resume: from nothing, too
    with monkeypatch.context() as patch:
        patch.setattr(graph, "clip_grad_norm", after(26, graph.clip_grad_norm, crash))
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut, console=quiet)
    assert log_of(cut)[-1]["step"] == 25  # past the checkpoint: resuming must drop it
    resumed = train(cut, console=quiet)
    assert_equal(weights_of(whole), weights_of(resumed))
    for name in ("step", "val_loss", "first_val_loss", "train_loss"):
        assert getattr(whole, name) == getattr(resumed, name)
    timed = ("elapsed", "tokens_per_second", "mfu")
    logs = [[{k: r[k] for k in r if k not in timed} for r in log_of(c)] for c in (config, cut)]
    assert logs[0] == logs[1]
    states = [torch.load(r.checkpoint / "state.pt", weights_only=True)["optimizers"] for r in (whole, resumed)]
    for a, b in zip(*states, strict=True):
        for key, values in a["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][key][k])) for k, v in values.items())


def test_a_finished_run_resumes_to_itself(config, quiet):
    first = train(config, console=quiet)
    again = train(dataclasses.replace(config, resume=True), console=quiet)
    assert again.checkpoint == first.checkpoint
    for name in ("step", "val_loss", "train_loss", "stopped"):
        assert getattr(again, name) == getattr(first, name)
    assert again.tokens_per_second == pytest.approx(first.tokens_per_second)


def test_gradient_accumulation_changes_nothing_but_rounding(config, quiet, tmp_path):
    config = dataclasses.replace(config, max_steps=1, optimizer="adamw")
    one = train(config, console=quiet)
    four = train(dataclasses.replace(config, gradient_accumulation=4, out_dir=tmp_path / "four"), console=quiet)
    assert four.train_loss == pytest.approx(one.train_loss, rel=1e-6)
    norms = [log_of(c)[-1]["grad_norm"] for c in (config, dataclasses.replace(config, out_dir=tmp_path / "four"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_time_ends_a_run_and_its_schedule(config, quiet, monkeypatch):
    """A clock that advances a second at each look: max_steps is far, and the rate still decays to nothing."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    result = train(dataclasses.replace(config, max_steps=10**6, max_seconds=200.0, log_every=1), console=quiet)
    assert result.stopped == "time"
    assert 0 < result.step < 200
    assert result.val_loss is not None
    rates = [r["lr"] / config.lr for r in log_of(config)[1:]]
    assert max(rates) == 1.0
    assert rates[-1] < 0.1
    assert list_checkpoints(config.out_dir / "checkpoints")[-1] == result.checkpoint

    # seconds count over resumes: nothing is left of 200
    again = train(dataclasses.replace(config, max_steps=10**6, max_seconds=200.0, resume=True), console=quiet)
    assert (again.stopped, again.step) == ("time", result.step)


def test_what_the_compiler_takes_is_no_training_time(config, quiet, tmp_path, monkeypatch):
    """And the call that has it compiled leaves no trace in the run."""
    config = dataclasses.replace(config, max_steps=3)
    plain = train(dataclasses.replace(config, out_dir=tmp_path / "plain"), console=quiet)
    late, perf_counter = [0.0], loop.time.perf_counter
    monkeypatch.setattr(loop.time, "perf_counter", lambda: perf_counter() + late[0])

    def compiler(model):
        def forward(*inputs):
            late[0] = 1000.0  # the first call; validation has the model as it is
            return model(*inputs)

        return forward

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = train(dataclasses.replace(config, compile=True, max_seconds=500.0), console=quiet)
    assert (compiled.stopped, compiled.step) == ("steps", 3)
    assert late[0] > compiled.seconds
    assert_equal(weights_of(compiled), weights_of(plain))


def test_trains_outside_the_main_thread(config, quiet):
    """Where Python allows no signal handlers."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, console=quiet)))
    thread.start()
    thread.join()
    assert results[0].stopped == "steps"


def test_without_validation(config, quiet):
    result = train(dataclasses.replace(config, val_data=None), console=quiet)
    assert (result.val_loss, result.first_val_loss, result.val_bits_per_byte) == (None, None, None)
    assert not any("val_loss" in r for r in log_of(config))


def test_plain_progress(config):
    out = io.StringIO()
    train(config, console=Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert all(line.startswith("step ") for line in lines)  # whole lines, however narrow the console claims to be
    assert "bits per byte" in lines[0]
    assert "tokens/s" in lines[-1]
    assert "MFU" in lines[-1]
    assert "0:00 left" in lines[-1]


def test_progress_bar(config):
    out = io.StringIO()
    train(config, console=Console(file=out, width=120, force_terminal=True))
    assert "100%" in out.getvalue()
    assert "tokens/s" in out.getvalue()


def test_compiled_model_saves_the_same_names(config, quiet, monkeypatch):
    """torch.compile's wrapper must not reach the checkpoint; the eager backend, since inductor takes a minute here."""
    compiled = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile_(model, backend="eager"))
    result = train(dataclasses.replace(config, compile=True, max_steps=2), console=quiet)
    assert len(compiled) == 1
    assert load_model(result.checkpoint).config == MODEL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=31)}, "more than the model's vocab_size of 31"),
        ({"model": dataclasses.replace(MODEL, context_length=4096)}, "context_length 4096 needs at least 4097 tokens"),
        ({"device": "abacus"}, "device must be auto or a torch device, got 'abacus'"),
    ],
)
def test_refuses(config, quiet, change, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, **change), console=quiet)
    assert not config.out_dir.exists()


def test_refuses_what_does_not_fit_together(config, quiet, write_tokens):
    train(config, console=quiet)
    with pytest.raises(ValueError, match="holds a run already: resume it, or choose another"):
        train(config, console=quiet)
    ids = np.arange(3000) % 32
    other = write_tokens(ids, "other.bin", tokenizer_hash="1" * 64)
    with pytest.raises(ValueError, match="come from different tokenizers"):
        train(dataclasses.replace(config, val_data=other, resume=True), console=quiet)
    with pytest.raises(ValueError, match="was trained on tokens of another tokenizer"):
        train(dataclasses.replace(config, train_data=other, val_data=None, resume=True), console=quiet)


def test_triton_needs_a_gpu_or_the_interpreter(config, quiet, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="kernels 'triton' need a CUDA device"):
        train(dataclasses.replace(config, kernels="triton"), console=quiet)
