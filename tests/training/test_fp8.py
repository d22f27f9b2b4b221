"""Training with products in fp8: as good a run, the same run when it is resumed or replayed as a graph."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from rooflight.kernels import fp8
from rooflight.model import ModelConfig, Transformer
from rooflight.model.layers import use_fp8
from rooflight.training import graph
from rooflight.training.learner import Learner
from rooflight.training.loop import train
from rooflight.training.run.stopping import TrainingDiverged
from support.recorder import Recorder
from support.runs import after, assert_equal, assert_graphs_make, crash, log_of, weights_of

DEVICE = torch.device("cpu")
MODEL = ModelConfig(32, 8, 1, 2, d_model=16, d_ff=32)
MATRICES = "attention.qkv_proj, attention.o_proj, ffn.gate_up_proj, ffn.down_proj"


@pytest.fixture
def config(config):
    return dataclasses.replace(config, model=MODEL, fp8=True)


def test_it_learns_what_the_plain_run_learns(config, tmp_path):
    said = io.StringIO()
    low = train(config, console=Console(file=said, width=200))
    assert f"products in fp8, in each block: {MATRICES}\n" in said.getvalue()
    plain_config = dataclasses.replace(config, fp8=False, out_dir=tmp_path / "plain")
    plain = train(plain_config, console=Console(file=io.StringIO()))
    first = log_of(config)[0]["val_loss"]
    assert first == log_of(plain_config)[0]["val_loss"]  # validation has the plain products, and no step was taken yet
    assert low.train_loss != plain.train_loss
    assert abs(low.val_loss - plain.val_loss) < 0.1 * (first - plain.val_loss)
    # the checkpoints are the plain run's, but for the numbers
    a, b = (weights_of(result) for result in (low, plain))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bitwise_the_same_run(config, quiet, tmp_path, dtype, monkeypatch):
    config = dataclasses.replace(config, dtype=dtype, gradient_accumulation=2)
    whole = train(config, console=quiet)
    cut = dataclasses.replace(config, out_dir=tmp_path / "cut", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(graph, "clip_grad_norm", after(26, graph.clip_grad_norm, crash))
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut, console=quiet)
    resumed = train(cut, console=quiet)
    assert_equal(weights_of(whole), weights_of(resumed))
    assert whole.train_loss == resumed.train_loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_of_graphs_is_the_same_run(config, quiet, tmp_path, accumulation, monkeypatch):
    """Scales are found anew in every replay, and nothing in the step asks the device for a number."""
    config = dataclasses.replace(config, gradient_accumulation=accumulation, max_steps=10)
    plain = train(config, console=quiet)
    said = io.StringIO()
    graphed = dataclasses.replace(config, out_dir=tmp_path / "graphed")
    assert_graphs_make(plain, graphed, Console(file=said), monkeypatch)
    assert "without a CUDA graph" not in said.getvalue()


def test_the_kernels_step_is_captured_too(device):
    """The operators, whose outputs are in fp8, as a graph sees them: bit for bit the step that is not captured."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = Transformer(MODEL).to(device)
        use_fp8(model.layers, fp8.fp8_linear)
        tokens = torch.randint(32, (4, 9), device=device)
        graphs = graph.CudaGraphs(device) if device.type == "cuda" else Recorder()

        def step(inputs, targets, model=model):
            loss = model(inputs, targets)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            for p in model.parameters():
                p.grad = None
            return [loss.detach(), *gradients]

        run = graph.Captured(step, graphs, warmup=1, failed=pytest.fail) if captured else step
        for i in range(3):
            found = run((tokens[:, :-1] + i) % 32, tokens[:, 1:])
        results.append([x.clone() for x in found])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_recomputes_the_same_products(config):
    gradients = []
    for checkpointing in (False, True):
        model = Learner(dataclasses.replace(config, checkpointing=checkpointing), DEVICE, say=lambda text: None).model
        tokens = torch.arange(64).view(8, 8) % 32
        model(tokens, tokens).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_weight_that_is_not_finite_ends_the_run(config, quiet, monkeypatch):
    begin = Learner._begin

    def spoilt(self):
        begin(self)
        with torch.no_grad():
            self.model.layers[0].ffn.down_proj.weight[3, 5] = torch.inf

    monkeypatch.setattr(Learner, "_begin", spoilt)
    with pytest.raises(TrainingDiverged, match="loss nan"):
        train(dataclasses.replace(config, val_data=None), console=quiet)


def test_what_does_not_fit_is_left_out_by_name(config):
    said: list[str] = []
    model = dataclasses.replace(MODEL, d_ff=24)
    Learner(dataclasses.replace(config, model=model), DEVICE, say=said.append)
    assert said == [
        "products in fp8, in each block: attention.qkv_proj, attention.o_proj, ffn.gate_up_proj; "
        "not ffn.down_proj (16 x 24), whose sides are no multiples of 16"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": "ddp"}, 'fp8 must be false unless parallel is "none", got True'),
        ({"parallel": "fsdp"}, 'fp8 must be false unless parallel is "none", got True'),
        ({"batch_size": 6, "gradient_accumulation": 2}, "fp8 must be false unless .* 16 tokens, of which it has 24"),
        ({"fp8": 1}, "fp8 must be true or false, got 1"),
    ],
)
def test_bad_configurations(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_a_gpu_without_fp8_is_refused_before_the_first_step(config, monkeypatch):
    monkeypatch.setattr(fp8, "refusal", lambda device: "expected a GPU of compute capability 8.9 or later, got another")
    with pytest.raises(ValueError, match=r"fp8: expected a GPU of compute capability 8\.9 or later, got another"):
        Learner(dataclasses.replace(config, kernels="triton"), DEVICE, say=lambda text: None)


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_the_compiled_model_is_the_same(config):
    torch._dynamo.reset()
    model = Learner(config, DEVICE, say=lambda text: None).model
    tokens = torch.arange(64).view(8, 8) % 32
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))


def test_a_resumed_run_may_go_on_without(config, quiet):
    """Nothing in a checkpoint knows of it but the run's own record."""
    short = dataclasses.replace(config, max_steps=2)
    train(short, console=quiet)
    assert json.loads((config.out_dir / "config.json").read_text())["fp8"] is True
    said = io.StringIO()
    train(dataclasses.replace(short, max_steps=3, fp8=False, resume=True), console=Console(file=said, width=200))
    assert "fp8 False, was True" in said.getvalue()
    assert "products in fp8" not in said.getvalue()
