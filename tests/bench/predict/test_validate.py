"""Predicted first, then measured; and bad input named in a sentence."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rooflight.bench.bench_commands import bench
from rooflight.bench.commands import estimate
from rooflight.bench.measure.harness import machine
from rooflight.bench.predict import validate as module
from rooflight.bench.predict.step import Step
from rooflight.bench.predict.validate import ComponentRow, Row, Validation, predict, read_model, validate
from rooflight.bench.rates.ceilings import save_ceilings
from rooflight.bench.reports.terminal import show
from rooflight.model import PRESETS, Ceilings, ModelConfig

CPU = torch.device("cpu")
SMALL = ModelConfig(128, 64, 2, 4, n_kv_head=2, d_model=64, d_ff=96)
TOML = """[model]
vocab_size = 128
context_length = 64
n_layer = 2
n_head = 4
n_kv_head = 2
d_model = 64
d_ff = 96
"""


@pytest.fixture(autouse=True)
def _ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "STEP_SECONDS", 0.0)
    where = machine(CPU)
    rates = {"float32": 1e11, "bfloat16": 2e11}
    save_ceilings(Ceilings(rates, 1e10, device=where["device"], versions={"torch": where["torch"]}), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_and_its_components(dtype: str, tmp_path: Path):
    predictions = tmp_path / "predicted.json"
    (done,) = validate({"small": SMALL}, CPU, batch_size=4, context_length=48, dtype=dtype, predictions=predictions)
    assert done.notes[0].startswith("no rate was measured of attention, gemm, ")
    rows = {row.quantity: row for row in done.rows}
    assert rows["parameters"].ratio == rows["matrix FLOPs"].ratio == 1
    assert rows["peak memory"].ratio == pytest.approx(1, abs=0.02)
    assert rows["step time"].measured == pytest.approx(1e3 * done.step_seconds)
    assert rows["throughput"].measured == pytest.approx(4 * 48 / done.step_seconds / 1e3)
    assert all(row.measured > 0 and row.predicted > 0 for row in done.components)
    # the components' predictions are the step's
    assert sum(row.predicted for row in done.components) == pytest.approx(done.predicted.seconds)
    written = json.loads(predictions.read_text())
    assert written["kind"] == "prediction"
    assert written["machine"] == machine(CPU)  # with its versions and date
    assert written["predictions"]["small"]["seconds"] == done.predicted.seconds


def test_of_several_runs_the_medians_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = iter([5.0, 50.0, 1.0, 20.0, 9.0, 30.0])

    def measure(name, e, *rest):
        seconds = next(steps)
        row = Row("step time", "ms", 2.0, 1e3 * seconds, "")
        return Validation(name, e, (row,), (ComponentRow("FFN", 1.0, seconds / 2),), seconds)

    monkeypatch.setattr(module, "_measure", measure)
    a, b = validate({"a": SMALL, "b": SMALL}, CPU, batch_size=1, runs=3, predictions=tmp_path / "predicted.json")
    assert (a.name, a.step_seconds, a.rows[0].measured, a.components[0].measured) == ("a", 5.0, 5000.0, 2.5)
    assert (b.name, b.step_seconds, b.rows[0].measured, b.components[0].measured) == ("b", 30.0, 30000.0, 15.0)


@pytest.mark.parametrize(
    "path", sorted((Path(module.__file__).parents[1] / "models").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_models_that_come_along_are_read(path: Path):
    name, config = read_model(str(path))
    assert name == path.stem
    predict(config, batch_size=1, context_length=None, dtype="float32", device=CPU)


def test_muon_beside_adamw(tmp_path: Path):
    sizes = {"batch_size": 1, "dtype": "float32", "optimizer": "muon"}
    (done,) = validate({"small": SMALL}, CPU, **sizes, predictions=tmp_path / "predicted.json")
    assert {"AdamW", "Muon"} <= {row.name for row in done.components if row.measured > 0}
    assert "Muon" in next(row.what for row in done.rows if row.quantity == "step time")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_in_fp8(dtype: str, tmp_path: Path):
    """The step multiplies in it, its memory is fp8's, and the components are predicted and measured as it does."""
    sizes = {"batch_size": 4, "context_length": 48, "dtype": dtype, "fp8": True}
    (done,) = validate({"small": SMALL}, CPU, **sizes, predictions=tmp_path / "predicted.json")
    rows = {row.quantity: row for row in done.rows}
    assert rows["matrix FLOPs"].ratio == 1
    assert rows["peak memory"].ratio == pytest.approx(1, abs=0.01)
    assert rows["step time"].what.endswith("AdamW, fp8")
    assert "casts" not in {row.name for row in done.components}  # no matrix is left out
    assert sum(row.predicted for row in done.components) == pytest.approx(done.predicted.seconds)
    assert done.predicted.in_fp8 is not None
    written = json.loads((tmp_path / "predicted.json").read_text())["predictions"]["small"]
    assert written["in_fp8"]["how"] == "imitated"


