"""The demo as a user runs it: a process of its own, on a small text, interrupted and taken up again."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from rich.console import Console
from torch._inductor import config as inductor

from rooflight.bench import cli, demo
from rooflight.bench.measure.harness import machine
from rooflight.bench.predict import validate
from rooflight.bench.rates import ceilings
from rooflight.bench.rates.ceilings import save_ceilings
from rooflight.model.ceilings import Ceilings
from rooflight.tokenizer import IncrementalDecoder
from rooflight.training.config import TrainConfig
from rooflight.training.loop import TrainResult

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
CODE = """
import sys
from rooflight.bench.cli import main
from rooflight.bench.predict import validate
validate.STEP_SECONDS = 0.5
sys.exit(main())
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Our own sources as text, few steps, everything below tmp_path."""
    out = str(tmp_path / "demo")
    return [sys.executable, "-c", CODE, "demo", "--text", str(ROOT / "kernels"), "--out", out, "--vocab-size", "400"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Plain CPU: what the demo runs without a GPU, not the interpreter."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # the ceilings take most of a minute to measure: these stand for an earlier measurement
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = machine(CPU)
    known = Ceilings(
        dict.fromkeys(("bfloat16", "float32"), 1e11), 1e10, device=where["device"], versions={"torch": where["torch"]}
    )
    save_ceilings(known, CPU)
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "160"}


def logged_steps(out: Path) -> int:
    log = out / "training" / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_interrupted_resumed_and_finished(
    tmp_path: Path,
    command: list[str],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "demo"
    arguments = [*command, "--device", "cpu", "--seconds", "600", "--steps", "16"]

    first = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while logged_steps(out) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 130, text
    assert "The same command goes on from step" in text

    second = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "bits per byte" in second.stdout
    assert "16 steps" in second.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["quantity"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["parameters"]["ratio"] == rows["matrix FLOPs"]["ratio"] == 1
    assert rows["step time"]["predicted"] > 0
    assert rows["peak memory"]["ratio"] == pytest.approx(1, abs=0.02)

    monkeypatch.setattr(sys, "argv", ["rooflight", *arguments[3:], "--vocab-size", "500"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "vocab_size 400, not 500" in capsys.readouterr().err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(2500)))
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """What an earlier demo left."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "demo.json").write_text('{"text": null, "vocab_size": 1024}\n')
    (folder / "tokenizer").mkdir()
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"text": "typo.txt"}, "typo.txt: no such file"),
        ({"text": "text.txt.gz"}, "compressed by gzip"),
        ({"text": "short.txt"}, "needs at least 65,536"),
        ({"vocab_size": 256}, "vocab_size: expected 257"),
        ({"vocab_size": 1 << 30}, "vocab_size: expected 257"),
        ({"seconds": 0.0}, "max_seconds must be positive"),
        ({"steps": 0}, "max_steps must be at least 1"),
        ({"device": "gpu"}, "device must be auto"),
        ({"out_dir": "taken"}, "taken holds files, and no demo's"),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_wrong_is_said_before_anything_is_written_or_moved(
    wrong: dict, error: str, fresh: bool, tmp_path: Path, text: Path, made: Path
):
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    (tmp_path / "short.txt").write_text("short\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    wrong = {name: tmp_path / value if name in ("text", "out_dir") else value for name, value in wrong.items()}
    right = {"text": text, "out_dir": made if fresh else tmp_path / "new", "device": "cpu", "fresh": fresh}
    with pytest.raises((ValueError, OSError), match=error):
        demo.run_demo(demo.DemoConfig(**(right | wrong)), quiet())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("n_layer", [4, 2])
def test_a_demo_of_another_model_does_not_go_on(n_layer: int, made: Path, monkeypatch: pytest.MonkeyPatch):
    """As a version's whose model had two blocks."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt("its data")

    monkeypatch.setattr(demo, "prepare_data", stop)
    config = demo.DemoConfig(out_dir=made, device="cpu")
    begun = demo.demo_training(config, CPU)
    begun = replace(begun, model=replace(begun.model, n_layer=n_layer))
    begun.out_dir.mkdir()
    (begun.out_dir / "config.json").write_text(json.dumps(begun.to_dict()))
    goes_on = n_layer == demo.demo_training(config, CPU).model.n_layer
    end = (KeyboardInterrupt, "its data") if goes_on else (ValueError, "made holds a demo of another model.*--fresh")
    with pytest.raises(end[0], match=end[1]):
        demo.run_demo(config, quiet())


def test_a_fresh_start_sets_only_demos_aside(tmp_path: Path, text: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "prepare_data", stop)
    (tmp_path / "made.previous").mkdir()  # somebody's own
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(demo.DemoConfig(text=text, out_dir=made, device="cpu", fresh=True), quiet())
    assert list((tmp_path / "made.previous").iterdir()) == []
    assert json.loads((tmp_path / "made.previous-2" / "demo.json").read_text())["text"] == str(text)
    assert json.loads((made / "demo.json").read_text())["text"] == str(text)
    assert not (tmp_path / "made.previous-3").exists()


def test_ends_well_without_matplotlib_and_with_nowhere_to_keep_rates(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    """As from a plain wheel, in a container whose user has no home."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(text))
    where = machine(CPU)
    rates = Ceilings(dict.fromkeys(("bfloat16", "float32"), 1e11), 1e10, device=where["device"])
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_, keep, **__: (keep(rates), rates)[1])
    monkeypatch.setattr(validate, "STEP_SECONDS", 0.01)
    monkeypatch.setattr(demo, "step_seconds", lambda *_: 0.1)
    console, out = quiet(), tmp_path / "demo"
    config = demo.DemoConfig(text=text, out_dir=out, vocab_size=300, device="cpu", steps=2, sample_tokens=2)
    assert demo.run_demo(config, console) == 0
    told = " ".join(console.file.getvalue().split())
    assert told.startswith("No loss curve will be drawn: plots need matplotlib")
    assert "pip install 'rooflight[demo]'" in told
    assert "bits per byte" in told
    assert json.loads((out / "results.json").read_text())["rows"]
    assert not (out / "loss.png").exists()


