"""The harness refuses wrong results, measures right ones, and writes files whole."""

import dataclasses

import pytest
import torch

from rooflight.bench.cases.case import Case
from rooflight.bench.cases.rows import rms_norm_case
from rooflight.bench.measure import harness
from rooflight.kernels import reference
from rooflight.kernels.attention import paths

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
        seconds = measurement.device_milliseconds / 1e3
        assert measurement.gigabytes_per_second == pytest.approx(cost.bytes / seconds / 1e9)
        assert measurement.teraflops == pytest.approx(cost.flops / seconds / 1e12)
        low, high = measurement.device_milliseconds_p20, measurement.device_milliseconds_p80
        assert low <= measurement.device_milliseconds <= high
        assert measurement.call_milliseconds == measurement.device_milliseconds
        assert (measurement.host_microseconds, measurement.host_bound) == (None, False)
        assert (measurement.timed_by, measurement.path) == ("clock", None)


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
    assert asked == ["eager", "broken", "wrong"]
    assert list(harness.measure(case, CPU, without={"eager", "broken", "wrong"})) == []


def test_a_path_that_gave_up_is_no_measurement(monkeypatch):
    """Each time anew: later calls of the process would take the other path without a word."""
    monkeypatch.setattr(paths, "_failed", {})

    def ours(x, weight):
        if "forward" not in paths._failed:
            paths.give_up("forward", OSError("no Gluon"))
        return reference.rms_norm(x, weight)

    case = dataclasses.replace(small_norm(ours=ours), timed=False)
    for _ in range(2):
        (failure,) = harness.measure(case, CPU)
        assert failure.provider == "ours"
        assert "no Gluon" in failure.error


def fatal(x, weight):
    raise RuntimeError("an illegal instruction was encountered\nCompile with TORCH_USE_CUDA_DSA")


def test_a_lost_device_ends_the_case(monkeypatch):
    monkeypatch.setattr(harness, "alive", lambda device: False)
    found = harness.measure(small_norm(fatal=fatal, other=reference.rms_norm), CPU)
    assert [next(found).provider, next(found).provider] == ["eager", "eager"]
    with pytest.raises(harness.ContextLost, match="RuntimeError: an illegal instruction was encountered"):
        next(found)


def test_an_error_on_its_way_is_the_provider_s_that_caused_it(monkeypatch):
    """A kernel's error shows at the next synchronization, which must not be another provider's."""
    under_way = []

    def careless(x, weight):
        under_way.append("an illegal address")
        return reference.rms_norm(x, weight)

    def settle(device):
        if under_way:
            raise RuntimeError(under_way.pop())

    monkeypatch.setattr(harness, "settle", settle)
    case = dataclasses.replace(small_norm(careless=careless, other=reference.rms_norm), timed=False)
    (failure,) = harness.measure(case, CPU)
    assert (failure.provider, failure.error) == ("careless", "RuntimeError: an illegal address")


def test_a_device_lives_where_a_second_synchronization_passes(monkeypatch):
    errors = iter([RuntimeError("one that passes"), None, *[RuntimeError("one that stays")] * 2])

    def synchronize(device):
        if error := next(errors):
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert harness.alive(torch.device("cuda"))
    assert not harness.alive(torch.device("cuda"))
    assert harness.alive(CPU)


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


def test_machine_says_where_and_when():
    where = harness.machine(CPU)
    assert where["torch"] == torch.__version__
    assert all(where[key] for key in ("device", "threads", "triton", "python", "commit", "date"))
