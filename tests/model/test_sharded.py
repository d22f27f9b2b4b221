"""The model sharded by FSDP2, in two processes: what the estimate says each holds and sends, and the same training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from rooflight.model import ModelConfig, Transformer, estimate
from support.sharded import batch, step

pytestmark = pytest.mark.cpu

WORLD, BATCH = 2, 2
CONFIG = ModelConfig(64, 16, 3, 4, n_kv_head=2, d_model=32, d_ff=48, qk_norm=True)


def run(folder: Path, config: ModelConfig, dtype: torch.dtype) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # the processes take the fast path of a plain CPU
        mp.spawn(step, (WORLD, str(folder), config, BATCH, dtype), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("tied", [False, True])
def test_each_process_holds_and_sends_what_the_estimate_says(tmp_path: Path, tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    e = estimate(config, batch_size=BATCH, gpus=WORLD)
    for told in run(tmp_path, config, torch.bfloat16):
        assert told["held"] == {
            "parameters": e.memory.parameters,
            "gradients": e.memory.gradients,
            "optimizer": e.memory.optimizer,
        }
        assert sum(told["sent"].values()) == e.communication_bytes


def test_a_sharded_step_is_the_step_of_all_batches_together(tmp_path: Path) -> None:
    told = run(tmp_path, CONFIG, torch.float32)
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    tokens = torch.cat([batch(rank, CONFIG, BATCH) for rank in range(WORLD)])
    loss = model(tokens, tokens)
    loss.backward()
    assert sum(t["loss"] for t in told) / WORLD == pytest.approx(loss.item(), rel=1e-6)
    gradients = torch.load(tmp_path / "gradients.pt")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
