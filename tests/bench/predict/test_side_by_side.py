"""A step, ours beside the plain model's: the same loss from the same weights, and rows that hold together."""

import dataclasses
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from rooflight.bench.cases import plain_model
from rooflight.bench.cases.plain_model import PlainTransformer
from rooflight.bench.cli import app
from rooflight.bench.measure.compiler import NotCompiled
from rooflight.bench.predict import side_by_side
from rooflight.bench.predict.side_by_side import DEFAULT, WAYS, measure_steps
from rooflight.kernels import fp8, reference
from rooflight.model import Ceilings, ModelConfig, Transformer, estimate

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab_size=130, context_length=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64)


@pytest.mark.parametrize("changes", [{}, {"ffn": "gelu", "tie_embeddings": True, "n_kv_head": 4}, {"qk_norm": True}])
def test_the_peer_is_the_same_model(changes):
    config = dataclasses.replace(CONFIG, **changes)
    ours, plain = Transformer(config, ops=reference), PlainTransformer(config)
    plain.load_state_dict(ours.state_dict())
    tokens = torch.randint(130, (3, 16))
    losses = [model(tokens, tokens.roll(-1, 1)) for model in (ours, plain)]
    torch.testing.assert_close(*losses)
    joined, apart = ours.layers[0].attention.qkv_proj, plain.layers[0].attention.k_proj
    (qkv,), (k,) = torch.autograd.grad(losses[0], joined.weight), torch.autograd.grad(losses[1], apart.weight)
    torch.testing.assert_close(qkv.split(joined.rows)[1], k, rtol=1e-4, atol=1e-6)


def test_what_the_peer_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"config\.window: expected None for the plain model, got 8"):
        PlainTransformer(dataclasses.replace(CONFIG, window=8))
    with pytest.raises(ValueError, match=r"ways: expected some of .*, got 'theirs'"):
        next(measure_steps(CONFIG, 2, 16, torch.float32, CPU, ways=["theirs"]))


def test_rows_hold_together():
    ways = [way for way in WAYS if "compiled" not in way]  # compiling takes longer than all the rest
    rates = {"ceilings": Ceilings({"float32": 1e9}, 1e8), "peak_flops": 1e9}
    steps = list(measure_steps(CONFIG, 2, 16, torch.float32, CPU, ways=ways, seconds=0.01, **rates))
    sizes = {"batch_size": 2, "context_length": 16, "dtype": "float32", "ceilings": rates["ceilings"], "ops": "eager"}
    predicted = [1e3 * estimate(CONFIG, fp8=fp8, **sizes).seconds for fp8 in (False, True)]
    assert [step.predicted_milliseconds for step in steps] == [predicted[0], None, predicted[1]]
    assert predicted[0] < predicted[1]  # a CPU imitates fp8
    assert [step.name for step in steps] == ["ours, eager", "plain, eager", "ours, fp8"]
    assert steps[0].first_loss != steps[2].first_loss == pytest.approx(steps[0].first_loss, rel=0.02)
    e = estimate(CONFIG, batch_size=2, context_length=16, causal="full")
    for step in steps:
        seconds = step.milliseconds / 1e3
        assert step.milliseconds_best <= step.milliseconds <= step.milliseconds_worst
        assert step.tokens_per_second == pytest.approx(2 * 16 / seconds)
        assert step.mfu_full == pytest.approx((e.forward_flops + e.backward_flops) / seconds / 1e9)
        assert step.mfu < step.mfu_full
        assert step.last_loss < step.first_loss
        assert step.peak_bytes is None


def test_a_cpu_and_a_gpu_take_the_peer_eager_and_compiled_and_ours_without_a_host():
    assert DEFAULT["cpu"] == ("ours, eager", "ours, compiled", "plain, eager", "plain, compiled")
    assert DEFAULT["cuda"] == ("ours, eager", "ours, graphed", "plain, eager", "plain, compiled", "ours, fp8")


def test_a_gpu_without_fp8_says_so_in_its_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "refusal", lambda device: "expected another GPU, got this")
    failures: dict[str, str] = {}
    assert not list(measure_steps(CONFIG, 2, 16, torch.float32, CPU, ways=["ours, fp8"], failures=failures))
    assert failures == {"ours, fp8": "ValueError: device: expected another GPU, got this"}


