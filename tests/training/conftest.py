from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch


@pytest.fixture
def write_tokens(tmp_path: Path) -> Callable[..., Path]:
    """Writes a token file as its format says, from plain ids; keywords replace fields of the header."""

    def write(ids: npt.ArrayLike, name: str = "tokens.bin", *, dtype: str = "uint16", **fields: object) -> Path:
        path = tmp_path / name
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
        path.with_name(name + ".json").write_text(json.dumps(header | fields))
        return path

    return write


@pytest.fixture(autouse=True)
def _one_thread():
    """The models here are far too small for two threads, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
