"""RoPE's tables against the formulas written out, feature by feature, in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from rooflight.kernels import RopeScaling, rope_tables

D, N, THETA = 16, 48, 10000.0
PLAIN = [THETA ** (-2 * i / D) for i in range(D // 2)]


def _llama3(f: float) -> float:
    length = 2 * math.pi / f  # a wavelength
    if length < 32 / 4:
        return f
    if length > 32 / 1:
        return f / 8
    smooth = (32 / length - 1) / (4 - 1)
    return (1 - smooth) * f / 8 + smooth * f


def _yarn(i: int) -> float:
    def turns(n: float) -> float:
        return D * math.log(32 / (n * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(turns(32)), 0), min(math.ceil(turns(1)), D - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return PLAIN[i] / 4 * ramp + PLAIN[i] * (1 - ramp)


NUMBERS = tuple(1.0 + i for i in range(D // 2))
# the scaling, the frequencies that it should give, the tables' factor
SCALINGS = {
    "none": (None, PLAIN, 1.0),
    "linear": ({"kind": "linear", "factor": 4.0}, [f / 4 for f in PLAIN], 1.0),
    "llama3": (
        {
            "kind": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_context_length": 32,
        },
        [_llama3(f) for f in PLAIN],
        1.0,
    ),
    "dynamic, longer": (
        {"kind": "dynamic", "factor": 3.0, "original_context_length": 32},
        [(THETA * (3 * N / 32 - 2) ** (D / (D - 2))) ** (-2 * i / D) for i in range(D // 2)],
        1.0,
    ),
    "dynamic, short": ({"kind": "dynamic", "factor": 3.0, "original_context_length": 64}, PLAIN, 1.0),
    "yarn": (
        {"kind": "yarn", "factor": 4.0, "original_context_length": 32},
        [_yarn(i) for i in range(D // 2)],
        0.1 * math.log(4) + 1,
    ),
    "longrope, longer": (
        {
            "kind": "longrope",
            "factor": 4.0,
            "original_context_length": 32,
            "short_factor": (1.0,) * 8,
            "long_factor": NUMBERS,
        },
        [f / n for f, n in zip(PLAIN, NUMBERS, strict=True)],
        math.sqrt(1 + math.log(4) / math.log(32)),
    ),
    "longrope, short": (
        {
            "kind": "longrope",
            "attention_factor": 1.5,
            "original_context_length": 48,
            "short_factor": NUMBERS,
            "long_factor": (1.0,) * 8,
        },
        [f / n for f, n in zip(PLAIN, NUMBERS, strict=True)],
        1.5,
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_tables(name: str) -> None:
    scaling, frequencies, factor = SCALINGS[name]
    cos, sin = rope_tables(N, D, theta=THETA, scaling=scaling)
    assert cos.shape == sin.shape == (N, D // 2)
    for position in (0, 1, N - 1):
        for i, frequency in enumerate(frequencies):
            assert cos[position, i].item() == pytest.approx(factor * math.cos(position * frequency), abs=1e-7 * factor)
            assert sin[position, i].item() == pytest.approx(factor * math.sin(position * frequency), abs=1e-7 * factor)
    assert cos.dtype == torch.float32


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "ntk"}, "expected a kind of linear, .* got 'ntk'"),
        ({"factor": 2.0}, "expected a kind of"),
        ({"kind": "linear"}, "linear needs factor"),
        ({"kind": "linear", "factor": 0.0}, "factor: expected finite numbers > 0"),
        ({"kind": "linear", "factor": "2"}, "factor: expected finite numbers > 0"),
        ({"kind": "linear", "factor": 2.0, "beta_fast": 3.0}, "linear has no beta_fast"),
        ({"kind": "linear", "factor": 2.0, "mscale": 3.0}, "mscale: no such field"),
        (
            {"kind": "longrope", "original_context_length": 4, "short_factor": [1.0], "long_factor": [1.0]},
            "expected 8 numbers",
        ),
        (
            {"kind": "llama3", "factor": 2, "low_freq_factor": 2, "high_freq_factor": 2, "original_context_length": 4},
            "high_freq_factor: expected more than low_freq_factor",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_scaling_that_is_none_is_refused(scaling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^rope_scaling: {message}"):
        rope_tables(N, D, scaling=scaling)


def test_a_scaling_is_a_value() -> None:
    one = RopeScaling("longrope", original_context_length=4, short_factor=[1, 2], long_factor=[2, 3])
    assert hash(one) == hash(RopeScaling.of(one))
    with pytest.raises(ValueError, match="head_dim"):
        rope_tables(4, 7)
    with pytest.raises(ValueError, match="theta"):
        rope_tables(4, 8, theta=0)
