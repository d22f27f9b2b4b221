"""The Hopper attention kernels compiled ahead of time, and what makes them fast there in their machine code."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from rooflight.kernels.attention.hopper.schedule import SCHEDULES
from support.aot import SHARED_LIMIT, Artifact, compile_cases
from support.artifacts import check_committed, hopper

pytestmark = pytest.mark.cpu

# Instructions that store or load a spilled register, in all and inside the hot loop, at most: none with triton 3.7
# but a few that stand outside every loop, elsewhere as measured (3.6: 6 and 0 in the forward, packed; 3.9: the others).
SPILLS: dict[tuple[str, int], tuple[int, int]] = {
    ("_flash_attention_fwd_hopper_kernel", 128): (31, 0),
    ("_flash_attention_fwd_hopper_kernel", 256): (34, 0),
    ("_flash_attention_bwd_hopper_kernel", 128): (10, 2),
    ("_flash_attention_bwd_hopper_kernel", 64): (14, 1),
}
if version("triton").startswith("3.7."):
    SPILLS = {
        ("_flash_attention_fwd_hopper_kernel", 128): (16, 0),  # with a window, none in a loop
        ("_flash_attention_bwd_hopper_kernel", 128): (8, 0),  # where dk and dv are stored, once a launch
        ("_flash_attention_bwd_hopper_kernel", 64): (12, 1),
    }


def forward(head_dim: int, kind: str, packed: bool = False, window: bool = False) -> None:
    """Launch the forward once, by a schedule of this kind."""
    import torch

    from rooflight.kernels.attention.hopper.forward import launch_forward
    from rooflight.kernels.attention.hopper.schedule import Schedule

    q, k, v = (torch.zeros(1, heads, 2048, head_dim, dtype=torch.bfloat16) for heads in (4, 2, 2))
    lse, ends = torch.empty(1, 4, 2048), None
    if packed:
        q, k, v = (torch.zeros_like(x[0].transpose(0, 1)) for x in (q, k, v))
        lse, ends = lse[0], torch.tensor([0, 256, 2048], dtype=torch.int32)
    left = 1023 if window else None
    launch_forward(q, k, v, torch.empty_like(q), lse, ends, ends, 2048, 2048, left, 0, 0.1, schedule=Schedule(kind))


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [schedule.kind for schedule in SCHEDULES])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule(head_dim, kind):
    shapes: list[dict[str, bool]] = [{}, {"packed": True}, {"window": True}]
    cases = [(forward, {"head_dim": head_dim, "kind": kind} | options) for options in shapes]
    for options, (artifact,) in zip(shapes, compile_cases(cases, "sm_90"), strict=True):
        check(artifact, head_dim)
        assert artifact.count("ATOMG") == (kind == "dynamic"), options
