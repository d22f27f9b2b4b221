"""Runs of a small model: their weights and logs, and faults in the middle of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from rooflight.training import learner
from rooflight.training.checkpoint import load_model
from rooflight.training.config import TrainConfig
from rooflight.training.loop import TrainResult, train
from support.recorder import Recorder


def log_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out_dir / "log.jsonl").read_text().splitlines()]


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_model(result.checkpoint).state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_graphs_make(plain: TrainResult, graphed: TrainConfig, console: Console, patch: pytest.MonkeyPatch) -> None:
    """`graphed`, run as graphs that a recorder stands in for, ends with the weights of the run without them."""
    recorder = Recorder()
    patch.setattr(learner, "graphs_for", lambda config, device: recorder)
    result = train(graphed, console=console)
    assert recorder.captures == graphed.gradient_accumulation + 1
    torch.testing.assert_close(weights_of(result), weights_of(plain), rtol=0, atol=1e-5)


def crash() -> None:
    raise RuntimeError("power cut")


def after(calls: int, function: Callable[..., Any], act: Callable[[], object]) -> Callable[..., Any]:
    """`function`, which calls `act` first in its call number `calls` (from 0)."""
    count = iter(range(10**9))

    def wrapped(*args: Any) -> Any:
        if next(count) == calls:
            act()
        return function(*args)

    return wrapped
