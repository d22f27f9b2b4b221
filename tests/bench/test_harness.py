"""The harness refuses wrong results, measures right ones, and writes files whole."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rooflight.bench import harness
from rooflight.bench.cases import Case, attention_case, cases, rms_norm_case
from rooflight.kernels import reference

CPU = torch.device("cpu")


def small_norm(**providers) -> Case:
    """A case whose providers are the oracle and whatever the test adds."""
    case = rms_norm_case(8, 16, torch.float32, CPU)
    return dataclasses.replace(case, providers={"eager": reference.rms_norm, **providers})


def test_a_right_result_is_measured_with_its_rates():
    case = small_norm()
    forward, backward = harness.measure(case, CPU)
    assert (forward.mode, backward.mode, forward.provider) == ("forward", "backward", "eager")
    for measurement, mode in ((forward, False), (backward, True)):
        cost = case.cost(mode)
        seconds = measurement.milliseconds / 1e3
        assert measurement.gigabytes_per_second == pytest.approx(cost.bytes / seconds / 1e9)
        assert measurement.teraflops == pytest.approx(cost.flops / seconds / 1e12)
        assert measurement.milliseconds_p20 <= measurement.milliseconds <= measurement.milliseconds_p80


def test_a_wrong_output_is_refused():
    with pytest.raises(harness.WrongResult, match="wrong's output"):
        harness.check(small_norm(wrong=lambda x, w: reference.rms_norm(x, w) * 1.001), CPU)


def test_a_wrong_gradient_is_refused():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    with pytest.raises(harness.WrongResult, match="wrong's gradient 0"):
        harness.check(small_norm(wrong=lambda x, w: reference.rms_norm(Doubled.apply(x), w)), CPU)


def test_a_nan_is_a_wrong_result():
    with pytest.raises(harness.WrongResult, match="off by nan"):
        harness.check(small_norm(wrong=lambda x, w: reference.rms_norm(x, w) * float("nan")), CPU)


def test_the_attention_case_agrees_with_its_peers():
    harness.check(attention_case(1, 4, 2, 32, 16, True, torch.float32, CPU), CPU)


def test_case_names_are_unique():
    names = [case.name for case in cases(CPU)]
    assert len(set(names)) == len(names)


def test_machine_says_where_and_when():
    where = harness.machine(CPU)
    assert where["torch"] == torch.__version__
    assert all(where[key] for key in ("device", "threads", "triton", "python", "commit", "date"))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "folder" / "results.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
