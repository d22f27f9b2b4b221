"""The command line: light to start, one sentence on bad input."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from rooflight.bench.cli import main


def rooflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as its entry point runs it, in this process: torch is imported already."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["rooflight", *arguments])
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys\nfrom rooflight.bench.cli import app\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "print(result.output)\n"
        "assert result.exit_code == 0\n"
        "heavy = {'torch', 'triton', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for command in ("tokenizer", "train", "generate", "estimate", "bench", "demo"):
        assert command in result.stdout


@pytest.mark.parametrize("command", [("estimate",), ("train",), ("bench", "validate")])
def test_help_shows_a_tables_name_in_its_brackets(command):
    assert "[model]" in rooflight(*command, "--help").stdout


def test_version():
    assert rooflight("--version").stdout.startswith("rooflight 0.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("estimate", "gpt2-xxl"), "did you mean 'gpt2-xl'"),
        (("estimate", "nowhere.toml"), "nowhere.toml"),
        (("estimate", "tiny", "--context-length", "4096"), "at most the model's 256 positions, got 4096"),
        (("bench", "paths", "--arch", "sm_9000"), "arch: expected one of"),
        (("demo", "--text", "nowhere.txt", "--out", "{tmp}/demo"), "nowhere.txt: no such file"),
        (("generate", "{tmp}/no-run", "--tokenizer", "{tmp}/no-tokenizer"), "no-tokenizer"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path):
    result = rooflight(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_estimate_prints_the_published_figures():
    result = rooflight("estimate", "gpt2-xl", "--causal", "full", "--json")
    assert result.returncode == 0, result.stderr
    assert '"parameters": 1555126400' in result.stdout
    assert '"forward_flops": 3506703564800' in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be tuned for")
def test_tuning_without_a_gpu_is_one_sentence():
    result = rooflight("bench", "tune")
    assert result.returncode == 2
    assert result.stderr == (
        "rooflight: bench tune: expected a GPU to time on, found none; the tiles that ship work without\n"
    )


def test_the_paths_of_a_gpu_that_is_not_here_are_shown():
    result = rooflight("bench", "paths", "--arch", "sm_90")
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "attention on sm_90" in shown
    for word in ("portable", "measured", "softcap", "fp32"):
        assert word in shown
