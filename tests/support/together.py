"""Learning on several processes, for tests/training/test_distributed.py: what each process does, and tells."""

from __future__ import annotations

import io
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from rooflight.bench.measure.memory import peak_bytes
from rooflight.model import ModelConfig
from rooflight.training import loop
from rooflight.training.config import TrainConfig
from rooflight.training.distributed import full, full_parameters, launched, local
from rooflight.training.learner import Learner
from rooflight.training.run.result import TrainResult
from support.assignment import assignment
from support.ranks import group
from support.runs import after, crash
from support.sharded import written

MODEL = ModelConfig(61, 16, 2, 4, n_kv_head=2, d_model=32, d_ff=40)

DEEP = replace(MODEL, n_layer=12, d_model=64, d_ff=128)  # each parameter is a small part of it


def _config(parallel: str, **options: Any) -> TrainConfig:
    # small rates: AdamW and Muon turn the last digits of small gradients into steps as long as any
    fixed = {"model": MODEL, "dtype": "float32", "device": "cpu", "batch_size": 12, "lr": 3e-4, "muon_lr": 3e-3}
    return TrainConfig(train_data="t", out_dir="o", parallel=parallel, **fixed | options)


CASES = {  # and steps
    "ddp": (_config("ddp", gradient_accumulation=2), 10),
    "ddp, adamw, clipped": (_config("ddp", optimizer="adamw", grad_clip=0.1), 5),
    "fsdp": (_config("fsdp", gradient_accumulation=2), 10),
    "fsdp, tied, clipped": (_config("fsdp", grad_clip=0.1, model=replace(MODEL, tie_embeddings=True)), 5),
    "fsdp, adamw, kept": (_config("fsdp", reshard=False, checkpointing=True, optimizer="adamw"), 5),
}


def learn(config: TrainConfig, n_step: int) -> dict[str, Any]:
    """Every step's loss, norm and gradients, and the parameters after the last, all whole; the bytes that the last
    step's gradients have sent."""
    world = launched()
    learner = Learner(config, torch.device("cpu"), world=world)
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(n_step):
        tokens = torch.from_numpy(rng.integers(61, size=(12, 17))[world.rows(12)])
        before = written()
        loss, norm = learner.take_step.gradients(tokens[:, :-1], tokens[:, 1:])
        sent = None if before is None else (written() or 0) - before
        gradients = {name: full(p.grad).clone() for name, p in learner.model.named_parameters()}
        steps.append({"loss": loss.item(), "norm": norm.item(), "gradients": gradients})
        learner.take_step.update()
    return {"steps": steps, "parameters": full_parameters(learner.model), "sent": sent}


def learn_all() -> dict[str, dict[str, Any]]:
    return {name: learn(*case) for name, case in CASES.items()}


def begins(config: TrainConfig) -> dict[str, Any]:
    """The parameters that fsdp begins with, whole; bytes that this process holds of them, and the most that it held of
    anything till then."""
    learners: list[Learner] = []
    cpu = torch.device("cpu")
    config = replace(config, parallel="fsdp")
    peak = peak_bytes(lambda: learners.append(Learner(config, cpu, world=launched())), cpu)
    parameters = full_parameters(learners[0].model)
    held = sum(p.nbytes for p in local(list(learners[0].model.parameters())))
    return {"parameters": parameters, "held": held, "peak": peak}


# Runs' options, by their engines; alone, each is the run without its engine. Documents are of many lengths, so that
# processes have other numbers of targets.
RUNS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {"documents": True, "eod": 3, "order": "epochs"}}


def of(config: TrainConfig, parallel: str) -> TrainConfig:
    return replace(config, parallel=parallel, out_dir=config.out_dir.with_name(parallel), **RUNS[parallel])


def runs(config: TrainConfig) -> dict[str, TrainResult]:
    """Runs of train() by their engines; the first is interrupted by a signal to the last process, and restarted."""
    told = {}
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for parallel in RUNS:
        mine = of(config, parallel)
        with pytest.MonkeyPatch.context() as patch:
            if parallel == "ddp":
                with pytest.MonkeyPatch.context() as signalled:
                    signal_self = after(5, loop.Interval.add, lambda: last and os.kill(os.getpid(), signal.SIGTERM))
                    signalled.setattr(loop.Interval, "add", signal_self)
                    told["interrupted"] = loop.train(mine, console=_quiet())
                patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
            told[parallel] = loop.train(mine, console=_quiet())
    return told


def fails(config: TrainConfig) -> tuple[str, str, float]:
    """A run whose last process has an error in its third step: how it ends in each, and after how many seconds."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Interval, "add", after(2, loop.Interval.add, lambda: last and crash()))
        try:
            loop.train(replace(config, parallel="ddp", out_dir=config.out_dir.with_name("fails")), console=_quiet())
        except Exception as error:
            return type(error).__name__, str(error), time.monotonic() - began
    return "none", "", 0.0


def _quiet() -> Console:
    return Console(file=io.StringIO())


def everything(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """All of the above, by what did it."""
    with group(folder):
        told = {"learn_all": learn_all(), "assignment": assignment(), "runs": runs(config)}
        told["begins"] = begins(replace(config, model=DEEP))
        told["begins from"] = begins(replace(config, init_from=of(config, "ddp").out_dir))
    return told | {"fails": fails(config)}
