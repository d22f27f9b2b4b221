"""The host's part of a step: as many calls as the model makes, each at what its kernel's call was measured to take."""

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rooflight.bench.predict.host import eager_seconds, host_seconds
from rooflight.bench.rates import ceilings as rates
from rooflight.bench.rates import kernel_rates
from rooflight.kernels import reference
from rooflight.model import Ceilings, ModelConfig, Transformer, estimate
from rooflight.model.parts import parts
from rooflight.model.transformer import OPS

CONFIG = ModelConfig(vocab_size=64, context_length=16, n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
# the model's operation -> the estimate's kernel
KERNELS = {
    "rms_norm": "rms_norm", "rope": "rope", "rope_qkv": "rope", "flash_attention": "attention", "swiglu": "swiglu",
    "linear_cross_entropy": "linear_cross_entropy", "gelu": "gelu", "linear": "gemm",
}  # fmt: skip


class Functions(TorchFunctionMode):
    """Counts what of torch's own functions the estimate has a kernel for."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("linear", "gelu"):
            self.counts[KERNELS[name]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"ffn": "gelu"}, {"qk_norm": True}])
def test_the_estimate_calls_what_the_models_forward_calls(changes: dict):
    config = replace(CONFIG, **changes)
    counts: Counter = Counter()

    def counted(name: str, *args, **options):
        counts[KERNELS[name]] += 1
        with torch._C.DisableTorchFunction():  # what an operation is made of is its own affair
            return getattr(reference, name)(*args, **options)

    ops = SimpleNamespace(**{name: partial(counted, name) for name in OPS})
    model = Transformer(config, ops)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with Functions(counts):
        model(tokens, targets=tokens)
    predicted: Counter = Counter()
    for part in parts(config, 2, 16, "float32", checkpointing=False, gpus=1):
        for work in part.forward:
            kernel = work.kernel.removesuffix(" residual")
            if work.work and kernel in KERNELS.values():
                predicted[kernel] += work.calls
    assert predicted == counts


def test_each_matrix_is_cast_once_each_way():
    model = Transformer(CONFIG, reference)
    matrices = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    c = Ceilings({"bfloat16": 1e12}, 1e11, host={"cast bfloat16": 1.0, "cast backward bfloat16": 2.0})
    e = estimate(CONFIG, batch_size=2, ceilings=c)
    (row,) = (part for part in parts(CONFIG, 2, 16, "bfloat16", checkpointing=False, gpus=1) if part.name == "casts")
    assert host_seconds(e) == len(matrices) * (len(row.forward) + 2 * len(row.backward)) > 0


def test_an_eager_step_takes_the_longer_of_host_and_kernels():
    c = Ceilings({"float32": 1e12}, 1e11)
    e = estimate(CONFIG, batch_size=2, dtype="float32", ceilings=c)
    assert host_seconds(e) is None
    assert eager_seconds(e) == e.seconds
    timed = replace(e, ceilings=replace(c, host={"attention float32": 2.0, "attention backward float32": 3.0}))
    assert host_seconds(timed) == eager_seconds(timed) == 3 * (2.0 + 3.0)
    quick = replace(e, ceilings=replace(c, host={"attention float32": 1e-12}))
    assert eager_seconds(quick) == e.seconds
    assert eager_seconds(replace(e, ceilings=None)) is None


def test_ceilings_keep_the_hosts_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path):
    known = Ceilings({"float32": 1.0}, 1.0, host={"gemm float32": 1e-5})
    assert Ceilings.from_dict(known.to_dict()) == known
    with pytest.raises(ValueError, match=r"host\['gemm float32'\]: expected a finite rate > 0, got -1"):
        replace(known, host={"gemm float32": -1})
    again = rates._beside(known, Ceilings({"float32": 2.0}, 1.0, host={"rope float32": 2e-5}))
    assert again.host == {"gemm float32": 1e-5, "rope float32": 2e-5}


def test_every_kernel_is_issued_forward_and_backward(monkeypatch: pytest.MonkeyPatch):
    """On a CPU in the place of a GPU: each kernel at its least size, called and timed."""
    cpu = torch.device("cpu")
    issued = []

    def launch_times(call, device, seconds):
        call()
        issued.append(seconds)
        return 1e-5, 2e-5

    monkeypatch.setattr(kernel_rates, "launch_times", launch_times)
    took = kernel_rates.host_seconds(torch.float32, cpu)
    both = {name for name, kernel in kernel_rates.KERNELS.items() if kernel.backward}
    wanted = kernel_rates.grids(torch.float32, cpu)
    assert set(took) == set(wanted) | {f"{name} backward" for name in both & set(wanted)}
    assert set(took.values()) == {1e-5}
    assert len(issued) == len(took)
