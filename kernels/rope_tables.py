"""RoPE's tables of cosines and sines, with the scalings that stretch a model to longer contexts than it was trained on.

Feature pair i of a head of size D turns by position * theta^(-2 i / D) (Su et al. 2021, eq. 15). A scaling changes
these frequencies, and two kinds the size of the entries too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["RopeScaling", "rope_tables"]

# What each kind needs beside its name, and what else it reads.
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", "original_context_length"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_context_length"}, set()),
    "yarn": ({"factor", "original_context_length"}, {"attention_factor", "beta_fast", "beta_slow", "truncate"}),
    "longrope": ({"short_factor", "long_factor", "original_context_length"}, {"factor", "attention_factor"}),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched by `factor`. Every kind reads its own fields and refuses the others.

    linear     all frequencies divided by factor (Chen et al. 2023)
    dynamic    NTK-aware: theta grows with the length of the sequence, past original_context_length
    llama3     only wavelengths over original_context_length / low_freq_factor are divided, those under
               original_context_length / high_freq_factor kept, between them interpolated (Grattafiori et al. 2024)
    yarn       divided by a ramp over the features, from those that turn beta_fast times in original_context_length to
               those that turn beta_slow times; tables times attention_factor, 0.1 ln(factor) + 1 where it is not given
               (Peng et al. 2023, §3.2-3.4)
    longrope   each frequency divided by its own number: short_factor's in sequences of at most original_context_length
               tokens, long_factor's in longer ones; tables times attention_factor, by default
               sqrt(1 + ln(factor) / ln(original_context_length)) (Ding et al. 2024)
    """

    kind: str
    factor: float | None = None
    original_context_length: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling: expected a kind of {', '.join(KINDS)}, got {self.kind!r}")
        needed, optional = KINDS[self.kind]
        for name in (field.name for field in fields(self) if field.name != "kind"):
            value = getattr(self, name)
            if value is None:
                if name in needed:
                    raise ValueError(f"rope_scaling: {self.kind} needs {name}")
                continue
            if name not in needed | optional:
                raise ValueError(f"rope_scaling: {self.kind} has no {name}, got {value!r}")
            if name in ("short_factor", "long_factor"):
                if not isinstance(value, list | tuple):
                    raise ValueError(f"rope_scaling: {name}: expected a list of numbers, got {value!r}")
                value = tuple(value)
                object.__setattr__(self, name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if name == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"rope_scaling: truncate: expected true or false, got {value!r}")
            elif not all(type(x) in (int, float) and 0 < x < math.inf for x in numbers):
                raise ValueError(f"rope_scaling: {name}: expected finite numbers > 0, got {value!r}")

        if self.kind == "llama3" and not (self.low_freq_factor or 0) < (self.high_freq_factor or 0):
            raise ValueError(f"rope_scaling: high_freq_factor: expected more than low_freq_factor, got {self}")

    @classmethod
    def of(cls, given: RopeScaling | Mapping[str, Any]) -> RopeScaling:
        """`given`, or the scaling whose fields a mapping holds. ValueError on an unknown field."""
        if isinstance(given, RopeScaling):
            return given
        if not isinstance(given, Mapping) or "kind" not in given:
            raise ValueError(f"rope_scaling: expected a kind of {', '.join(KINDS)}, got {given!r}")
        if unknown := set(given) - {field.name for field in fields(cls)}:
            raise ValueError(f"rope_scaling: {min(unknown)}: no such field")
        return cls(**given)

    @property
    def table_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None or self.kind not in ("yarn", "longrope"):
            return self.attention_factor or 1.0
        factor = self.factor or 1.0
        if factor <= 1:
            return 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(factor) + 1
        return math.sqrt(1 + math.log(factor) / math.log(self.original_context_length or math.e))

    def frequencies(self, plain: Tensor, theta: float, length: int) -> Tensor:
        """The scaled ones of `plain`, (D / 2,), for a sequence of `length` tokens."""
        factor, original = self.factor or 1.0, self.original_context_length or 1
        half = plain.shape[0]
        if self.kind == "linear":
            return plain / factor
        if self.kind == "dynamic":
            growth = factor * max(length, original) / original - (factor - 1)
            exponent = torch.arange(half, dtype=plain.dtype, device=plain.device) / half
            return (theta * growth ** (half / (half - 1))) ** -exponent if half > 1 else plain
        if self.kind == "longrope":
            numbers = (self.long_factor if length > original else self.short_factor) or ()
            if len(numbers) != half:
                raise ValueError(f"rope_scaling: expected {half} numbers in short_factor and long_factor")
            return plain / torch.tensor(numbers, dtype=plain.dtype, device=plain.device)
        if self.kind == "yarn":
            keep = self._kept(plain, theta)
        else:
            low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 1.0
            turns = original * plain / (2 * math.pi)  # in the original context
            keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain / factor * (1 - keep) + plain * keep

    def _kept(self, plain: Tensor, theta: float) -> Tensor:
        """YaRN's ramp: 1 for the fast features, which stay, to 0 for the slow."""
        half, original = plain.shape[0], self.original_context_length or 1
        fast, slow = (
            half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast or 32.0, self.beta_slow or 1.0)
        )
        if self.truncate is not False:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, 2 * half - 1)
        feature = torch.arange(half, dtype=plain.dtype, device=plain.device)
        return 1 - ((feature - fast) / (slow - fast if slow != fast else 0.001)).clamp(0, 1)


def rope_tables(
    n_position: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    scaling: RopeScaling | Mapping[str, Any] | None = None,
    length: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, (n_position, head_dim / 2), fp32, computed in fp64: the tables that `rope` takes.

    head_dim: the features that turn; fewer than a head has for a partial rotation.
    length: of the sequences that dynamic and longrope are to serve; n_position by default.
    Raises ValueError on an odd head_dim, a theta <= 0 and a scaling that is none.
    """
    if n_position < 0 or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number of features and n_position >= 0, got {head_dim}")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta: expected a finite number > 0, got {theta}")
    position = torch.arange(n_position, dtype=torch.float64, device=device)
    feature = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    frequency, factor = theta ** (-feature / head_dim), 1.0
    if scaling is not None:
        scaling = RopeScaling.of(scaling)
        factor = scaling.table_factor
        frequency = scaling.frequencies(frequency, theta, n_position if length is None else length)
    angle = torch.outer(position, frequency)
    return (angle.cos() * factor).float(), (angle.sin() * factor).float()
