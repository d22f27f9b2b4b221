"""Cases: whose truths are right, which providers a device has, and which path each of ours takes."""

import pytest
import torch

from rooflight.bench.cases import attention
from rooflight.bench.cases.attention import attention_case, document_lengths
from rooflight.bench.cases.case import HOPPER, OURS, PORTABLE
from rooflight.bench.cases.kernels import cases, probes
from rooflight.bench.cases.rows import (
    cross_entropy_case,
    linear_cross_entropy_case,
    rms_norm_case,
    rope_case,
    swiglu_case,
)
from rooflight.bench.measure import harness
from rooflight.kernels.attention import paths
from rooflight.kernels.attention.tuned import UserTable
from rooflight.model.ceilings import Ceilings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "case",
    [
        attention_case(1, 4, 2, 32, 16, True, torch.float32, CPU),
        attention_case(1, 2, 1, 50, 16, True, torch.float32, CPU, window=12),
        attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU, lengths=(7, 1, 32)),
        attention_case(1, 2, 1, 40, 16, False, torch.float32, CPU, lengths=(25, 15)),
        rms_norm_case(6, 24, torch.float32, CPU, residual=True),
        swiglu_case(6, 24, torch.bfloat16, CPU),
        rope_case(2, 4, 2, 10, 8, torch.float32, CPU),
        cross_entropy_case(7, 33, torch.bfloat16, CPU),
        linear_cross_entropy_case(9, 16, 33, torch.bfloat16, CPU),
        linear_cross_entropy_case(9, 16, 33, torch.bfloat16, CPU, mean=True),
    ],
    ids=lambda case: case.name,
)
def test_peers_and_kernels_agree_with_the_truth(case):
    harness.check(case, CPU)
    harness.check_flops(case, CPU)


def test_a_loss_and_its_product_take_their_own_rates():
    known = Ceilings({"bfloat16": 1e9}, 1e9, kernels={"linear_cross_entropy bfloat16": {(9, 16, 33): 1e6}})
    case = linear_cross_entropy_case(9, 16, 33, torch.bfloat16, CPU)
    assert case.work(False).seconds(known, "bfloat16")[0] == 2 * 9 * 16 * 33 / 1e6
    bound = swiglu_case(6, 24, torch.bfloat16, CPU)
    assert bound.work(True).roof(known, "bfloat16") == (bound.cost(True).bytes / 1e9, "memory")


def test_training_is_both_passes_of_a_call_that_keeps_its_gradients():
    case = linear_cross_entropy_case(9, 16, 33, torch.float32, CPU, mean=True)
    product = 2 * 9 * 16 * 33
    assert case.cost_of("training").flops == 3 * product  # none of them twice
    assert case.cost_of("training").bytes == case.cost(False).bytes + case.cost(True).bytes
    found = list(harness.measure(case, CPU))
    assert [(m.provider, m.mode) for m in found] == [(name, "training") for name in case.providers]
    dx, dweight = harness.task(case, case.providers[OURS], "training", CPU)()
    assert (dx.shape, dweight.shape) == ((9, 16), (33, 16))
    assert dx.abs().max() > 0


def test_documents_are_drawn_once_and_for_all():
    lengths = document_lengths(16384, 2048)
    assert sum(lengths) == 16384
    assert lengths == document_lengths(16384, 2048)
    assert min(lengths) >= 1
    assert len(lengths) > 4


def test_case_names_are_unique():
    names = [case.name for case in cases(CPU) + probes(CPU)]
    assert len(set(names)) == len(names)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, forward, backward): a GPU on which these paths are the defaults."""

    def pretend(capability=(9, 0), forward="portable", backward="portable"):
        defaults = {"forward": forward, "backward": backward}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "table_of", lambda device: UserTable())
        monkeypatch.setattr(attention, "architecture", lambda: "sm_90")
        monkeypatch.setattr(paths, "decide", lambda call, **options: paths.Choice(defaults[call.pass_], "because"))

    return pretend


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
def test_the_hopper_path_is_a_provider_where_it_serves_both_passes(capability, D, dtype, served, gpu):
    gpu(capability)
    case = attention_case(1, 2, 2, 256, D, True, dtype, CUDA)
    assert (HOPPER in case.providers) == served
    assert PORTABLE not in case.providers
    assert case.taken(OURS, "forward") == ("portable" if served else None)


@pytest.mark.parametrize(
    ("forward", "backward", "named"),
    [
        ("portable", "portable", {HOPPER}),
        ("hopper", "hopper", {PORTABLE}),
        ("hopper", "portable", {HOPPER, PORTABLE}),
    ],
)
def test_a_path_that_is_the_default_is_not_timed_twice(forward, backward, named, gpu):
    gpu(forward=forward, backward=backward)
    case = attention_case(1, 2, 2, 256, 128, True, torch.bfloat16, CUDA)
    assert {name for name in case.providers if name.startswith(OURS)} == {OURS} | named
    assert [case.taken(OURS, mode) for mode in ("forward", "backward")] == [forward, backward]
    assert case.taken(HOPPER, "backward") == "hopper"
    assert case.taken("torch cuDNN", "forward") is None


@pytest.mark.parametrize(
    ("T", "options", "used"),
    [
        (512, {}, set()),
        (256, {}, {"short"}),
        (512, {"window": 64}, {"window"}),
        (1024, {"lengths": (512, 512)}, {"packed"}),
        (512, {"lengths": (256, 256)}, {"packed", "short"}),
    ],
    ids=["512", "256", "512, window", "1024, packed", "512, packed"],  # a set's text has no order
)
def test_the_default_is_asked_for_as_the_launcher_asks(T, options, used, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch, "tensor", lambda values, **options: values)  # no device to put it on
    asked = []
    monkeypatch.setattr(paths, "decide", lambda call, **options: asked.append(call) or paths.Choice("hopper", ""))
    attention_case(1, 2, 2, T, 128, True, torch.bfloat16, CUDA, **options)
    assert [(call.pass_, set(call.options)) for call in asked] == [("forward", used), ("backward", used)]


def test_every_path_is_probed_by_its_name(gpu, monkeypatch):
    monkeypatch.setattr(torch, "tensor", lambda values, **options: values)  # no device to put it on
    gpu(forward="hopper", backward="hopper")
    assert all(list(case.providers) == [HOPPER, PORTABLE] for case in probes(CUDA))
    gpu(forward="hopper", backward="portable")
    assert all(list(case.providers) == [HOPPER, PORTABLE, OURS] for case in probes(CUDA))
    assert all(list(case.providers) == [OURS] for case in probes(CPU))


def test_a_provider_runs_on_its_path(gpu, monkeypatch):
    case = attention_case(1, 2, 2, 256, 32, True, torch.float32, CPU)
    asked = []
    monkeypatch.setattr(paths, "use", asked.append)
    for name in (HOPPER, PORTABLE, OURS, "torch"):
        case.path(name)
    assert asked == ["hopper", "portable"]
