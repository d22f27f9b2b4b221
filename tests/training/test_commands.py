from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rooflight.bench.cli import main
from rooflight.training import loop
from rooflight.training.commands import app


@pytest.fixture
def arguments(write_tokens, tmp_path) -> list[str]:
    toml = tmp_path / "run.toml"
    tokens = write_tokens(list(range(32)) * 20)
    toml.write_text(
        f"train_data = '{tokens}'\nval_data = '{tokens}'\nout_dir = '{tmp_path}/run'\nmax_steps = 3\nbatch_size = 2\n"
        "dtype = 'float32'\nkernels = 'eager'\ndevice = 'cpu'\npeak_flops = 1e9\n"
        "[model]\nvocab_size = 32\ncontext_length = 8\nn_layer = 1\nn_head = 2\nd_model = 16\n"
    )
    return ["train", "--config", str(toml)]


def test_train_with_overrides(arguments, tmp_path):
    result = CliRunner().invoke(app, [*arguments, "--max-steps", "4", "--lr", "0.01", "--optimizer", "adamw"])
    assert result.exit_code == 0, result.output
    assert "4 steps, 64 tokens" in result.output
    assert "bits per byte" in result.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["max_steps"], config["lr"], config["optimizer"], config["batch_size"]) == (4, 0.01, "adamw", 2)

    result = CliRunner().invoke(app, [*arguments, "--max-steps", "6", "--optimizer", "adamw", "--resume"])
    assert result.exit_code == 0, result.output
    assert "6 steps" in result.output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lr", "-1"], "lr must be positive"),
        (["--lr", "fast"], "--lr must be a number, got 'fast'"),
        (["--max-seconds", "long"], "--max-seconds must be a number or none, got 'long'"),
        (["--betas", "0.9"], "betas must be two numbers"),
        (["--train-data", "absent.bin"], "no token file"),
        (["--preset", "tinny"], "no preset 'tinny'"),
        (["--device", "abacus"], "device must be auto or a torch device, got 'abacus'"),
        (["--batch-size", str(10**12)], "fits (predicted)"),
        (["--seed", str(2**64)], "seed must be at least 0 and below"),
        (["--resume", "--overwrite"], "overwrite must be false where resume is true"),
        (["--model.n_head", "3"], "d_model: expected a multiple of n_head (3)"),
        (["--model.n_layer", "none"], "--model.n_layer must be a whole number, got 'none'"),
        (["--device", "xla"], "device must be one that torch has here, got 'xla'"),
        (["--device", "meta"], "device must be one that torch has here, got 'meta'"),
    ],
)
def test_errors_name_the_option(arguments, tmp_path, extra, message):
    """rooflight.bench.cli turns them into one sentence and status 2."""
    result = CliRunner().invoke(app, [*arguments, *extra])
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_signals(arguments, monkeypatch, number, status):
    class Received(loop.StopSignals):
        received = property(lambda self: number, lambda self, value: None)

    monkeypatch.setattr(loop, "StopSignals", Received)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status
    assert "1 steps" in result.output
    assert "interrupted" in result.output


def test_training_that_fails_exits_with_1(arguments, tmp_path, monkeypatch, capsys):
    """A limit on the size of files stands in for a disk that fills up: the first checkpoint is larger than that."""
    monkeypatch.setattr(sys, "argv", ["rooflight", *arguments])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"rooflight: could not write .*/step-00000003: .*too large.*; the last checkpoint is none", last
    )
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_importing_the_commands_does_not_import_torch():
    code = "import sys, rooflight.training.commands; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
