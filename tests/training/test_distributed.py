"""A run on several processes is the run of one: losses, gradients, parameters; and what ends it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rooflight.model import ModelConfig
from rooflight.training.config import TrainConfig
from rooflight.training.distributed import ALONE, World, full, full_parameters, launched
from rooflight.training.learner import Learner, evaluate
from support.ranks import on_ranks
from support.together import CASES, learn, learn_all

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("size", [2, 3])
def test_x(tmp_path, size):
    told = on_ranks(size, tmp_path, learn_all)
    for name, config in CASES.items():
        alone = learn(config)
        for rank in told:
            r = rank[name]
            print(name, max(abs(a-b)/b for a,b in zip(r["loss"], alone["loss"])), max(abs(a-b)/b for a,b in zip(r["norm"], alone["norm"])))
            print([max(((a[n]-b[n]).abs().max()/b[n].abs().max()).item() for n in b) for a,b in zip(r["gradients"], alone["gradients"])])
            print(all(torch.equal(r["parameters"][n], told[0][name]["parameters"][n]) for n in alone["parameters"]), max((r["parameters"][n]-alone["parameters"][n]).abs().max().item() for n in alone["parameters"]))
    assert 0
