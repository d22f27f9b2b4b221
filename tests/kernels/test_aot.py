"""The artifact inspector sees what it claims to: registers, spills, shared memory, tensor instructions."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from support.aot import SHARED_LIMIT, compile_cases

pytestmark = pytest.mark.cpu


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, N: tl.constexpr):
    i = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        at = i[:, None] * K + k + i[None, :]
        acc += tl.dot(tl.load(a_ptr + at), tl.trans(tl.load(b_ptr + at)))
    tl.store(c_ptr + i[:, None] * N + i[None, :], acc)


def matmul(N: int, num_warps: int) -> None:
    a = torch.zeros(N, 4 * N, dtype=torch.bfloat16)
    _matmul_kernel[(1,)](a, a, torch.zeros(N, N), 4 * N, N=N, num_warps=num_warps)


@pytest.mark.parametrize(("target", "tensor_core"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma")])
def test_a_matmul_uses_the_tensor_cores(target, tensor_core):
    (small,), (spilling,) = compile_cases(
        [(matmul, {"N": 64, "num_warps": 4}), (matmul, {"N": 128, "num_warps": 1})], target
    )
    assert small.kernel == "_matmul_kernel"
    assert small.constexprs["N"] == 64
    assert small.num_warps == 4
    assert small.count(tensor_core) > 0
    assert small.spills == 0
    assert 0 < small.registers <= 512
    assert 0 < small.shared <= SHARED_LIMIT[target]
    assert (small.loop is None) == (target == "gfx942")
    if small.loop is not None:  # 64 x 64 x 64 products in each iteration, half of 64 x 128 x 64
        cycles = {"sm_80": 64**3 / 1024, "sm_90": 64**3 / 2048}[target]
        assert small.loop.peak % cycles == 0  # the compiler may unroll
    assert spilling.spills > 0  # 128 x 128 fp32 over one warp is 512 registers a thread


@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_100", "sm_120"])
@pytest.mark.slow
def test_other_gpus_compile(target):
    ((artifact,),) = compile_cases([(matmul, {"N": 64, "num_warps": 4})], target)
    assert artifact.registers > 0
    assert artifact.count("HMMA|UTCHMMA|UTC.*MMA") > 0


@pytest.mark.slow
def test_without_the_listing_spills_are_told_all_the_same():
    cases = [(matmul, {"N": 64, "num_warps": 4}), (matmul, {"N": 128, "num_warps": 1})]
    (small,), (spilling,) = compile_cases(cases, "sm_86", instructions=False)
    assert (small.spills, small.instructions) == (0, {})
    assert small.registers > 0
    assert spilling.spills > 0
