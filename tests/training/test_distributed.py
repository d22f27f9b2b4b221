"""A run on several processes is the run of one: losses, gradients, parameters; and what ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from rooflight.kernels import reference
from rooflight.model import Transformer
from rooflight.training.checkpoint import list_checkpoints, load_model
from rooflight.training.config import TrainConfig
from rooflight.training.distributed import World, fully_sharded, shard_rows
from rooflight.training.loop import train
from support.ranks import free_port, on_ranks
from support.runs import assert_equal, log_of, weights_of
from support.together import CASES, DEEP, RUNS, everything, learn_all, of

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    torch.set_num_threads(1)
    return learn_all()


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all tensors as one vector, the error's norm over the vector's; of no tensor may it be three times as much."""
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - x).norm() for name, x in expected.items()}
    whole = torch.stack(list(errors.values())).norm() / torch.stack([x.norm() for x in expected.values()]).norm()
    return max(whole.item(), *(errors[name].item() / x.norm().item() / 3 for name, x in expected.items()))


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_are_one(
    tmp_path: Path, alone: dict[str, Any], config: TrainConfig, size: int, quiet: Any
) -> None:
    """12 rows, of which 2 or 3 processes have 6 or 4 each. Rows of most parameters do not divide by 3."""
    run = replace(config, batch_size=12, gradient_accumulation=2, max_steps=9, eval_every=4, checkpoint_every=4)
    run = replace(run, log_every=1, optimizer="muon")
    told = on_ranks(size, tmp_path, everything, tmp_path, run)
    check_steps([of_rank["learn_all"] for of_rank in told], alone)
    check_assignment([of_rank["assignment"] for of_rank in told])
    check_runs([of_rank["runs"] for of_rank in told], run, quiet)
    check_failure([of_rank["fails"] for of_rank in told])
    check_beginning([of_rank["begins"] for of_rank in told])
    trained = dict(load_model(told[0]["runs"]["ddp"].checkpoint).named_parameters())
    for of_rank in told:
        assert_equal(of_rank["begins from"]["parameters"], trained)


def check_beginning(told: list[dict[str, Any]]) -> None:
    """fsdp's values are those that one process draws, and no process has ever had all of them."""
    torch.manual_seed(0)
    expected = dict(Transformer(DEEP).named_parameters())
    largest = max(p.nbytes for p in expected.values())
    for found in told:
        assert_equal(found["parameters"], expected)
        # one parameter's values are whole, and torch's truncated normal has two tensors more of as many
        assert found["held"] + largest <= found["peak"] < found["held"] + 3.5 * largest


def check_steps(told: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name in CASES:
        expected = alone[name]
        for found in (of_rank[name] for of_rank in told):
            for step, (ours, theirs) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), (name, step)
                assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-6), (name, step)
                assert off(ours["gradients"], theirs["gradients"]) < 1e-6, (name, step)
            assert off(found["parameters"], expected["parameters"]) < 1e-6, name
            if found["sent"] is not None and name.startswith("ddp"):  # once a step, however many micro-batches it has
                ring = 2 * (len(told) - 1) / len(told) * sum(p.nbytes for p in found["parameters"].values())
                assert found["sent"] == pytest.approx(ring, rel=0.1), name
            assert all(torch.equal(p, told[0][name]["parameters"][n]) for n, p in found["parameters"].items()), name