def test_ours_has_training_s_optimizer_and_the_peer_torch_s(monkeypatch: pytest.MonkeyPatch):
    built: dict[str, dict] = {}
    monkeypatch.setattr(side_by_side, "low_precision", lambda device, dtype: {"copy_dtype": dtype})  # as on a GPU
    tokens = torch.zeros(1, 17, dtype=torch.long)
    for way in WAYS:
        monkeypatch.setattr(
            side_by_side, "build_optimizers", lambda model, way=way, **options: built.update({way: options})
        )
        side_by_side._Step(way, CONFIG, tokens, torch.bfloat16)
    assert {way: (options.get("copy_dtype"), options["triton"]) for way, options in built.items()} == {
        "ours, eager": (torch.bfloat16, None), "ours, graphed": (torch.bfloat16, None),
        "ours, fp8": (torch.bfloat16, None), "ours, compiled": (None, None),
        "plain, eager": (None, False), "plain, compiled": (None, False),
    }  # fmt: skip


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiler's front end alone, as the rest takes half a minute; what it is given."""
    given, whole = [], torch.compile

    def compiler(model, *_, **__):
        given.append(type(getattr(model, "__self__", model)).__name__)  # of a block, its bound method
        return whole(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compiler)
    return given


COMPILED = ["ours, compiled", "plain, compiled"]


# torch's own, of a block's input, which is no leaf
NO_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@NO_LEAF
def test_ways_that_are_compiled_run_in_what_the_compiler_gives(front_end: list[str]):
    config = dataclasses.replace(CONFIG, n_layer=1)
    steps = list(measure_steps(config, 2, 16, torch.float32, CPU, ways=COMPILED, seconds=0.01))
    assert [(step.name, step.ours) for step in steps] == [(COMPILED[0], True), (COMPILED[1], False)]
    assert front_end == ["Transformer", "_Block"]


@NO_LEAF
def test_a_way_that_the_compiler_leaves_to_eager_has_no_time(front_end: list[str], monkeypatch: pytest.MonkeyPatch):
    forward = plain_model._Block.forward

    def breaks(self, *inputs):
        torch._dynamo.graph_break()
        return forward(self, *inputs)

    monkeypatch.setattr(plain_model._Block, "forward", breaks)
    failures: dict[str, str] = {}
    ways = ["plain, compiled", "plain, eager"]
    steps = measure_steps(CONFIG, 2, 16, torch.float32, CPU, ways=ways, seconds=0.01, failures=failures)
    assert [step.name for step in steps] == ["plain, eager"]
    assert failures.keys() == {"plain, compiled"}
    assert failures["plain, compiled"].startswith("NotCompiled: a graph break: ")
    with pytest.raises(NotCompiled):
        next(measure_steps(CONFIG, 2, 16, torch.float32, CPU, ways=ways, seconds=0.01))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_steps_are_the_eager_ones(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """All of the compiler, as the demo and the peers run it on a CPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config, ways = dataclasses.replace(CONFIG, n_layer=1), ["ours, eager", "ours, compiled"]
    eager, compiled = measure_steps(config, 2, 16, torch.float32, CPU, ways=ways, seconds=0.01)
    assert compiled.first_loss == pytest.approx(eager.first_loss, rel=1e-5)
    assert compiled.last_loss < compiled.first_loss


def test_the_command_writes_what_the_report_reads(tmp_path):
    model = tmp_path / "small.toml"
    model.write_text(
        "[model]\nvocab_size = 130\ncontext_length = 16\nn_layer = 1\nn_head = 2\nd_model = 16\nd_ff = 32\n"
    )
    command = ["bench", "step", str(model), "--batch-size", "2", "--seconds", "0.01", "--dtype", "float32"]
    command += ["--way", "ours, eager", "--device", "cpu", "--json", str(tmp_path / "steps.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "steps.json").read_text())
    assert written["kind"] == "steps"
    assert [row["name"] for row in written["rows"]] == ["ours, eager"]
