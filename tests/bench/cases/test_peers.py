"""Peers are taken where they are installed, never required, and get the same question as ours."""

import dataclasses
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import flex_attention

from rooflight.bench.cases import peers
from rooflight.bench.cases.attention import attention_case
from rooflight.bench.cases.rows import rms_norm_case
from rooflight.bench.measure import harness
from rooflight.kernels import reference

CPU = torch.device("cpu")


def test_flex_attention_gets_the_same_mask(monkeypatch):
    """As a GPU would compile it, but eagerly."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "setup_compilation_env", lambda: nullcontext("eager"))
    lengths, ends = (7, 1, 32), torch.tensor([0, 7, 8, 40], dtype=torch.int32)
    flex = peers.flex_attention
    for case, peer in [
        (attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU), flex(40, True, None, None, CPU)),
        (attention_case(1, 2, 1, 40, 16, False, torch.float32, CPU), flex(40, False, None, None, CPU)),
        (attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU, window=12), flex(40, True, 12, None, CPU)),
        (
            attention_case(1, 2, 1, 40, 16, True, torch.float32, CPU, lengths=lengths),
            flex(40, True, None, ends, CPU),
        ),
    ]:
        q, k, v = (x.detach() for x in case.inputs(CPU))
        torch.testing.assert_close(peer(q, k, v), case.truth(q, k, v))


def test_a_function_is_compiled_once_and_whole(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    call = peers.compiled(lambda x, y: x + y)
    assert asked == []
    assert (call(1, 2), call(3, 4)) == (3, 7)
    assert asked == [{"dynamic": False, "fullgraph": True}]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """library({file: source}) installs modules for the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def install(files: dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    yield install
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("liger_kernel", "quack", "flash_attn", "flash_attn_interface"):
            del sys.modules[name]


def test_what_is_not_installed_is_no_provider():
    assert peers.rms_norm_peers(1e-6) == {}
    assert peers.flash_attention_peers(True, None) == {}
    assert not peers.installed("torch.no_such_module")
    assert peers.installed("torch.nn.attention.flex_attention")


def test_a_module_is_found_without_being_imported(library):
    library({"flash_attn/__init__.py": "raise RuntimeError('no such GPU')", "flash_attn/cute/__init__.py": ""})
    assert list(peers.flash_attention_peers(True, None)) == ["FlashAttention 4"]
    assert "flash_attn" not in sys.modules


LIGER = """
import torch
class LigerRMSNormFunction:
    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
"""
QUACK = """
import torch
def rmsnorm(x, weight, residual=None, eps=0.0, prenorm=False):
    h = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(h, weight.shape, weight, eps)
    return (y, h) if prenorm else y
"""


@pytest.mark.parametrize("residual", [False, True])
def test_norms_of_libraries_answer_the_same_question(library, residual):
    library({"liger_kernel/ops/rms_norm.py": LIGER, "quack/__init__.py": QUACK})
    case = rms_norm_case(6, 24, torch.float32, CPU, residual=residual)
    found = peers.rms_norm_peers(1e-6)
    assert list(found) == ["Liger", "quack"]
    if residual:
        del found["Liger"]
    harness.check(dataclasses.replace(case, providers=found), CPU)


FLASH = """
from torch.nn import functional as F
def flash_attn_func(q, k, v, causal=False, window_size=None):
    assert window_size in (None, (12, 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window_size is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2), None
    from rooflight.kernels import reference
    return reference.flash_attention(q, k, v, causal=True, window=12).transpose(1, 2)
"""


@pytest.mark.parametrize("window", [None, 12])
def test_flash_attention_of_its_packages_answers_the_same_question(library, window):
    library({"flash_attn/cute/__init__.py": FLASH, "flash_attn_interface.py": FLASH})
    case = attention_case(1, 4, 2, 40, 16, True, torch.float32, CPU, window=window)
    found = peers.flash_attention_peers(True, window)
    assert list(found) == ["FlashAttention 4", "FlashAttention 3"]
    harness.check(dataclasses.replace(case, providers=found), CPU)


def test_a_library_that_does_not_import_fails_alone(library):
    library({"quack/__init__.py": "raise OSError('built for another torch')"})
    case = rms_norm_case(6, 24, torch.float32, CPU)
    case = dataclasses.replace(case, timed=False, providers={"eager": reference.rms_norm} | peers.rms_norm_peers(1e-6))
    (failure,) = harness.measure(case, CPU)
    assert (failure.provider, failure.error) == ("quack", "OSError: built for another torch")
