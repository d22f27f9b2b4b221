"""The attention kernels as they ship, compiled ahead of time: spills, shared memory, tensor-core instructions."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from support.aot import SHARED_LIMIT, Artifact, compile_cases
from support.artifacts import check_committed

pytestmark = pytest.mark.cpu

KERNELS = {"fwd", "delta", "bwd_dkdv", "bwd_dq"}
TENSOR_CORE = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA|HMMA", "gfx942": "v_mfma"}  # the others: HMMA

# Instructions that store or load a spilled register, at most: none with triton 3.7, elsewhere as measured (3.6, 3.9).
BUDGET: dict[tuple[str, str, int], int] = {
    ("sm_80", "fwd", 64): 6,
    ("sm_80", "bwd_dkdv", 128): 11,
    ("sm_90", "bwd_dkdv", 64): 16,
    ("sm_90", "bwd_dkdv", 128): 30,
}
if version("triton").startswith("3.7."):
    BUDGET = {}


def attention(
    head_dim: int, dtype: str, features: bool = False, packed: bool = False, backward: bool = True,
    path: str = "portable", alibi: bool = False,
) -> None:  # fmt: skip
    """Launch every kernel of a path once, on inputs aligned as a model's are."""
    from rooflight.kernels.attention import paths
    from rooflight.kernels.attention.launch import bwd_op, fwd_op

    q, k, v = (torch.zeros(1, heads, 512, head_dim, dtype=getattr(torch, dtype)) for heads in (4, 2, 2))
    bounds: tuple = (None, None, 512, 512)
    mask, softcap, sinks = (None, 0), 0.0, None
    if features or packed:
        q, k, v = (torch.zeros_like(x[0].transpose(0, 1)) for x in (q, k, v))
        ends = torch.tensor([0, 256, 512], dtype=torch.int32)
        bounds = (ends, ends, 256, 256)
    if features:  # a window, a softcap, sinks
        mask, softcap, sinks = (128, 0), 30.0, torch.zeros(4)
    options = (*bounds, *mask, 0.1, softcap, torch.zeros(4) if alibi else None)
    with paths.use(path):
        out, lse, unround = fwd_op(q, k, v, sinks, *options)
        if backward:
            dlse = lse if features else None
            bwd_op(torch.zeros_like(out), dlse, q, k, v, out, lse, unround, sinks, *options)


def short(artifact: Artifact) -> str:
    """The kernel's name without what all share."""
    return artifact.kernel.removeprefix("_flash_attention_").removesuffix("_kernel")


def check(artifacts: list[Artifact], target: str, head_dim: int) -> None:
    assert {short(a) for a in artifacts} == KERNELS
    for artifact in artifacts:
        assert artifact.shared <= SHARED_LIMIT[target], artifact
        assert artifact.spills <= BUDGET.get((target, short(artifact), head_dim), 0), artifact
        if short(artifact) != "delta":
            assert artifact.count(TENSOR_CORE.get(target, "HMMA")) > 0, artifact


COMMON = ("sm_80", "sm_90", "sm_100")
COMMON_SIZES = (64, 128)


@pytest.mark.parametrize("target", [*COMMON[:2], pytest.param(COMMON[2], marks=pytest.mark.slow)])
def test_common_head_sizes(target):
    cases = [(attention, {"head_dim": size, "dtype": "bfloat16"}) for size in COMMON_SIZES]
    for artifacts, case in zip(compile_cases(cases, target), cases, strict=True):
        check(artifacts, target, case[1]["head_dim"])
        for artifact in artifacts:
            check_committed(target, case, artifact)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_alibi(target):
    """A bias keeps no product from the tensor cores, and what it spills at all it spills outside the inner loop."""
    cases = [(attention, {"head_dim": size, "dtype": "bfloat16", "alibi": True}) for size in (64, 128)]
    for artifacts in compile_cases(cases, target):
        assert {short(a) for a in artifacts} == KERNELS
        for artifact in artifacts:
            assert artifact.shared <= SHARED_LIMIT[target], artifact
            assert artifact.loop is None or artifact.loop.spills == 0, artifact
            if short(artifact) != "delta":
                assert artifact.count("HGMMA" if target == "sm_90" else "HMMA") > 0, artifact


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", [target for target in SHARED_LIMIT if target != "sm_86"])
def test_every_tile_fits_every_gpu(target, dtype):
    """Those that test_common_head_sizes does not compile.

    sm_86 has the shared memory of sm_89, which alone chooses the tiles, and Triton treats the two alike but for fp8.
    """
    # four tiles of 16 rows of 512 fp32 numbers are 128 KiB: the one backward that does not fit everywhere
    large = dtype == "bfloat16" or SHARED_LIMIT[target] > 132 << 10
    cases = [
        (
            attention,
            {
                "head_dim": size,
                "dtype": dtype,
                "features": size == 80,
                "alibi": size in (80, 128),
                "backward": size < 512 or large,
            },
        )
        for size in (16, 64, 80, 128, 256, 512)
        if not (dtype == "bfloat16" and target in COMMON and size in COMMON_SIZES)
    ]
    compiled = compile_cases(cases, target, timeout=1800, instructions=False)
    for artifacts, (_, arguments) in zip(compiled, cases, strict=True):
        packed = {"_clear"} if arguments["features"] else set()
        assert {short(a) for a in artifacts} == packed | (KERNELS if arguments["backward"] else {"fwd"})
        for artifact in artifacts:
            assert artifact.shared <= SHARED_LIMIT[target], artifact
