"""Learning on several processes, for tests/training/test_distributed.py: what each process does, and tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rooflight.model import ModelConfig
from rooflight.training.config import TrainConfig
from rooflight.training.distributed import full, full_parameters, launched
from rooflight.training.learner import Learner
from support.assignment import assignment

STEPS = 20
MODEL = ModelConfig(61, 16, 2, 4, n_kv_head=2, d_model=32, d_ff=40)


def _config(**options: Any) -> TrainConfig:
    fixed = {"model": MODEL, "dtype": "float32", "device": "cpu", "batch_size": 12, "lr": 1e-3, "muon_lr": 5e-3}
    return TrainConfig(train_data="t", out_dir="o", **fixed | options)


CASES = {
    "ddp": _config(parallel="ddp", gradient_accumulation=2),
    "ddp, adamw, clipped": _config(parallel="ddp", optimizer="adamw", grad_clip=0.1),
    "fsdp": _config(parallel="fsdp", gradient_accumulation=2),
    "fsdp, tied": _config(parallel="fsdp", grad_clip=0.1, model=replace(MODEL, tie_embeddings=True)),
    "fsdp, adamw, kept": _config(parallel="fsdp", reshard=False, checkpointing=True, optimizer="adamw"),
}


def learn(config: TrainConfig) -> dict[str, Any]:
    """Every step's loss, norm and gradients before clipping, and the parameters after the last; all whole."""
    learner = Learner(config, torch.device("cpu"), world=launched())
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(STEPS):
        tokens = torch.from_numpy(rng.integers(61, size=(12, 17)))
        loss, norm = learner.take_step.gradients(*learner.rows(tokens[:, :-1], tokens[:, 1:]))
        gradients = {name: full(p.grad).clone() for name, p in learner.model.named_parameters()}
        steps.append({"loss": loss.item(), "norm": norm.item(), "gradients": gradients})
        learner.take_step.update()
    return {"steps": steps, "parameters": full_parameters(learner.model)}


def learn_all() -> dict[str, dict[str, Any]]:
    return {name: learn(config) for name, config in CASES.items()}


def everything() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    return learn_all(), assignment()
