"""The command line: light to start, one sentence on bad input."""

import errno
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from rooflight.bench import cli
from rooflight.bench.commands import estimate
from rooflight.training.loop import TrainingDiverged


def rooflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as its entry point runs it, in this process: torch is imported already."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["rooflight", *arguments])
        try:
            cli.main()
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


@pytest.fixture
def main(monkeypatch, capsys):
    """The command line in this process: (status, standard error), or whatever it lets through."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rooflight", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("estimate", "gpt2-xxl"), "did you mean 'gpt2-xl'"),
        (("estimate", "nowhere.toml"), "nowhere.toml"),
        (("estimate", "tiny", "--context-length", "4096"), "at most the model's 256 positions, got 4096"),
        (("bench", "paths", "--arch", "sm_9000"), "arch: expected one of"),
        (("demo", "--text", "nowhere.txt", "--out", "{tmp}/demo"), "nowhere.txt: no such file"),
        (("tokenizer", "train", "{tmp}/x", "--out", ""), "out: expected a path, got ''"),
        (("tokenizer", "encode", "", "--tokenizer=."), "files: expected a path, got ''"),
        (("eval", "", "{tmp}/x", "--tokenizer", "."), "model: expected a path, got ''"),
        (("tokenizer", "train", __file__, "--out", __file__, "-q"), "test_cli.py is no folder"),
        (("tokenizer", "train", __file__, "--out", "{tmp}", "--pattern", "", "-q"), "pattern: got '', expected one of"),
        (("tokenizer", "encode", "x", "--text", "x", "--tokenizer", "{tmp}"), "got both a file and --text"),
        (("tokenizer", "bench", __file__, "--repeats", 0), "repeats: expected"),
        (("tokenizer", "bench", __file__, "--megabytes", "nan"), "megabytes: expected"),
        (("tokenizer", "bench", __file__, "--megabytes", -1), "megabytes: expected"),
        (("tokenizer", "bench", __file__, "--peer", "tiktokens"), "peer: expected"),
        (("tokenizer", "bench", __file__, "--vocab-size", 3), "vocab_size: got 3, expected"),
        (("tokenizer", "bench", "nowhere.txt"), "nowhere.txt"),
        (
            ("bench", "step", "tiny", "--seconds", "nan", "--device", "cpu"),
            "seconds: expected a finite number > 0, got nan",
        ),
        (("bench", "step", "tiny", "--dtype", "foo", "--device", "cpu"), "dtype: expected a floating-point dtype"),
        (("bench", "step", "tiny", "--context-length", 0, "--device", "cpu"), "context_length: expected a whole"),
        (("bench", "kernels", "--seconds", "nan"), "seconds: expected > 0, got nan"),
        (("generate", "{tmp}/no-run", "--tokenizer", "{tmp}/no-tokenizer"), "no-tokenizer"),
    ],
)
def test_bad_input_is_one_sentence(main, arguments, sentence, tmp_path):
    code, shown = main(*(str(argument).format(tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert sentence in shown
    assert "Traceback" not in shown
    assert shown.count("\n") == 1


def test_traceback_shows_one_wherever_it_stands(main):
    for arguments in (("--traceback", "estimate", "gpt2-xxl"), ("estimate", "gpt2-xxl", "--traceback")):
        with pytest.raises(ValueError, match="did you mean"):
            main(*arguments)
    code, shown = main("estimate", "--", "--traceback")
    assert code == 2
    assert shown.startswith("rooflight: preset: no preset '--traceback'")


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "state.pt"), 1, "No space left on device: 'state.pt'\n"),
        (OSError(errno.EFBIG, "File too large", "state.pt"), 1, "File too large: 'state.pt'\n"),  # ulimit -f
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "Permission denied: 'runs'\n"),
        (
            TrainingDiverged("loss nan, gradient norm nan by step 3"),
            1,
            "rooflight: loss nan, gradient norm nan by step",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1, "Tried; a smaller batch_size, or more grad"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "a smaller batch_size",
        ),
        (ModuleNotFoundError("No module named 'matplotlib'"), 2, "rooflight: No module named 'matplotlib'\n"),
        (KeyError("weight"), 2, "rooflight: KeyError: 'weight' (--traceback shows where)\n"),
    ],
)
def test_what_fails_ends_in_a_sentence_and_a_status(main, monkeypatch, error, status, sentence):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("rooflight.model.estimate", fail)
    code, shown = main("estimate", "tiny")
    assert code == status
    assert sentence in shown
    assert shown.startswith("rooflight: ")
    assert shown.count("\n") == 1


def test_estimate_prints_the_published_figures():
    result = rooflight("estimate", "gpt2-xl", "--causal", "full", "--json")
    assert result.returncode == 0, result.stderr
    assert '"parameters": 1555126400' in result.stdout
    assert '"forward_flops": 3506703564800' in result.stdout


def test_estimate_takes_a_link_in_gigabytes_per_second():
    asked = ("estimate", "gpt2-xl", "--gpus", "8", "--parallel", "ddp", "--link", "50")
    result = rooflight(*asked)
    assert "ddp over 8 GPUs: each sends 10.9 GB a step" in result.stdout
    assert "at 50.0 GB/s that takes 217.72 ms" in result.stdout
    assert '"link": 50000000000.0' in rooflight(*asked, "--json").stdout
    for gpus, link in ((1, 50.0), (8, 0.0)):
        with pytest.raises(ValueError, match=rf"--link: expected GB/s > 0, .*, got {link:g} and --gpus {gpus}"):
            estimate("gpt2-xl", gpus=gpus, link=link)


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
