from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

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


def test_errors_are_one_line(arguments, tmp_path):
    for extra, message in (
        (["--lr", "-1"], "lr must be positive"),
        (["--train-data", "absent.bin"], "no token file"),
        (["--preset", "tinny"], "no preset 'tinny'"),
    ):
        result = CliRunner().invoke(app, [*arguments, *extra])
        assert result.exit_code == 1
        assert result.stderr.startswith("rooflight train: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_interrupted_exits_like_a_shell(arguments, monkeypatch):
    class Interrupted(loop.StopSignals):
        received = property(lambda self: True, lambda self, value: None)

    monkeypatch.setattr(loop, "StopSignals", Interrupted)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert "1 steps" in result.output
    assert "interrupted" in result.output


def test_importing_the_commands_does_not_import_torch():
    code = "import sys, rooflight.training.commands; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
