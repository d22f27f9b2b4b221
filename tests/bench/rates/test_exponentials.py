"""The kernel that measures exponentials computes them, and nothing besides."""

import pytest
import torch

from rooflight.bench.rates import exponentials
from support.aot import compile_cases


def test_the_kernel_takes_2_to_the_minus_x_again_and_again(device: torch.device):
    x = torch.linspace(-3, 5, 2 * exponentials.BLOCK, device=device)
    expected = x.double()
    for _ in range(5):
        expected = torch.exp2(-expected)
    exponentials.iterate(x, 5)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)


def launch() -> None:
    exponentials.iterate(torch.zeros(exponentials.BLOCK), exponentials.STEPS)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_compiled_loop_holds_exponentials_and_little_else(target: str):
    ((artifact,),) = compile_cases([(launch, {})], target)
    per_thread = exponentials.BLOCK // (32 * artifact.num_warps)
    exps = artifact.count("MUFU.EX2")
    assert exps >= per_thread
    assert exps % per_thread == 0
    assert artifact.spills == 0
    # eight instructions are issued in the time that one exponential takes
    assert sum(artifact.instructions.values()) < 8 * exps + 100


def test_a_cpu_has_a_rate_too():
    assert 1e6 < exponentials.exp_rate(torch.device("cpu")) < 1e12
