"""The harness refuses wrong results, measures right ones, and writes files whole."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import flex_attention

from rooflight.bench.cases.kernels import (
    HOPPER,
    Case,
    _flex,
    attention_case,
    cases,
    document_lengths,
    probes,
    rms_norm_case,
)
from rooflight.bench.measure import harness
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


@pytest.mark.parametrize(
    "case",
    [
        attention_case(1, 2, 1, 50, 16, True, torch.float32, CPU, window=12),
        attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU, lengths=(7, 1, 32)),
        attention_case(1, 2, 1, 40, 16, False, torch.float32, CPU, lengths=(25, 15)),
        rms_norm_case(6, 24, torch.float32, CPU, residual=True),
    ],
    ids=lambda case: case.name,
)
def test_a_truth_of_its_own_agrees_with_the_kernels(case):
    harness.check(case, CPU)


def test_flex_attention_gets_the_same_mask(monkeypatch):
    """As a GPU would compile it, but eagerly."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "setup_compilation_env", lambda: nullcontext("eager"))
    lengths, ends = (7, 1, 32), torch.tensor([0, 7, 8, 40], dtype=torch.int32)
    for case, flex in [
        (attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU), _flex(40, True, None, None, CPU)),
        (attention_case(1, 2, 1, 40, 16, False, torch.float32, CPU), _flex(40, False, None, None, CPU)),
        (attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU, window=12), _flex(40, True, 12, None, CPU)),
        (
            attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU, lengths=lengths),
            _flex(40, True, None, ends, CPU),
        ),
    ]:
        q, k, v = (x.detach() for x in case.inputs(CPU))
        torch.testing.assert_close(flex(q, k, v), case.truth(q, k, v))


def test_one_provider_that_fails_loses_no_other():
    def broken(x, weight):
        raise RuntimeError("no kernel\nfor this")

    case = small_norm(broken=broken, wrong=lambda x, w: reference.rms_norm(x, w) * 1.01)
    asked: list[str] = []
    found = list(harness.measure(case, CPU, progress=asked.append))
    failures = {f.provider: f.error for f in found if isinstance(f, harness.Failure)}
    assert failures["broken"] == "RuntimeError: no kernel"
    assert "wrong's output is off by" in failures["wrong"]
    assert [m.provider for m in found if isinstance(m, harness.Measurement)] == ["eager", "eager"]
    assert asked == ["eager", "broken", "wrong", "eager"]
    assert list(harness.measure(case, CPU, without={"eager", "broken", "wrong"})) == []


def test_repeats_must_agree_to_the_last_bit():
    noise = torch.Generator().manual_seed(0)

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-7 * torch.rand((), generator=noise))

    def noisy(x, weight):
        return reference.rms_norm(Noisy.apply(x), weight)

    case = dataclasses.replace(small_norm(noisy=noisy), timed=False, repeats=20)
    (failure,) = harness.measure(case, CPU)
    assert failure.provider == "noisy"
    assert "differs from its first" in failure.error


def test_documents_are_drawn_once_and_for_all():
    lengths = document_lengths(16384, 2048)
    assert sum(lengths) == 16384
    assert lengths == document_lengths(16384, 2048)
    assert min(lengths) >= 1
    assert len(lengths) > 4


def test_case_names_are_unique():
    names = [case.name for case in cases(CPU) + probes(CPU)]
    assert len(set(names)) == len(names)


def test_machine_says_where_and_when():
    where = harness.machine(CPU)
    assert where["torch"] == torch.__version__
    assert all(where[key] for key in ("device", "threads", "triton", "python", "commit", "date"))


@pytest.mark.parametrize(
    ("capability", "D", "dtype", "served"),
    [
        ((9, 0), 64, torch.bfloat16, True),
        ((9, 0), 128, torch.float16, True),
        ((9, 0), 256, torch.bfloat16, False),  # its forward alone
        ((9, 0), 128, torch.float32, False),
        ((8, 0), 128, torch.bfloat16, False),
    ],
    ids=str,
)
def test_the_hopper_path_is_a_provider_where_it_serves_both_passes(capability, D, dtype, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    case = attention_case(1, 2, 2, 256, D, True, dtype, torch.device("cuda"))
    assert (HOPPER in case.providers) == served
