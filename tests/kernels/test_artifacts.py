"""The row-wise kernels as they ship, compiled ahead of time, and the committed table of all kernels."""

from __future__ import annotations

import pytest

from support.aot import SHARED_LIMIT, compile_cases
from support.artifacts import (
    CASES,
    FP8_CASES,
    LOOPS,
    TARGETS,
    cases,
    check_committed,
    committed,
    rms_norm,
    rope,
    swiglu,
)

pytestmark = pytest.mark.cpu

# What runs by default: RMSNorm in both precisions, and one of its companions.
FAST = ("sm_80", "sm_90", "gfx942")
DEFAULT = [
    (rms_norm, {"N": 4096, "dtype": "bfloat16", "residual": True}),
    (rms_norm, {"N": 8192, "dtype": "float32", "residual": True}),
    (rms_norm, {"N": 16384, "dtype": "bfloat16", "residual": True}),
    (rope, {"head_dim": 128, "dtype": "bfloat16", "joined": True}),
    (swiglu, {"N": 11008, "dtype": "bfloat16"}),
]

# Rows of 16,384 in fp32 fill the 64 registers that each of 32 warps has; the tiles for sm_120 come next to that.
BUDGET = {("sm_120", "_rms_norm_bwd_kernel", "fp32", 16384): 10}


def check(target, some):
    compiled = compile_cases(some, target, 3000, instructions=target in TARGETS)
    for case, artifacts in zip(some, compiled, strict=True):
        assert artifacts
        for artifact in artifacts:
            constants = artifact.constexprs
            which = (target, artifact.kernel, constants.get("DTYPE"), constants.get("BLOCK_N"))
            assert artifact.spills <= BUDGET.get(which, 0), artifact
            assert artifact.shared <= SHARED_LIMIT[target], artifact
            check_committed(target, case, artifact)


@pytest.mark.parametrize("target", FAST)
def test_no_spill_and_no_surprise(target):
    assert all(case in CASES for case in DEFAULT)
    check(target, DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_configuration(target):
    check(target, [case for case in cases(target) if not (target in FAST and case in DEFAULT)])


def test_the_table_is_whole():
    table = committed()
    assert table[""], "docs/artifacts.md names no triton version"
    for target in TARGETS:
        kernels = {line.split(" | ")[0].removeprefix("| ") for line in table[target]}
        assert {"rms_norm_fwd", "rms_norm_bwd", "rms_norm_dw", "rope", "swiglu_fwd", "swiglu_bwd"} <= kernels
        loops = {line.split(" | ")[0].removeprefix("| ") for line in table.get(LOOPS + target, [])}
        attention = {"flash_attention_fwd", "flash_attention_bwd_dkdv", "flash_attention_bwd_dq"}
        if target == "sm_90":
            attention |= {"flash_attention_fwd_hopper", "flash_attention_bwd_hopper"}
        assert loops == (attention if target in ("sm_80", "sm_90") else set())
        assert {"cross_entropy_fwd", "cross_entropy_bwd", "flash_attention_fwd", "flash_attention_bwd_dq"} <= kernels


def test_loads_are_vectorised():
    """16-byte loads, from strided rows too: the layout of rows hides no alignment from the compiler."""
    some = [(rms_norm, {"N": 128, "dtype": "bfloat16", "heads": True}), (swiglu, {"N": 11008, "dtype": "bfloat16"})]
    for artifacts in compile_cases(some, "sm_90"):
        assert artifacts[0].count(r"LDG(STS)?\.E\..*128") >= 2


def test_casts_to_fp8_are_the_hardwares_and_stores_are_vectorised():
    """Both forms leave in 16-byte stores, the transposed one through shared memory; fp32 is rounded once."""
    ((amax, cast),) = compile_cases(FP8_CASES[:1], "sm_90")
    for artifact in amax, cast:
        assert artifact.spills == 0
        check_committed("sm_90", FP8_CASES[0], artifact)
    assert cast.count(r"F2FP\.SATFINITE\.E4M3\.F32") == 32  # two numbers each, of a thread's 64
    assert (cast.count(r"LDG\.E\.128"), cast.count(r"STG\.E\.128")) == (8, 8)
