"""DDP and FSDP2 in three processes: what the estimate says each holds and sends, and the same training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rooflight.kernels import dispatch
from rooflight.model import ModelConfig, Transformer, estimate
from support.ranks import forks
from support.sharded import Case, batch, steps

pytestmark = pytest.mark.cpu

WORLD, BATCH = 3, 2  # of two a ring's (N - 1) / N could be other things; all first dimensions are multiples of 3
CONFIG = ModelConfig(192, 16, 3, 6, n_kv_head=3, d_model=96, d_ff=192, head_dim=16, qk_norm="all")
HEADERS = 10_000  # bytes of gloo's own in a step: half a percent
CASES = [
    Case("fsdp", CONFIG),
    Case("tied", replace(CONFIG, tie_embeddings=True)),
    Case("checkpointing", CONFIG, checkpointing=True),
    Case("kept", CONFIG, reshard=False),
    Case("fp32", CONFIG, dtype=torch.float32),
    Case("ddp", CONFIG, parallel="ddp", dtype=torch.float32),
    Case("muon", CONFIG, optimizer="muon"),
    Case("ddp, muon", replace(CONFIG, n_layer=4), parallel="ddp", optimizer="muon"),  # other numbers of matrices
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, run once."""
    folder = tmp_path_factory.mktemp("sharded")
    forks(steps, WORLD, WORLD, str(folder), CASES, BATCH)
    return folder


def told(folder: Path, case: Case) -> list[dict]:
    return [json.loads((folder / f"{case.name}-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_process_holds_and_sends_what_the_estimate_says(folder: Path, case: Case) -> None:
    dtype = str(case.dtype).removeprefix("torch.")
    e = estimate(
        case.config, batch_size=BATCH, gpus=WORLD, dtype=dtype, parallel=case.parallel, reshard=case.reshard, ops="cpu",
        checkpointing=case.checkpointing, optimizer=case.optimizer,
    )  # fmt: skip
    processes = told(folder, case)
    exchanged = [process["sent"].pop("exchanged", 0) for process in processes]
    assert sum(exchanged) == pytest.approx(WORLD * e.communication.update, abs=WORLD)  # which is rounded
    if case.parallel == "fsdp":
        assert set(exchanged) == {e.communication.update}
    if case.name == "muon":  # of so few tokens that its update is the peak
        settings = {"dtype": dtype, "ops": "cpu", "optimizer": "muon"}
        least = estimate(case.config, batch_size=1, context_length=1, gpus=WORLD, **settings).memory
        assert {sum(p["held"].values()) + p["update"] for p in processes} == {least.peak}
    passes = e.communication.forward + e.communication.backward
    for rank, process in enumerate(processes):
        assert process["held"] == {
            "parameters": e.memory.parameters,
            "gradients": e.memory.gradients,
            "optimizer": e.memory.optimizer,
        }
        if case.parallel == "fsdp":
            assert sum(process["sent"].values()) == passes
        if process["written"] is None:
            continue
        # gloo's reduce-scatter is an all-reduce, which sends twice the share (torch 2.13); DDP's goes around a ring
        sent = passes + exchanged[rank] + process["sent"].get("scattered", 0)
        assert sent <= process["written"]["step"] <= sent + HEADERS
        # rank 0's parameters reach the others; gloo's rank 0 sends them to each, not around the ring that is estimated
        start = e.communication.start * (WORLD - 1) * (rank == 0)
        assert start <= process["written"]["start"] <= start + HEADERS


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=lambda case: case.name)
def test_a_step_is_that_of_all_batches_together(folder: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    torch.manual_seed(0)
    model = Transformer(case.config)
    tokens = torch.cat([batch(rank, case.config, BATCH) for rank in range(WORLD)])
    loss = model(tokens, tokens)
    loss.backward()
    assert sum(process["loss"] for process in told(folder, case)) / WORLD == pytest.approx(loss.item(), rel=1e-6)
    gradients = torch.load(folder / f"{case.name}.pt")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