def check_assignment(told: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(told):
        drawn = {"embedding.weight", "first.weight", "head.weight", "head.bias"}
        assert found.pop("ddp took rank 0's") == (drawn if rank else set())
        for name, value in found.items():
            if isinstance(value, bool):
                assert value, name
            elif isinstance(value, float):
                assert value < (1e-3 if "float16" in name else 1e-6), name
    linear, others = 16 * 16, 2 * 50 * 16  # numbers of a Toy's matrices, of which a tied one has one less
    for name in "fsdp None held", "fsdp torch.float16 held":
        assert sum(found[name] for found in told) == 2 * linear + others
    states = [found["states here"] for found in told]
    assert sum(states) == linear + others + 16
    assert max(states) < sum(states)


def check_runs(told: list[dict[str, Any]], config: TrainConfig, quiet: Any) -> None:
    for parallel in RUNS:
        first, mine = told[0][parallel], of(config, parallel)
        single = replace(mine, parallel="none", out_dir=config.out_dir.with_name(f"without {parallel}"))
        expected = train(single, console=quiet)
        records = log_of(single)
        found = log_of(mine)  # which the first process has written, and no other
        assert [r["step"] for r in found] == [r["step"] for r in records]
        for name in "loss", "grad_norm", "val_loss", "lr", "muon_lr":
            assert [r.get(name, 0) for r in found] == pytest.approx([r.get(name, 0) for r in records], rel=2e-6), name
        assert off(weights_of(first), weights_of(expected)) < 1e-6
        for result in (of_rank[parallel] for of_rank in told):
            assert (result.step, result.stopped, result.tokens) == (9, "steps", expected.tokens)
            assert (result.val_loss, result.checkpoint) == (first.val_loss, first.checkpoint)
    for result in (of_rank["interrupted"] for of_rank in told):
        assert (result.step, result.stopped, result.signal) == (6, "interrupted", 15)


def check_failure(told: list[tuple[str, str, float]]) -> None:
    *others, last = told
    assert last[:2] == ("RuntimeError", "power cut")
    for kind, text, _ in others:
        assert kind == "LostPeer", text
        assert "whose own error says why; the last checkpoint is none" in text
    assert max(seconds for *_, seconds in told) < 60  # and not the timeout of a collective


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"WORLD_SIZE": "3"}, {}, "one of WORLD_SIZE 3, .* set parallel"),
        ({"WORLD_SIZE": "0"}, {}, "WORLD_SIZE: expected a whole number of at least 1, got '0'"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE: expected a whole number of at least 1, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, {}, "RANK: expected .* at least 0 and below WORLD_SIZE 2, got '2'"),
        (
            {"WORLD_SIZE": "3"},
            {"parallel": "ddp", "gradient_accumulation": 2},
            "batch_size must be a multiple of 3 processes times gradient_accumulation 2, got 8",
        ),
        (
            {"WORLD_SIZE": "2"},
            {"parallel": "fsdp", "device": "cuda:1"},
            "device must be auto, cuda or cpu in a run of 2",
        ),
    ],
)
def test_refuses(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, environment: dict, options: dict, message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(replace(config, **options))
    assert not config.out_dir.exists()


def test_torchrun_is_told_of_a_batch_that_cannot_be_divided(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "error.json"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    with pytest.raises(ValueError, match="a multiple of 3 processes"):
        train(replace(config, parallel="ddp"))
    assert "a multiple of 3 processes" in told.read_text()


def test_each_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4, 1).device_name("auto") == World(3, 4, 1).device_name("cuda") == "cuda:1"
    assert (World(3, 4, 1).device_name("cpu"), World().device_name("auto")) == ("cpu", "auto")
    with pytest.raises(ValueError, match="device: process 2 of this machine has no GPU, of 2"):
        World(2, 4, 2).device_name("auto")


def test_rows_are_divided() -> None:
    for size in 1, 2, 3, 7:
        rows = [range(12)[World(rank, size).rows(12)] for rank in range(size)]
        assert [i for some in rows for i in some] == list(range(12))
        shards = [shard_rows(12, size, rank) for rank in range(size)]
        assert [count for _, count in shards if count] == [len(x) for x in torch.arange(12).chunk(size)]
        assert [i for first, count in shards for i in range(first, first + count)] == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_restarts_a_run_where_it_stood_and_names_the_error(
    config: TrainConfig, tmp_path: Path, machines: int
) -> None:
    """Each of two lives has four steps before its fault: checkpoints of the 3rd and, gone on from it, the 6th."""
    toml = tmp_path / "run.toml"
    model = "\n".join(f"{k} = {v}" for k, v in config.model.to_dict().items() if type(v) is int)
    toml.write_text(
        f'train_data = "{config.train_data}"\nout_dir = "{config.out_dir}"\nparallel = "ddp"\nbatch_size = 8\n'
        f'dtype = "float32"\ndevice = "cpu"\npeak_flops = 1e9\ncheckpoint_every = 3\nlog_every = 1\n[model]\n{model}\n'
    )
    command = (
        f"-m torch.distributed.run --nnodes {machines} --nproc-per-node {2 // machines} --max-restarts 1 "
        f"--rdzv-backend c10d --rdzv-id x --rdzv-endpoint 127.0.0.1:{0 if machines == 1 else free_port()}"
    )
    launches = [
        subprocess.Popen(
            [sys.executable, *command.split(), "-m", "support.faulty_run", "train", "--config", str(toml)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(machines)
    ]
    told = [launch.communicate(timeout=300)[1] for launch in launches]
    assert all(launch.returncode for launch in launches), told
    errors = "".join(told)
    assert "going on from step 3" in errors
    assert any("RuntimeError: power cut" in text.partition("Root Cause")[2] for text in told)
    assert "lost another of the 2, whose own error says why" in errors
    assert [p.name for p in list_checkpoints(config.out_dir / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert [r["step"] for r in log_of(config)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_model_is_sharded_where_it_is_or_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta that is not to be seen, and torch chooses; beside a GPU a model on a CPU stays there."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            module = nn.Linear(4, 4)
        fully_sharded(module).to_empty(device="cpu")
        assert module(torch.ones(2, 4)).shape == (2, 4)
        monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
        module = fully_sharded(nn.Linear(4, 4))
        assert module.weight.device_mesh.device_type == "cpu"
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_sharded_blocks_share_their_compilations() -> None:
    """The compiler's front end: torch gives up on a function that it has compiled eight times."""
    torch._dynamo.reset()
    counters.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = Transformer(replace(DEEP, n_layer=9, vocab_size=32, d_model=16, d_ff=16), ops=reference)
        tokens = torch.arange(32).view(2, 16)
        expected = model(tokens, tokens)
        fully_sharded(model, model.layers)
        loss = torch.compile(model, backend="eager")(tokens, tokens)
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert loss.item() == expected.item()
    assert counters["stats"]["unique_graphs"] == 4  # before the blocks, the first, any other, after them
