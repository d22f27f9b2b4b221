"""Runs of a small model: their weights and logs, and faults in the middle of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from rooflight.training.checkpoint import load_model
from rooflight.training.config import TrainConfig
from rooflight.training.loop import TrainResult


def log_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out_dir / "log.jsonl").read_text().splitlines()]


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_model(result.checkpoint).state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


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
