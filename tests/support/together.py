"""Learning on several processes, for tests/training/test_distributed.py: what each process does, and tells."""

from __future__ import annotations

import numpy as np
import torch

from rooflight.model import ModelConfig
from rooflight.training.config import TrainConfig
from rooflight.training.distributed import full, full_parameters, launched
from rooflight.training.learner import Learner

STEPS = 20
MODEL = ModelConfig(61, 16, 2, 4, n_kv_head=2, d_model=32, d_ff=40)


def _config(**options: object) -> TrainConfig:
    fixed = {"dtype": "float32", "device": "cpu", "batch_size": 12, "lr": 1e-3}
    return TrainConfig(model=MODEL, train_data="t", out_dir="o", **fixed | options)


def learn(config: TrainConfig, steps: int = STEPS) -> dict:
    """Every step's loss, norm and gradients, and the parameters after the last, whole."""
    world = launched()
    learner = Learner(config, torch.device("cpu"), world=world)
    rng = np.random.default_rng(0)
    told: dict = {"loss": [], "norm": [], "gradients": []}
    for _ in range(steps):
        tokens = torch.from_numpy(rng.integers(61, size=(12, 17)))
        loss, norm = learner.take_step.gradients(*learner.rows(tokens[:, :-1], tokens[:, 1:]))
        told["loss"].append(loss.item())
        told["norm"].append(norm.item())
        told["gradients"].append({n: full(p.grad).clone() for n, p in learner.model.named_parameters()})
        learner.take_step.update()
    return told | {"parameters": full_parameters(learner.model)}


CASES = {
    "ddp": _config(parallel="ddp", gradient_accumulation=2),
    "fsdp": _config(parallel="fsdp", gradient_accumulation=2),
    "fsdp kept": _config(parallel="fsdp", reshard=False, checkpointing=True, optimizer="adamw"),
}


def learn_all() -> dict[str, dict]:
    return {name: learn(config) for name, config in CASES.items()}


