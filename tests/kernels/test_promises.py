"""One table of inputs over every path: what a docstring promises holds on a plain CPU and in the kernels, eager and
compiled. The plain CPU is a process of its own, since Triton's interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rooflight import kernels
from rooflight.kernels import flash_attention_varlen
from support import promises, semantics
from support.attention import tile
from support.promises import CASES
from support.semantics import FUNCTIONS

SEMANTICS = Path(__file__).parents[2] / "docs" / "semantics.md"


def on_a_plain_cpu(module: ModuleType, *arguments: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "error", str(module.__file__), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def small_tiles():
    with tile(16, 16):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernels(case, device):
    promises.check(case, device)


@pytest.mark.slow  # what is compiled is the operator, whose parts the other tests compile
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_compiled_kernels(case, device):
    promises.check(case, device, compiled=True)


@pytest.mark.cpu
def test_plain_cpu():
    on_a_plain_cpu(promises, "eager")


@pytest.mark.cpu
@pytest.mark.slow
def test_compiled_plain_cpu():
    on_a_plain_cpu(promises, "compiled")


def test_what_is_not_a_tensor_a_number_or_a_flag_is_refused_by_name():
    promises.check_refusals()
    promises.check_numpy_numbers()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_functions_row(function, device):
    semantics.check(function, device)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the exporter's own
@pytest.mark.parametrize("function", [name for name, promise in FUNCTIONS.items() if promise.export == "yes"])
def test_one_export_serves_every_length(function, device):
    semantics.check_function_exports(function, device)


@pytest.mark.cpu
@pytest.mark.slow
def test_the_rows_the_exports_and_the_model_on_a_plain_cpu():
    on_a_plain_cpu(semantics)


def test_the_page_shows_every_function_and_the_tables():
    public = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and name.islower()}
    assert set(FUNCTIONS) == {case.function for case in CASES} == public - {"alibi_slopes", "rope_tables"}
    for module in (semantics, promises):
        assert module.table() in SEMANTICS.read_text(), f"docs/semantics.md: run `python {module.__file__} table`"


def packed(total, *ends, device):
    x = [torch.randn(total, 2, 16, device=device, requires_grad=True) for _ in range(3)]
    return x, torch.tensor(ends, dtype=torch.int32, device=device)


def test_padding_is_zero_forward_and_backward(device):
    (q, k, v), ends = packed(40, 0, 5, 9, device=device)
    sinks = torch.zeros(2, device=device, requires_grad=True)
    out, lse = flash_attention_varlen(q, k, v, ends, ends, 5, 5, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad((out.sum(), lse[:, :9].sum()), (q, k, v, sinks), (torch.ones_like(out.sum()),) * 2)
    assert all(x[9:].eq(0).all() and x[:9].ne(0).any() for x in (out, *grads[:3]))
    assert lse[:, 9:].eq(float("-inf")).all()
    assert grads[3].isfinite().all()


def test_a_max_seqlen_below_the_longest_is_refused_or_leaves_zeros(device):
    """Nothing is read or written out of bounds, and nothing is left as allocated."""
    (q, k, v), ends = packed(40, 0, 33, 40, device=device)
    if device.type == "cpu":
        for compiled in (False, True):
            op = torch.compile(flash_attention_varlen, fullgraph=True, backend="aot_eager") if compiled else None
            with pytest.raises(ValueError, match="max_seqlen_q: expected at least 33, got 7"):
                (op or flash_attention_varlen)(q, k, v, ends, ends, 7, 33)
        return
    out = flash_attention_varlen(q, k, v, ends, ends, 7, 7)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x[7:33].eq(0).all() and x.isfinite().all() for x in (out, *grads))