def training(out: Path, **changes: float) -> TrainConfig:
    return demo.demo_training(demo.DemoConfig(out_dir=out, device="cpu", **changes), CPU)


@pytest.mark.parametrize(
    ("times", "broken", "changes", "dtype", "compiles", "why"),
    [
        (
            (0.05, 0.5),
            None,
            {},
            "float32",
            True,
            "In float32: a step of one sequence takes 50 ms, in bfloat16 500; com",
        ),
        ((0.5, 0.05), None, {}, "bfloat16", True, "In bfloat16: a step of one sequence takes 50 ms, in float32 500; c"),
        ((0.05, 0.5), "no g++", {}, "float32", False, "not compiled: no g++."),
        ((0.05, 0.5), None, {"seconds": 60.0}, "float32", False, "not compiled: that pays from 120 seconds"),
        ((0.05, 0.5), None, {"steps": 24}, "float32", False, "not compiled: that pays from 120 seconds"),
    ],
)
def test_a_cpu_takes_the_faster_dtype_and_compiles_where_that_pays(
    times: tuple, broken: str | None, changes: dict, dtype: str, compiles: bool, why: str, tmp_path: Path, monkeypatch
):
    by_dtype = dict(zip(("float32", "bfloat16"), times, strict=True))
    monkeypatch.setattr(demo, "step_seconds", lambda run, dtype, device: by_dtype[dtype])
    monkeypatch.setattr(demo, "no_compiler", lambda: broken)
    run, told = demo.fastest_on_cpu(training(tmp_path, **changes), CPU)
    assert (run.dtype, run.compile) == (dtype, compiles)
    assert why in told
    assert "\n" not in told


def test_a_run_that_has_begun_keeps_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = training(tmp_path, seconds=60.0)
    run.out_dir.mkdir(parents=True)
    (run.out_dir / "config.json").write_text(json.dumps(run.to_dict()))
    monkeypatch.setattr(demo, "step_seconds", lambda run, dtype, device: {"float32": 0.001, "bfloat16": 0.002}[dtype])
    run, told = demo.fastest_on_cpu(run, CPU)
    assert run.dtype == "bfloat16"
    assert told.startswith("In bfloat16, as it began; ")


def test_without_a_compiler_that_works_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    why = demo.no_compiler()
    assert why is not None
    assert why.startswith("torch.compile needs a C++ compiler that works (")
    assert "\n" not in why


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_with_one_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert demo.no_compiler() is None
    assert list(tmp_path.rglob("*.so"))  # kept for the next run


@pytest.mark.parametrize("home", [True, False])
def test_compiled_code_is_kept_for_the_next_run(home: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("cache" if home else "file")))
    demo.keep_compiled_code(tmp_path / "out")
    kept = tmp_path / "cache" / "rooflight" / "compiled" if home else tmp_path / "out" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)
    assert os.environ.get("TRITON_CACHE_DIR") == (None if home else str(kept / "triton"))


def test_a_sample_is_printed_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whole characters only, each once, and what a generation in one go gives."""
    text = "Nat\u00fcrlich \u20ac" * 8

    class Bytes:
        def encode(self, prompt: str) -> list[int]:
            return list(prompt.encode())

        def decode_bytes(self, tokens: list[int]) -> bytes:
            return bytes(tokens)

        def decoder(self) -> IncrementalDecoder:
            return IncrementalDecoder(self)

    def goes_on(model: object, tokens: torch.Tensor, n_new: int, **_: object) -> Iterator[torch.Tensor]:
        start = tokens.shape[1]
        return (torch.tensor([[i]]) for i in text.encode()[start : start + n_new])

    printed = []
    monkeypatch.setattr(demo, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(demo, "stream", goes_on)
    console = quiet()
    monkeypatch.setattr(console, "print", lambda *a, **_: printed.append("".join(a)))
    config = demo.DemoConfig(out_dir=tmp_path, device="cpu", prompt="N", sample_tokens=len(text.encode()) - 1)
    demo.print_sample(config, training(tmp_path), Bytes(), CPU, console)
    assert "".join(printed) == text
    assert len(printed) > 4


def test_exits_non_zero_when_the_loss_does_not_fall(capsys: pytest.CaptureFixture[str]):
    def result(before: float, after: float) -> TrainResult:
        return TrainResult(
            step=2,
            train_loss=after,
            val_loss=after,
            first_val_loss=before,
            val_bits_per_byte=after,
            seconds=1.0,
            tokens=2,
            tokens_per_second=2.0,
            mfu=0.1,
            peak_flops=1.0,
            peak_memory_bytes=1,
            step_seconds=0.5,
            stopped="steps",
            checkpoint=Path("checkpoint"),
        )

    assert demo.conclude(result(3.0, 2.0), Console()) == 0
    assert demo.conclude(result(3.0, 3.0), Console()) == 1
    assert "did not fall" in capsys.readouterr().out
