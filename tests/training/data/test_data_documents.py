"""Documents in a batch: their bounds, and the same loss and gradients as each of them alone."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from rooflight import kernels
from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer
from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.corpus.prepare import prepare
from rooflight.training import learner
from rooflight.training.checkpoint import load_model
from rooflight.training.data import (
    IGNORED,
    Batches,
    bounds_of,
    document_bounds,
    end_of_document,
    open_corpus,
    validation_batches,
)
from rooflight.training.graph import CudaGraphs, TrainStep, make_rates_tensors
from rooflight.training.learner import evaluate
from rooflight.training.loop import train
from rooflight.training.optim import build_optimizers
from rooflight.training.run.replay import replay
from rooflight.training.run.stopping import TrainingDiverged
from support.recorder import Recorder
from support.runs import log_of, weights_of

CPU = torch.device("cpu")
EOD = 3
MODEL = ModelConfig(61, 16, 2, 4, n_kv_head=2, d_model=32, d_ff=48)


def text(n: int, *, every: int = 6, seed: int = 0) -> np.ndarray:
    """Documents of `every` tokens on average, some of none."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 1 / every, EOD, rng.integers(4, 61, n)).astype(np.uint16)


@pytest.fixture
def corpus(write_tokens):
    return open_corpus(write_tokens(text(600), vocab_size=61, eod=EOD))


@pytest.mark.parametrize(
    ("rows", "micro_batches", "room", "expected"),
    [
        ("ab.cde f..gh.", 1, 8, [[0, 3, 6, 8, 9, 12, 12, 12, 12]]),  # the module's example
        ("ab.cde f..gh.", 2, 1, [[0, 3, 6, 6, 6], [0, 2, 3, 6, 6]]),  # 3 documents at most: room for 4
        ("abcdef ghijkl", 1, 1, [[0, 6, 12]]),  # windows end documents
        ("abcde. fghij.", 2, 1, [[0, 6], [0, 6]]),  # and a window that ends with one is no empty document more
        ("...... abcdef", 2, 1, [[0, 1, 2, 3, 4, 5, 6, 6, 6], [0, 6, 6, 6, 6, 6, 6, 6, 6]]),
    ],
)
def test_bounds(rows, micro_batches, room, expected):
    ends = np.array([[letter == "." for letter in row] for row in rows.split()])
    bounds = document_bounds(ends, micro_batches, room)
    assert bounds.dtype == np.int32
    assert bounds.tolist() == expected
    targets = torch.where(torch.from_numpy(ends), IGNORED, 7)
    again = bounds_of(targets, micro_batches)
    assert [sorted(set(row)) for row in again.tolist()] == [sorted(set(row)) for row in expected]


def test_batches_have_one_shape(corpus):
    """As a graph needs: as much room as the densest of 200 batches, and not four times as much."""
    batches = Batches(corpus, 8, 16, CPU, seed=0, eod=EOD, micro_batches=2)
    shapes, most = set(), 0
    for _ in range(200):
        inputs, targets, bounds = next(batches)
        assert torch.equal(targets == IGNORED, inputs == EOD)
        plain = Batches(corpus, 8, 16, CPU, seed=0).at(batches.step - 1)
        assert torch.equal(inputs, plain[0])
        assert torch.equal(targets[inputs != EOD], plain[1][inputs != EOD])
        shapes.add(tuple(bounds.shape))
        most = max(most, *(len(set(row)) - 1 for row in bounds.tolist()))
    assert len(shapes) == 1
    ((n, length),) = shapes
    assert n == 2
    assert most <= length - 1 < 4 * most


