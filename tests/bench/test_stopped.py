"""Commands that end in the middle of writing: by a signal, or on a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rooflight.bench import cli
from rooflight.model import ModelConfig, Transformer
from rooflight.model.hf import save_hf
from rooflight.tokenizer import Tokenizer
from rooflight.training.checkpoint import save_checkpoint

# A signal comes while the output is open, before there is a task.
STOPPED = """
import os, sys
from pathlib import Path
from rooflight.bench import cli
from rooflight.tokenizer import encode_file

number, folder, *sys.argv[1:] = sys.argv[1:]

def stopped(*given):
    assert list(Path(folder).glob("*.tmp"))
    os.kill(os.getpid(), int(number))
    yield from ()

encode_file.blocks = stopped
cli.main()
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    vocab = {0: b"<|endoftext|>"} | {i + 1: bytes([i]) for i in range(256)}
    Tokenizer(vocab, [], ["<|endoftext|>"]).save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("a text " * 1000)
    return tmp_path / "tokenizer"


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file may have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_file_of_encode(tokenizer: Path, tmp_path: Path, number: int):
    out = tmp_path / "out"
    out.mkdir()
    command = ["tokenizer", "encode", tmp_path / "text.txt", "-t", tokenizer, "-q", "--out", out / "text.bin"]
    done = subprocess.run([sys.executable, "-c", STOPPED, str(number), out, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert not [*out.iterdir()]


def test_a_full_disk_names_the_file_and_leaves_none(tokenizer, tmp_path, monkeypatch, capsys):
    command = ["tokenizer", "encode", tmp_path / "text.txt", "-t", tokenizer, "-q", "--out", tmp_path / "x.bin"]
    monkeypatch.setattr(sys, "argv", ["rooflight", *map(str, command)])
    with full_disk(1000), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert (
        capsys.readouterr().err == f"rooflight: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{tmp_path}/x.bin'\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "tokenizer"]


@pytest.mark.parametrize("save", ["save_hf", "save_checkpoint"])
def test_a_full_disk_is_an_oserror_that_has_its_number(save, tmp_path):
    """safetensors writes both files of weights, and says the number in words."""
    model = Transformer(ModelConfig(300, 16, 1, 2, d_model=16))
    with full_disk(10_000), pytest.raises(OSError, match=r"^could not write .*File too large") as failed:
        save_hf(model, tmp_path / "hf") if save == "save_hf" else save_checkpoint(tmp_path, model, [], step=1)
    assert failed.value.errno == errno.EFBIG
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