def test_rates_of_a_busy_hour_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "faster_now", lambda ceilings, device, dtype: 1.3)
    sizes = {"batch_size": 1, "dtype": "float32", "predictions": tmp_path / "predicted.json"}
    (done,) = validate({"small": SMALL}, CPU, **sizes)
    assert any(note.startswith("this machine is 1.30 times as fast now as its rates of") for note in done.notes)
    monkeypatch.setattr(module, "faster_now", lambda ceilings, device, dtype: 1.1)
    (done,) = validate({"small": SMALL}, CPU, **sizes)
    assert not any("as fast now" in note for note in done.notes)


def test_the_prediction_is_on_disk_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    predictions = tmp_path / "predicted.json"
    seen = []

    def measure(name, e, *rest):
        seen.append(json.loads(predictions.read_text())["predictions"])
        return Validation(name, e, ())

    monkeypatch.setattr(module, "_measure", measure)
    validate({"a": SMALL, "tiny": PRESETS["tiny"]}, CPU, batch_size=1, predictions=predictions)
    assert [set(written) for written in seen] == [{"a", "tiny"}] * 2


def test_the_residual_is_what_the_components_leave():
    e = predict(SMALL, batch_size=1, context_length=None, dtype="float32", device=CPU)
    components = ComponentRow("FFN", 2.0, 4.0), ComponentRow("QKV", 1.0, 2.0)
    done = Validation("small", e, (), components, step_seconds=8.0)
    assert done.residual == 2.0
    assert [row["ratio"] for row in done.to_dict()["components"]] == [0.5, 0.5]
    console = Console(width=120)
    with console.capture() as text:
        show(console, *done.tables())
    for part in ("residual: step - sum", "2,000.000 ms", "25.0%", "small, batch 1 x 64, float32"):
        assert part in text.get()
    assert Validation("small", e, ()).residual is None