def alone(model: Transformer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss, each document of each window by itself."""
    losses, count = [], 0
    for row, expected in zip(inputs, targets, strict=True):
        start = 0
        for end in [*((row == EOD).nonzero().flatten() + 1).tolist(), len(row)]:
            some = expected[start:end]
            if (counted := int((some != IGNORED).sum())) > 0:
                losses.append(model(row[None, start:end], some[None], reduction="sum"))
            count, start = count + counted, end
    return torch.stack(losses).sum() / count


def gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    ("every", "ops", "changes"),
    [
        (2, reference, {}),  # many empty documents
        (6, reference, {}),
        (6, reference, {"window": 5, "qk_norm": True}),
        (1000, reference, {}),  # windows alone
        (4, kernels, {"n_layer": 1, "d_model": 16, "d_ff": 16, "n_head": 1, "n_kv_head": 1}),  # interpreted
    ],
)
def test_the_loss_is_that_of_each_document_alone(write_tokens, every, ops, changes):
    corpus = open_corpus(write_tokens(text(600, every=every), vocab_size=61, eod=EOD))
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(MODEL, **changes), ops)
    rows, length = (1, 8) if ops is kernels else (4, 16)
    inputs, targets, bounds = Batches(corpus, rows, length, CPU, seed=1, eod=EOD).at(0)
    packed, apart = model(inputs, targets, cu_seqlens=bounds.flatten()), alone(model, inputs, targets)
    assert packed.item() == pytest.approx(apart.item(), rel=1e-6)
    for a, b in zip(gradients(model, packed), gradients(model, apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()) + 1e-8)
    if every == 6:  # what is tested could fail
        assert abs(model(inputs, targets).item() - apart.item()) > 1e-4


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_steps_loss_counts_targets(corpus, micro_batches):
    """Micro-batches in which more documents end count less: the step is the same however it is split."""
    torch.manual_seed(0)
    model = Transformer(MODEL, reference)
    batches = Batches(corpus, 6, 16, CPU, seed=1, eod=EOD, micro_batches=micro_batches)
    batch = batches.at(0)
    step = TrainStep(
        lambda inputs, targets, bounds: model(inputs, targets, cu_seqlens=bounds.flatten()), model.parameters(), [],
        device=CPU, dtype=torch.float32, micro_batches=micro_batches, by_tokens=True,
    )  # fmt: skip
    assert len({int((part == IGNORED).sum()) for part in batch[1].chunk(3)}) > 1
    loss, _ = step.gradients(*batch)
    apart = alone(model, *batch[:2])
    assert loss.item() == pytest.approx(apart.item(), rel=1e-6)
    for parameter, expected in zip(model.parameters(), gradients(model, apart), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_validation_counts_targets(write_tokens):
    tokens = [text(150), text(10, seed=2), text(70, seed=1)]
    for i, some in enumerate(tokens):
        write_tokens(some, f"val/shard-{i}.bin", vocab_size=61, eod=EOD)
    corpus = open_corpus(corpus_path := write_tokens(tokens[0], "val/shard-0.bin", vocab_size=61, eod=EOD).parent)
    assert corpus_path.is_dir()
    model = Transformer(MODEL, reference)
    windows = [w for some in tokens for w in np.split(some[: (len(some) - 1) // 16 * 16], (len(some) - 1) // 16 or 1)]
    windows = [w for w in windows if len(w)]
    assert len(windows) == 9 + 4
    batches = list(validation_batches([*corpus.tokens, corpus.tokens[0][:0]], 4, 16, eod=EOD))  # one without a token
    assert np.array_equal(torch.cat([b[0] for b in batches]).numpy(), np.stack(windows))
    inputs, targets = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    with torch.no_grad():
        expected = alone(model, inputs, targets).item()
    found = evaluate(
        lambda inputs, targets, bounds: model(inputs, targets, cu_seqlens=bounds.flatten()), corpus,
        batch_size=4, context_length=16, device=CPU, eod=EOD,
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-6)


def test_which_token_ends_documents(write_tokens):
    said, other, silent = (
        open_corpus(write_tokens([1, 2, 3], f"{name}.bin", **fields))
        for name, fields in (("said", {"eod": 3}), ("other", {"eod": 4}), ("silent", {}))
    )
    assert end_of_document([said], None) == end_of_document([said, silent], 3) == 3
    assert end_of_document([silent], 7) == 7
    for corpora, given, message in (
        ([said, silent], None, r"documents: the header of .*silent\.bin does not say which .* the key eod is its id"),
        ([silent, said], 5, r"eod must be 3, as the header of .*said\.bin has it, got 5"),
        ([said, other], None, r"eod must be 4, as the header of .*other\.bin has it, got 3"),
        ([silent], 32, r"eod must be an id below 32, the vocab_size of .*silent\.bin, got 32"),
    ):
        with pytest.raises(ValueError, match=message):
            end_of_document(corpora, given)
    for eod in (32, -1, True, "3"):
        with pytest.raises(ValueError, match=r"has eod .*, expected an id below its vocab_size 32"):
            open_corpus(write_tokens([1, 2], "wrong.bin", eod=eod))


def test_a_run_on_documents(config, write_tokens, quiet):
    """The same whatever its micro-batches; another than on windows; and without eod it says what is missing."""
    data = write_tokens(text(400) % 32, "documents.bin", eod=EOD)
    config = dataclasses.replace(config, train_data=data, val_data=data, max_steps=5, log_every=1)
    runs = {}
    for name, changes in {
        "windows": {},
        "documents": {"documents": True},
        "split": {"documents": True, "gradient_accumulation": 4},
    }.items():
        run = dataclasses.replace(config, out_dir=config.out_dir / name, **changes)
        runs[name] = train(run, console=quiet), [r["loss"] for r in log_of(run) if "loss" in r]
    assert runs["split"][1] == pytest.approx(runs["documents"][1], rel=1e-5)
    assert runs["split"][0].val_loss == pytest.approx(runs["documents"][0].val_loss, rel=1e-5)
    assert runs["windows"][1][0] != pytest.approx(runs["documents"][1][0], rel=1e-5)
    batches = list(validation_batches(open_corpus(data).tokens, 8, 8, eod=EOD))
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    with torch.no_grad():
        apart = alone(load_model(runs["documents"][0].checkpoint, ops=reference), inputs, targets).item()
    assert runs["documents"][0].val_loss == pytest.approx(apart, rel=1e-6)
    assert runs["windows"][0].tokens == runs["documents"][0].tokens
    a, b = (weights_of(runs[name][0]) for name in ("documents", "split"))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4
    with pytest.raises(ValueError, match="documents: the header of"):
        train(dataclasses.replace(config, documents=True, train_data=write_tokens(range(32))), console=quiet)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_documents_in_a_graph(device, write_tokens, micro_batches):
    """Seven steps bit for bit. On a CPU, where attention reads the bounds, a model stands in that does not."""
    corpus = open_corpus(write_tokens(text(600), vocab_size=61, eod=EOD))
    results = []
    for graphs in (None, CudaGraphs(device) if device.type == "cuda" else Recorder()):
        torch.manual_seed(0)
        with device:
            model = Transformer(MODEL, kernels if device.type == "cuda" else reference)

        def forward(inputs, targets, bounds, model=model):
            if inputs.is_cuda:
                return model(inputs, targets, cu_seqlens=bounds.flatten())
            return model(inputs, targets) * (bounds.diff() > 0).sum()

        said: list[str] = []
        optimizers = build_optimizers(model, optimizer="adamw")
        make_rates_tensors(optimizers, device)
        step = TrainStep(
            forward, model.parameters(), optimizers, device=device, dtype=torch.bfloat16,
            micro_batches=micro_batches, by_tokens=True, graphs=graphs, say=said.append,
        )  # fmt: skip
        batches = Batches(corpus, 4, 16, device, seed=0, eod=EOD, micro_batches=micro_batches)
        losses = [tuple(x.item() for x in step(*next(batches))) for _ in range(7)]
        results.append([*losses, *(p.detach().cpu() for p in model.parameters())])
        assert said == []
        if isinstance(graphs, Recorder):
            assert graphs.captures == micro_batches
            assert graphs.replays == (5 if micro_batches == 1 else 2 * 5 + 5)
    assert results[0][:7] == results[1][:7]
    assert all(torch.equal(a, b) for a, b in zip(results[0][7:], results[1][7:], strict=True))


def test_what_rooflight_data_writes(tmp_path):
    """Every document once, whole or cut by windows, by the header's own word for where it ends."""
    texts = ["one text", "another", "é", "a much longer text, in windows", "the last"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": some}) + "\n" for some in texts))
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    prepare(tokenizer, [tmp_path / "in.jsonl"], tmp_path / "shards", shard_tokens=30, num_workers=1)
    corpus = open_corpus(tmp_path / "shards")
    assert len(corpus.files) > 1
    eod = end_of_document([corpus], None)
    assert eod == tokenizer.special_tokens["<|endoftext|>"]
    ids = np.concatenate(corpus.tokens)
    assert tokenizer.decode(ids.tolist()) == "".join(some + "<|endoftext|>" for some in texts)
    for inputs, targets, bounds in validation_batches(corpus.tokens, 2, 8, eod=eod):
        parts = [inputs.flatten()[a:b].tolist() for a, b in itertools.pairwise(bounds.flatten().tolist())]
        assert all(eod not in part[:-1] for part in parts)
        assert sum(part[-1:] == [eod] for part in parts) == int((targets == IGNORED).sum())


def test_a_step_on_documents_is_replayed(config, write_tokens, quiet, monkeypatch):
    """The dump has the batch's tokens alone, from whose targets the bounds are found again."""
    data = write_tokens(text(400) % 32, "documents.bin", eod=EOD)
    config = dataclasses.replace(
        config, train_data=data, val_data=None, max_steps=5, documents=True, gradient_accumulation=2
    )
    bad = Batches(open_corpus(data), 8, 8, CPU, seed=0, eod=EOD, micro_batches=2).at(3)
    seen = []

    class Model(learner.Transformer):
        def forward(self, inputs, targets, cu_seqlens):
            loss = super().forward(inputs, targets, cu_seqlens=cu_seqlens)
            if torch.equal(inputs, bad[0][4:]):
                seen.append(sorted(set(cu_seqlens.tolist())))
                loss = loss * torch.inf
            return loss

    monkeypatch.setattr(learner, "Transformer", Model)
    with pytest.raises(TrainingDiverged, match="step 4 is the first, which"):
        train(config, console=quiet)
    assert replay(config.out_dir / "diverged" / "step-00000003").reproduced
    assert len(seen) == 4  # the run, the search, the replay and its search of a module
    assert all(bounds == sorted(set(bad[2][1].tolist())) for bounds in seen)
