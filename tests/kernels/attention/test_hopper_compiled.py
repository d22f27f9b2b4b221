"""The Hopper attention kernels compiled ahead of time, and what makes them fast there in their machine code."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from support.aot import SHARED_LIMIT, Artifact, compile_cases
from support.artifacts import check_committed, hopper

pytestmark = pytest.mark.cpu

# Instructions that store or load a spilled register, in all and inside the hot loop, at most: none with triton 3.7,
# elsewhere as measured (3.6: 6 and 0 in the forward, packed; 3.9: the others).
SPILLS: dict[tuple[str, int], tuple[int, int]] = {
    ("_flash_attention_fwd_hopper_kernel", 128): (31, 0),
    ("_flash_attention_fwd_hopper_kernel", 256): (34, 0),
    ("_flash_attention_bwd_hopper_kernel", 128): (10, 2),
}
if version("triton").startswith("3.7."):
    SPILLS = {}
PATHS_KERNELS = {"_flash_attention_fwd_hopper_kernel", "_flash_attention_bwd_hopper_kernel"}


def check(artifact: Artifact, head_dim: int) -> None:
    loop = artifact.loop
    assert loop is not None
    assert artifact.shared <= SHARED_LIMIT["sm_90"]
    assert artifact.count("USETMAXREG") > 0  # registers go from the producer to the consumers
    assert artifact.count("UTMALDG") > 0
    assert loop.warps == 8  # two warpgroups multiply
    most, in_loop = SPILLS.get((artifact.kernel, head_dim), (0, 0))
    assert artifact.spills <= most
    assert loop.spills <= in_loop
    assert loop.serialised == 0
    # the exponentials stand between wait(1) and wait(0), or before a wait(1): all of them under a product
    assert loop.overlapped == loop.exponentials > 0


def test_head_size_128():
    (artifacts,) = compile_cases([(hopper, {"head_dim": 128})], "sm_90")
    kernels = {a.kernel: a for a in artifacts}
    assert kernels.keys() >= PATHS_KERNELS
    forward, backward = (kernels[name] for name in sorted(PATHS_KERNELS, reverse=True))
    for artifact in (forward, backward):
        check(artifact, 128)
        check_committed("sm_90", (hopper, {"head_dim": 128}), artifact)
    assert forward.loop is not None
    assert forward.loop.ideal == 1.0  # bound by the tensor cores


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"head_dim": 64}, {"head_dim": 256}, {"head_dim": 128, "packed": True}], ids=str)
def test_every_shape(case):
    (artifacts,) = compile_cases([(hopper, case)], "sm_90")
    found = [a for a in artifacts if a.kernel in PATHS_KERNELS]
    assert len(found) == (1 if case["head_dim"] > 128 else 2)
    for artifact in found:
        check(artifact, case["head_dim"])
