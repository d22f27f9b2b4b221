"""Wrong Python types in the public functions of model and training: refused, by the argument's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer, estimate, generate, load_hf, preset, save_hf
from rooflight.model.evaluate import negative_log_likelihood
from rooflight.model.typed import _matches, typed
from rooflight.training.checkpoint import load_model, save_checkpoint
from rooflight.training.config import TrainConfig
from rooflight.training.data import get_batch, open_tokens
from rooflight.training.learner import resolve_device
from rooflight.training.loop import train
from rooflight.training.optim import build_optimizers
from rooflight.training.optim.schedule import lr_factor

CONFIG = ModelConfig(7, 16, 1, 1, d_model=4)
IDS = torch.zeros(1, 3, dtype=torch.int64)
TOKENS = np.arange(100, dtype=np.uint16)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, reference)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: Transformer({}), "config"),
        (lambda m: Transformer(CONFIG, None), "ops"),
        (lambda m: Transformer(CONFIG, checkpointing="yes"), "checkpointing"),
        (lambda m: m([[1, 2]]), "tokens"),
        (lambda m: m(None), "tokens"),
        (lambda m: m(IDS.float()), "tokens"),
        (lambda m: m(IDS, [[1, 2, 3]]), "targets"),
        (lambda m: m(IDS, cu_seqlens=[0, 3]), "cu_seqlens"),
        (lambda m: generate(None, IDS, 3), "model"),
        (lambda m: generate(m, [1, 2], 3), "tokens"),
        (lambda m: generate(m, IDS, 2.5), "max_new_tokens"),
        (lambda m: generate(m, IDS, 3, temperature="1"), "temperature"),
        (lambda m: generate(m, IDS, 3, top_k=True), "top_k"),
        (lambda m: generate(m, IDS, 3, generator=5), "generator"),
        (lambda m: load_hf(b"x"), "path"),
        (lambda m: save_hf(m, None), "path"),
        (lambda m: estimate("tiny", batch_size=1), "config"),
        (lambda m: estimate(CONFIG, batch_size=1, checkpointing="yes"), "checkpointing"),
        (lambda m: estimate(CONFIG, batch_size=1, ceilings={}), "ceilings"),
        (lambda m: preset(["tiny"]), "preset"),
        (lambda m: ModelConfig.from_dict(None), "fields"),
        (lambda m: negative_log_likelihood(m, [1, 2, 3]), "tokens"),
        (lambda m: train({}), "config"),
        (lambda m: resolve_device(None), "name"),
        (lambda m: TrainConfig.from_dict([]), "values"),
        (lambda m: TrainConfig.from_toml(b"x"), "path"),
        (lambda m: open_tokens(None), "path"),
        (lambda m: get_batch([1, 2, 3], 1, 2), "tokens"),
        (lambda m: get_batch(TOKENS, "1", 2), "batch_size"),
        (lambda m: get_batch(TOKENS, 1, 2, generator=3), "generator"),
        (lambda m: lr_factor("x"), "progress"),
        (lambda m: load_model(None), "path"),
        (lambda m: save_checkpoint("x", None, [], step=0), "model"),
        (lambda m: save_checkpoint("x", m, [], step="0"), "step"),
        (lambda m: build_optimizers(None), "model"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(call, argument, model):
    with pytest.raises(ValueError, match=rf"^{argument}: expected "):
        call(model)


def test_what_is_meant_passes(model, tmp_path):
    assert generate(model, IDS[0], np.int64(1), temperature=1, top_k=None).shape == (4,)
    assert _matches(torch.nn.Linear(1, 1), Transformer)  # what wraps a model, a compiled one, stands for it
    assert lr_factor(np.float32(0.5)) == lr_factor(0.5)
    for path in ("nowhere", tmp_path, Path("nowhere")):
        with pytest.raises(FileNotFoundError):
            load_model(path)


def test_annotations_are_read_on_their_surface():
    @typed
    def f(a: int | None = None, b: str | Path = "", c: dict[str, int] | None = None, d: Unknown = 0, *e: int) -> int:  # noqa: F821
        """Doc."""
        return a or 0

    assert f.__name__ == "f"
    assert f.__doc__ == "Doc."
    assert f(3, Path("x"), {"a": "not looked at"}, object(), "nor this") == 3
    for keywords, message in (
        ({"a": 1.0}, "a: expected a whole number or None, got 1.0"),
        ({"b": b"x"}, "b: expected a path, got b'x'"),
        ({"c": [1]}, "c: expected a dict or None, got a list"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            f(**keywords)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        f(z=1)
