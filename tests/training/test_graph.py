"""The step as graphs: on a GPU CUDA's own, on a CPU the recorder's, with the same code around them."""

from __future__ import annotations

import math

import pytest
import torch

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer
from rooflight.training.graph import Captured, CudaGraphs, TrainStep, make_rates_tensors, set_rates
from rooflight.training.optim import build_optimizers
from support.recorder import Recorder

CONFIG = ModelConfig(61, 16, 2, 4, n_kv_head=2, d_model=32, d_ff=48)
LOW = torch.bfloat16


def graphs_on(device: torch.device):
    return CudaGraphs(device) if device.type == "cuda" else Recorder()


class Run:
    """A tiny model's step, with or without graphs; `forwards` counts the calls of the model."""

    def __init__(self, device, graphs, optimizer="adamw", micro_batches=1, forward=None, checkpointing=False) -> None:
        torch.manual_seed(0)
        with device:
            self.model = Transformer(CONFIG, reference, checkpointing=checkpointing)
        self.device, self.forwards, self.said = device, 0, []
        copies = {"copy_dtype": LOW, "low_gradients": micro_batches == 1} if device.type == "cuda" else {}
        self.optimizers = build_optimizers(self.model, optimizer=optimizer, **copies)
        make_rates_tensors(self.optimizers, device)

        def counted(inputs, targets):
            self.forwards += 1
            return (forward or self.model)(inputs, targets)

        self.step = TrainStep(
            counted, self.model.parameters(), self.optimizers, device=device, dtype=LOW, micro_batches=micro_batches,
            max_norm=0.5, graphs=graphs, say=self.said.append,
        )  # fmt: skip

    def __call__(self, steps: int, batch_size: int = 4) -> list[torch.Tensor]:
        """Losses, norms and at last the weights."""
        results = []
        for i in range(steps):
            set_rates(self.optimizers, [[0.01 / (i + 1)] * len(o.param_groups) for o in self.optimizers])
            generator = torch.Generator().manual_seed(i)
            tokens = torch.randint(61, (batch_size, 17), generator=generator).to(self.device)
            results += [x.clone() for x in self.step(tokens[:, :-1], tokens[:, 1:])]
        return [*results, *(p.detach().clone() for p in self.model.parameters())]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_replay_is_the_step(device: torch.device, optimizer: str, micro_batches: int) -> None:
    """Seven steps, each with another learning rate, bit for bit; the model's Python runs for the first three alone."""
    graphs = graphs_on(device)
    plain, graphed = Run(device, None, optimizer, micro_batches), Run(device, graphs, optimizer, micro_batches)
    for a, b in zip(plain(7), graphed(7), strict=True):
        assert torch.equal(a, b)
    assert graphed.said == []
    assert plain.forwards == 7 * micro_batches
    assert graphed.forwards == 2 * micro_batches + 1
    if isinstance(graphs, Recorder):
        assert (graphs.captures, graphs.replays) == ((1, 5) if micro_batches == 1 else (2, 5 * 2 + 5))


def test_checkpointing_is_captured_too(device: torch.device) -> None:
    plain, graphed = (Run(device, graphs, checkpointing=True) for graphs in (None, graphs_on(device)))
    assert all(torch.equal(a, b) for a, b in zip(plain(4), graphed(4), strict=True))
    assert graphed.said == []


def test_what_cannot_be_captured_runs_as_it_is(device: torch.device) -> None:
    """A model that asks for a number of the device: one sentence, and the same training."""
    said = []
    for graphs in (None, graphs_on(device)):
        run = Run(device, graphs)
        run.step.forward = lambda inputs, targets, model=run.model: (
            model(inputs, targets) * (1 + 0 * inputs[0, 0].item())
        )
        said.append((run(5), run.said))
    assert all(torch.equal(a, b) for a, b in zip(said[0][0], said[1][0], strict=True))
    assert said[0][1] == []
    (sentence,) = said[1][1]
    assert sentence.startswith("the step runs without a CUDA graph, which cannot hold it: ")
    assert "\n" not in sentence


def test_batches_of_another_shape_run_as_they_are(device: torch.device) -> None:
    graphs = graphs_on(device)
    calls = []

    def mean(x):
        calls.append(x.shape)
        return x.mean()

    captured = Captured(mean, graphs, warmup=1, failed=pytest.fail)
    for shape in [(4, 3), (4, 3), (2, 3), (4, 3)]:
        x = torch.rand(shape, device=device)
        torch.testing.assert_close(captured(x), x.mean())
    assert calls == [(4, 3), (4, 3), (2, 3)]  # warm-up, capture, the odd one


class TestTheRecorderIsAsStrictAsACapture:
    """Each planted fault is refused or shows in the results."""

    def captured(self, function, *tensors):
        failed = []
        captured = Captured(function, Recorder(), warmup=0, failed=failed.append)
        return [captured(*(t + i for t in tensors)).clone() for i in range(2)], failed

    @pytest.mark.parametrize(
        "fault",
        [
            lambda x: x * x.sum().item(),
            lambda x: x * torch.tensor(2.0),
            lambda x: x[x > 0],
            lambda x: x if x.sum() > 0 else -x,
        ],
        ids=["a number", "a number from the host", "a size", "a branch"],
    )
    def test_what_waits_is_refused(self, fault) -> None:
        _, failed = self.captured(fault, torch.ones(3))
        assert len(failed) == 1

    def test_a_capture_runs_nothing_and_python_is_not_run_again(self) -> None:
        state, times = torch.zeros(()), []

        def count(x):
            times.append(1)
            return state.add_(len(times)) + 0 * x.sum()

        results, failed = self.captured(count, torch.ones(3))
        assert [r.item() for r in results] == [1.0, 2.0]  # not 1 and 3: len(times) was taken in the capture
        assert not failed

    def test_memory_that_is_gone_is_noticed(self) -> None:
        holder = [torch.ones(3)]
        captured = Captured(lambda x: x + holder[0], Recorder(), warmup=0, failed=pytest.fail)
        captured(torch.ones(3))
        holder.clear()
        with pytest.raises(RuntimeError, match="freed since the capture"):
            captured(torch.ones(3))


def test_the_first_loss_is_that_of_a_guess(device: torch.device) -> None:
    assert Run(device, graphs_on(device))(1)[0].item() == pytest.approx(math.log(61), abs=0.5)