def run(app, *arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def test_the_command_writes_results_prediction_and_plot(tmp_path: Path):
    model = tmp_path / "small.toml"
    model.write_text(TOML)
    out, plot = tmp_path / "out" / "v.json", tmp_path / "v.svg"
    options = ["--batch-size", "2", "--dtype", "float32", "--device", "cpu"]
    result = run(bench, "validate", str(model), *options, "--json", str(out), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert (results["kind"], results["validations"][0]["name"]) == ("validation", "small")
    predicted = json.loads((out.parent / "v.predicted.json").read_text())
    assert predicted["kind"] == "prediction"
    # both say when, where and with what
    assert results["machine"] == predicted["machine"] == machine(CPU)
    assert {"date", "torch", "triton", "commit"} <= set(results["machine"])
    assert results["failures"] == {}
    assert "small: step\n" in result.output  # the progress
    assert "<svg" in plot.read_text()
    for part in ("residual: step - sum", "gaps between them", "a lower clock"):
        assert part in result.output
    assert results["validations"][0]["residual"]["clock"] == 0  # a CPU's is not read
    assert predicted["predictions"]["small"]["eager_seconds"] == predicted["predictions"]["small"]["seconds"]


BAD = {
    "preset": ("tinny", [], "preset: no preset 'tinny'; did you mean 'tiny'?"),
    "positions": (
        "tiny", ["--context-length", "257"],
        "context_length: expected at most the model's 256 positions, got 257",
    ),
    "dtype": ("tiny", ["--dtype", "float16"], "ceilings: no GEMM rate for dtype 'float16' (measured: float32, bfl"),
    "not TOML": ("bad.toml", [], "bad.toml: not TOML: "),
    "heads": ("heads.toml", [], "n_kv_head: expected a divisor of n_head (4), got 3"),
    "no file": ("none.toml", [], "No such file or directory: 'none.toml'"),
}  # fmt: skip


def test_an_estimate_in_fp8():
    result = run(estimate_app(), "tiny", "--dtype", "float32", "--batch-size", "2", "--fp8")
    assert result.exit_code == 0, result.output
    assert "in fp8: products of" in result.output
    assert "in fp8" not in run(estimate_app(), "tiny", "--dtype", "float32").output


def test_an_estimate_in_a_dtype_that_was_not_measured_has_no_times():
    result = run(estimate_app(), "tiny", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "`rooflight bench ceilings --dtype float16` measures them" in result.output
    assert "time, " in run(estimate_app(), "tiny", "--dtype", "float32").output


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[model\n")
    Path("heads.toml").write_text(TOML.replace("n_kv_head = 2", "n_kv_head = 3"))
    model, options, sentence = BAD[case]
    commands = [(bench, ["validate", model, "--device", "cpu"]), (estimate_app(), [model])]
    for app, command in commands[: 1 if case == "dtype" else 2]:  # an estimate does without times
        error = run(app, *command, *options).exception
        assert isinstance(error, ValueError | FileNotFoundError), error
        assert sentence in str(error)
        assert "\n" not in str(error)


def estimate_app():
    import typer

    app = typer.Typer()
    app.command()(estimate)
    return app


def test_without_ceilings_the_command_to_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    error = run(bench, "validate", "tiny", "--device", "cpu").exception
    assert isinstance(error, ValueError)
    assert "run `rooflight bench ceilings`" in str(error)


@pytest.mark.parametrize(
    ("option", "given"), [("--dtype", "foo"), ("--optimizer", "foo"), ("--context-length", "9999")]
)
def test_what_is_wrong_is_named_before_ceilings_are_asked_for(option, given, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    options = ["--device", "cpu", "--json", str(tmp_path / "results.json")]
    error = run(bench, "validate", "tiny", *options, option, given).exception
    assert isinstance(error, ValueError)
    assert f"got {given}" in str(error).replace("'", "")


def stub(monkeypatch: pytest.MonkeyPatch, measure) -> None:
    """measure(name) before each model, whose step then took a second."""

    def done(name, e, *rest):
        measure(name)
        rows = (Row("step time", "ms", 1.0, 1000.0, ""),)
        return Validation(name, e, rows, (ComponentRow("FFN", 1.0, 0.5),), 1.0)

    monkeypatch.setattr(module, "_measure", done)


def test_a_model_that_comes_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    shares = []

    def measure(name, e, device, compiled, counted, seconds, progress):
        shares.append(seconds)
        now[0] += 8.0
        return Validation(name, e, (), (), 1.0)

    monkeypatch.setattr(module, "_measure", measure)
    kept = []
    validate(
        dict.fromkeys("abc", SMALL), CPU, batch_size=1, runs=2, seconds=15.0, predictions=tmp_path / "p.json",
        keep=lambda done, failures: kept.append(([v.name for v in done], failures.copy())),
    )  # fmt: skip
    assert shares == [15 / 6, 7 / 5]  # what is left, for the turns that are left
    late = {"c": "left out: 0 of 15 seconds were left for it"}
    assert kept[:3] == [(["a"], {}), (["a", "b"], {}), (["a", "b"], late)]
    assert kept[-1] == (["a", "b"], late)
    with pytest.raises(ValueError, match="seconds: expected > 0, got 0"):
        validate({"a": SMALL}, CPU, batch_size=1, seconds=0, predictions=tmp_path / "p.json")


def test_a_model_that_does_not_fit_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def measure(name):
        if name == "small":
            raise torch.OutOfMemoryError("CUDA out of memory")

    stub(monkeypatch, measure)
    (tmp_path / "small.toml").write_text(TOML)
    out = tmp_path / "v.json"
    result = run(bench, "validate", str(tmp_path / "small.toml"), "tiny", "--json", str(out), "--device", "cpu")
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert [v["name"] for v in written["validations"]] == ["tiny"]
    assert written["failures"]["small"].startswith("does not fit into memory: predicted 0.0 GiB")
    assert "small: does not fit into memory" in result.output


def test_an_interrupt_keeps_the_models_that_are_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stub(monkeypatch, lambda name: os.kill(os.getpid(), signal.SIGTERM) if name == "tiny" else None)
    (tmp_path / "small.toml").write_text(TOML)
    out = tmp_path / "v.json"
    result = run(bench, "validate", str(tmp_path / "small.toml"), "tiny", "--json", str(out), "--device", "cpu")
    assert result.exit_code == 130, result.output
    assert [v["name"] for v in json.loads(out.read_text())["validations"]] == ["small"]
    assert set(json.loads((tmp_path / "v.predicted.json").read_text())["predictions"]) == {"small", "tiny"}
    assert "small, batch 8 x 64, bfloat16" in result.output


def test_the_hosts_part_of_a_step_is_told():
    e = predict(SMALL, batch_size=1, context_length=None, dtype="float32", device=CPU)
    step = Step(SMALL, 1, 64, torch.float32, CPU)
    whole, host = step.seconds(0.0)
    assert whole > 0
    assert host is None  # a CPU is its own host
    console = Console(width=120)
    with console.capture() as text:
        show(console, *Validation("small", e, (), step_seconds=1.0, host_seconds=0.25).tables())
    assert "the host issues a step in 250.000 ms" in text.get()
    assert Validation("small", e, (), host_seconds=0.25).to_dict()["host_seconds"] == 0.25


def test_a_model_is_a_preset_or_a_file(tmp_path: Path):
    assert read_model("tiny") == ("tiny", PRESETS["tiny"])
    path = tmp_path / "mine.toml"
    path.write_text('preset = "tiny"\nn_layer = 2\n')
    name, config = read_model(str(path))
    assert (name, config.n_layer, config.d_model) == ("mine", 2, 128)
    path.write_text('model = "tiny"\n')
    with pytest.raises(ValueError, match=r"mine\.toml: model: expected a table .*, got 'tiny'"):
        read_model(str(path))
