"""Several token files: folders, lists and mixtures, and what a run makes of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rooflight.training.data import Batches, open_corpus, validation_batches
from rooflight.training.loop import train
from support.runs import assert_equal, weights_of

CPU = torch.device("cpu")


@pytest.fixture
def shards(write_tokens, tmp_path) -> Path:
    """Files of 100, 3 and 50 tokens: ids 0 to 152, each once."""
    for i, (first, end) in enumerate([(0, 100), (100, 103), (103, 153)]):
        write_tokens(np.arange(first, end), f"web/shard-{i:05d}.bin", vocab_size=200)
    write_tokens(np.arange(160, 190), "code.bin", vocab_size=200, n_bytes=10)
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "sizes"),
    [
        ("code.bin", [([30], 1)]),
        ("web", [([100, 3, 50], 1)]),
        (["code.bin", "web"], [([30, 100, 3, 50], 1)]),
        ({"web": 0.5, "code.bin": 2.0}, [([100, 3, 50], 0.5), ([30], 2)]),
    ],
)
def test_what_may_be_trained_on(shards, paths, sizes):
    if isinstance(paths, dict):
        corpus = open_corpus({str(shards / path): weight for path, weight in paths.items()})
    else:
        corpus = open_corpus([shards / p for p in paths] if isinstance(paths, list) else shards / paths)
    assert [([f.n_tokens for f in s.files], s.weight) for s in corpus.sources] == sizes
    more = sum(len(some) for some, _ in sizes) - 1
    assert str(corpus) == f"{corpus.files[0].path}" + (f" and {more} more" if more else "")
    assert corpus.n_tokens == sum(n for some, _ in sizes for n in some)
    n_bytes = sum(10 if n == 30 else 2 * n for some, _ in sizes for n in some)
    assert corpus.bits_per_byte(math.log(2)) == pytest.approx(corpus.n_tokens / n_bytes)


def test_wrong_corpora_are_named(shards, write_tokens, tmp_path):
    other = write_tokens(range(40), "other.bin", tokenizer_hash="f" * 64)
    (tmp_path / "empty").mkdir()
    for paths, message in (
        (
            [shards / "code.bin", other],
            r"code\.bin and .*other\.bin come from different tokenizers, .* 0{12} and f{12}",
        ),
        ({str(other): 1.0, str(shards / "web"): 1.0}, r"other\.bin and .*shard-00000\.bin come from different"),
        (tmp_path / "empty", r"empty is a folder without token files, expected some x\.bin"),
        ([], "paths: got none, expected a token file or folder at least"),
        ({}, "paths: got none"),
        (
            {str(other): 1.0, str(shards / "code.bin"): -0.5},
            r"paths: weights must be positive and finite, got \[1\.0, -0\.5\]",
        ),
        ({str(other): math.nan}, "paths: weights must be positive and finite"),
        (
            [shards / "web", shards / "code.bin", shards / "web" / "shard-00000.bin"],
            r"paths: .*shard-00000\.bin is given twice, as .*shard-00000\.bin before; a table gives a path more",
        ),
        ([shards / "code.bin", shards / ".." / shards.name / "code.bin"], "code.bin is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpus(paths)
    with pytest.raises(ValueError, match=r"shard-00000\.bin was encoded with a vocabulary of 200 tokens"):
        open_corpus(shards / "web", vocab_size=100)
    with pytest.raises(FileNotFoundError, match=r"no token file at .*absent\.bin"):
        open_corpus([shards / "code.bin", shards / "absent.bin"])
    with pytest.raises(
        ValueError, match=r"context_length 40 needs at least 41 tokens, got .*bin with 30"
    ):  # of one source of two
        Batches(open_corpus({str(shards / "web"): 1.0, str(shards / "code.bin"): 1.0}), 2, 40, CPU, seed=0)
    with pytest.raises(
        ValueError, match=r"^train_data: weights must be at least 1/10,000 of their sum 1000000\.0, got 1\.0"
    ):
        open_corpus({str(shards / "web"): 999_999.0, str(shards / "code.bin"): 1.0}, name="train_data")


@pytest.mark.parametrize("order", ["random", "epochs"])
@pytest.mark.parametrize("weights", [None, {"web": 3.0, "code.bin": 1.0}])
def test_windows_stay_in_their_file(shards, order, weights):
    """Ids rise by one within a file: a window that crossed from 99 to 103, or from 152 to 160, would show it."""
    if weights is None:
        corpus = open_corpus([shards / "web", shards / "code.bin"])
    else:
        corpus = open_corpus({str(shards / path): weight for path, weight in weights.items()})
    batches = Batches(corpus, 40, 7, CPU, seed=1, order=order)
    rows = [next(batches) for _ in range(25)]
    inputs, targets = (torch.cat(some) for some in zip(*rows, strict=True))
    assert torch.equal(targets, inputs + 1)
    first = inputs[:, :1]
    assert torch.equal(inputs, first + torch.arange(7))
    if weights is not None:  # 1,000 samples, a quarter of them each fourth
        assert int((first >= 160).sum()) == 250
        assert set((first >= 160).view(25, 40).sum(1).tolist()) == {10}
    elif order == "random":  # every place where a window fits: 93 + 43 + 23
        assert set(first.flatten().tolist()) == {*range(93), *range(103, 146), *range(160, 183)}


def test_validation_goes_through_all_shards(shards):
    tokens = open_corpus(shards / "web").tokens
    starts = [*range(0, 98, 7), *range(103, 152, 7)]  # 14 windows, none of three tokens, 7
    batches = list(validation_batches(tokens, 4, 7))
    assert torch.cat([i[:, 0] for i, _ in batches]).tolist() == starts
    assert all(torch.equal(t, i + 1) for i, t in batches)
    few = torch.cat([i[:, 0] for i, _ in validation_batches(tokens, 2, 7, max_batches=2)]).tolist()
    assert few == [starts[0], starts[7], starts[13], starts[20]]


@pytest.mark.parametrize("changes", [{}, {"documents": True, "eod": 5, "gradient_accumulation": 2}])
def test_a_resumed_run_is_the_whole_one(config, write_tokens, quiet, changes):
    """To the bit, with shards, weights and epochs of 22 and 11 windows, which 128 samples go through several times."""
    rng = np.random.default_rng(0)
    for name in ("web/shard-00000", "web/shard-00001", "code", "val/shard-00000", "val/shard-00001"):
        write_tokens(rng.integers(0, 32, 90), f"{name}.bin")
    root = config.out_dir.parent
    data = {str(root / "web"): 2.0, str(root / "code.bin"): 1.0}
    # a constant rate, for a run of 7 steps does not know that it will be of 16
    changes = {"order": "epochs", "max_steps": 16, "schedule": "constant", "warmup": 0.0} | changes
    config = dataclasses.replace(config, train_data=data, val_data=root / "val", **changes)
    whole = train(config, console=quiet)
    parted = dataclasses.replace(config, out_dir=root / "parted")
    assert train(dataclasses.replace(parted, max_steps=7), console=quiet).step == 7
    resumed = train(dataclasses.replace(parted, resume=True), console=quiet)
    assert_equal(weights_of(resumed), weights_of(whole))
    assert resumed.val_loss == whole.val_loss
