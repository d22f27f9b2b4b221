from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
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
from rooflight.training.loop import TrainingDiverged, train
from support.recorder import Recorder

MODEL = ModelConfig(32, 8, 1, 2, d_model=16, d_ff=24)


@pytest.fixture
def config(write_tokens, tmp_path) -> TrainConfig:
    """A text that a model can learn: each token is followed by its triple, or a random one in ten cases."""
    rng = np.random.default_rng(0)
    ids = [1]
    for noise, jump in zip(rng.random(4000), rng.integers(0, 32, 4000), strict=True):
        ids.append(int(jump) if noise < 0.1 else 3 * ids[-1] % 32)
    return TrainConfig(
        model=MODEL,
        train_data=write_tokens(ids[:3500], "train.bin"),
        val_data=write_tokens(ids[3500:], "val.bin"),
        out_dir=tmp_path / "run",
        batch_size=8,
        max_steps=40,
        eval_every=20,
        checkpoint_every=20,
        log_every=5,
        dtype="float32",
        device="cpu",
        kernels="eager",
        peak_flops=1e9,
    )


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())


def _log(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in (config.out_dir / "log.jsonl").read_text().splitlines()]


def _weights(result: loop.TrainResult) -> dict[str, torch.Tensor]:
    return load_model(result.checkpoint).state_dict()


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


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
    records = _log(config)
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
    recorder = Recorder()
    monkeypatch.setattr(loop, "_graphs", lambda config, device: recorder)
    graphed = dataclasses.replace(config, out_dir=tmp_path / "graphed")
    result = train(graphed, console=quiet)
    torch.testing.assert_close(_weights(result), _weights(plain), rtol=0, atol=1e-5)
    assert recorder.captures == accumulation + 1
    timeless = {"elapsed", "tokens_per_second", "mfu"}
    for a, b in zip(_log(config), _log(graphed), strict=True):
        assert {k: v for k, v in a.items() if k not in timeless} == pytest.approx(
            {k: v for k, v in b.items() if k not in timeless}, rel=1e-5
        )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_bitwise_the_same_run(config, quiet, tmp_path, optimizer, monkeypatch):
    """40 steps at once, and 40 steps cut off in the 27th: the same weights, bit for bit, and the same log."""
    config = dataclasses.replace(config, optimizer=optimizer)
    whole = train(config, console=quiet)
    cut = dataclasses.replace(config, out_dir=tmp_path / "cut", resume=True)  # resume: from nothing, too
    with monkeypatch.context() as patch:
        patch.setattr(graph, "clip_grad_norm", _after(26, graph.clip_grad_norm, _crash))
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut, console=quiet)
    assert _log(cut)[-1]["step"] == 25  # past the checkpoint: resuming must drop it
    resumed = train(cut, console=quiet)
    _assert_equal(_weights(whole), _weights(resumed))
    for name in ("step", "val_loss", "first_val_loss", "train_loss"):
        assert getattr(whole, name) == getattr(resumed, name)
    timed = ("elapsed", "tokens_per_second", "mfu")
    logs = [[{k: r[k] for k in r if k not in timed} for r in _log(c)] for c in (config, cut)]
    assert logs[0] == logs[1]
    states = [torch.load(r.checkpoint / "state.pt", weights_only=True)["optimizers"] for r in (whole, resumed)]
    for a, b in zip(*states, strict=True):
        for key, values in a["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][key][k])) for k, v in values.items())


def _crash():
    raise RuntimeError("power cut")


def _after(calls: int, function, act):
    """`function`, which calls `act` first in its call number `calls` (from 0)."""
    count = iter(range(10**9))

    def wrapped(*args):
        if next(count) == calls:
            act()
        return function(*args)

    return wrapped


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
    norms = [_log(c)[-1]["grad_norm"] for c in (config, dataclasses.replace(config, out_dir=tmp_path / "four"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_time_ends_a_run_and_its_schedule(config, quiet, monkeypatch):
    """A clock that advances a second at each look: max_steps is far, and the rate still decays to nothing."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    result = train(dataclasses.replace(config, max_steps=10**6, max_seconds=200.0, log_every=1), console=quiet)
    assert result.stopped == "time"
    assert 0 < result.step < 200
    assert result.val_loss is not None
    rates = [r["lr"] / config.lr for r in _log(config)[1:]]
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
    _assert_equal(_weights(compiled), _weights(plain))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes(config, quiet, tmp_path, monkeypatch, number):
    whole = train(config, console=quiet)
    cut = dataclasses.replace(config, out_dir=tmp_path / "cut")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(graph, "clip_grad_norm", _after(12, graph.clip_grad_norm, lambda: os.kill(os.getpid(), number)))
        result = train(cut, console=quiet)
    assert (result.stopped, result.step) == ("interrupted", 13)  # the step in hand is finished
    assert result.checkpoint.name == "step-00000013"
    assert result.val_loss == result.first_val_loss  # no time is spent on another validation
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = train(dataclasses.replace(cut, resume=True), console=quiet)
    assert resumed.stopped == "steps"
    _assert_equal(_weights(whole), _weights(resumed))


def test_a_second_ctrl_c_aborts(config, quiet, monkeypatch):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(graph, "clip_grad_norm", _after(3, graph.clip_grad_norm, interrupt_twice))
    with pytest.raises(KeyboardInterrupt):
        train(config, console=quiet)
    assert list_checkpoints(config.out_dir / "checkpoints") == []


def test_trains_outside_the_main_thread(config, quiet):
    """Where Python allows no signal handlers."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, console=quiet)))
    thread.start()
    thread.join()
    assert results[0].stopped == "steps"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_spoils_no_checkpoint(config, quiet, monkeypatch, what):
    """An error at the record of step 35, and step 20's checkpoint stays.

    The loss is infinite from step 31 on; the gradient from step 35 on, whose own loss is still finite.
    """
    healthy = 30 if what == "loss" else 34

    class Model(loop.Transformer):
        calls = 0

        def forward(self, tokens, targets):
            loss = super().forward(tokens, targets)
            if torch.is_grad_enabled():
                Model.calls += 1
            if Model.calls > healthy:
                # sqrt at 0: a finite loss whose gradient is infinite
                return loss * math.inf if what == "loss" else loss + (self.norm.weight[0] * 0).sqrt()
            return loss

    monkeypatch.setattr(loop, "Transformer", Model)
    with pytest.raises(TrainingDiverged, match=r"by step 35, .*; the last checkpoint is .*step-00000020"):
        train(config, console=quiet)
    assert [p.name for p in list_checkpoints(config.out_dir / "checkpoints")] == ["step-00000020"]
    assert all(torch.isfinite(w).all() for w in load_model(config.out_dir).state_dict().values())
    assert all(math.isfinite(r["loss"]) for r in _log(config)[1:])


def test_without_validation(config, quiet):
    result = train(dataclasses.replace(config, val_data=None), console=quiet)
    assert (result.val_loss, result.first_val_loss, result.val_bits_per_byte) == (None, None, None)
    assert not any("val_loss" in r for r in _log(config))


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
