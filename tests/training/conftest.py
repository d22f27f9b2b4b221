from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rich.console import Console

if TYPE_CHECKING:
    from rooflight.training.config import TrainConfig


@pytest.fixture
def write_tokens(tmp_path: Path) -> Callable[..., Path]:
    """Writes a token file as its format says, from plain ids; keywords replace fields of the header."""

    def write(ids: npt.ArrayLike, name: str = "tokens.bin", *, dtype: str = "uint16", **fields: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        array = np.asarray(ids).astype(np.dtype(dtype).newbyteorder("<"))
        path.write_bytes(array.tobytes())
        header = {
            "format": "rooflight-tokens",
            "version": 1,
            "dtype": dtype,
            "vocab_size": 32,
            "tokenizer_hash": "0" * 64,
            "n_tokens": array.size,
            "n_bytes": 2 * array.size,
        }
        path.with_name(path.name + ".json").write_text(json.dumps(header | fields))
        return path

    return write


@pytest.fixture
def config(write_tokens, tmp_path) -> TrainConfig:
    """A text that a model can learn: each token is followed by its triple, or a random one in ten cases."""
    from rooflight.model import ModelConfig  # here: triton must not be imported before the root conftest has run
    from rooflight.training.config import TrainConfig

    rng = np.random.default_rng(0)
    ids = [1]
    for noise, jump in zip(rng.random(4000), rng.integers(0, 32, 4000), strict=True):
        ids.append(int(jump) if noise < 0.1 else 3 * ids[-1] % 32)
    return TrainConfig(
        model=ModelConfig(32, 8, 1, 2, d_model=16, d_ff=24),
        train_data=write_tokens(ids[:3500], "train.bin"),
        val_data=write_tokens(ids[3500:], "val.bin"),
        out_dir=tmp_path / "run",
        batch_size=8,
        max_steps=40,
        eval_every=20,
        checkpoint_every=20,
        log_every=5,
        dtype="float32",
        device="cpu",
        kernels="eager",
        peak_flops=1e9,
    )


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def _one_thread():
    """The models here are far too small for two threads, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
