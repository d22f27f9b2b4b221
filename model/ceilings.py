"""The measured rates of one machine that a roofline stands on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches, measured (never read from a table of device names).

    gemm_flops                  dtype name ("bfloat16", ...) -> FLOP/s of large matrix products
    copy_bandwidth              bytes/s to and from memory, read and written bytes both counted
    exp_rate                    exponentials/s; None: not a limit
    attention_flops             T -> FLOP/s of the attention forward, counting 4 D per visible pair and head
    attention_backward_flops    T -> FLOP/s of its backward, counting 10 D; both empty: gemm_flops and exp_rate decide
    device, date, versions      where, when and with what they were measured
    memory_bytes                the device's memory; None: unknown
    """

    gemm_flops: dict[str, float]
    copy_bandwidth: float
    exp_rate: float | None = None
    attention_flops: dict[int, float] = field(default_factory=dict)
    attention_backward_flops: dict[int, float] = field(default_factory=dict)
    device: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        rates: list[tuple[str, object]] = [("copy_bandwidth", self.copy_bandwidth)]
        if self.exp_rate is not None:
            rates.append(("exp_rate", self.exp_rate))
        for name in ("gemm_flops", "attention_flops", "attention_backward_flops"):
            rates += [(f"{name}[{key!r}]", rate) for key, rate in getattr(self, name).items()]
        for name, rate in rates:
            if not isinstance(rate, int | float) or not 0 < rate < float("inf"):
                raise ValueError(f"{name}: expected a finite rate > 0, got {rate!r}")

    def gemm_rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`; ValueError when that was not measured."""
        if dtype not in self.gemm_flops:
            measured = ", ".join(self.gemm_flops) or "none"
            raise ValueError(f"ceilings: no GEMM rate for dtype {dtype!r} (measured: {measured}); measure it first")
        return self.gemm_flops[dtype]

    def attention_rate(self, context_length: int, *, backward: bool = False) -> float | None:
        """FLOP/s at that length, log-linear between the lengths measured and level beyond them; None: not measured."""
        points = sorted((self.attention_backward_flops if backward else self.attention_flops).items())
        if not points:
            return None
        for (t0, r0), (t1, r1) in pairwise(points):
            if t0 <= context_length <= t1:
                share = math.log(context_length / t0) / math.log(t1 / t0)
                return r0 ** (1 - share) * r1**share
        return points[0][1] if context_length < points[0][0] else points[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are strings."""
        return {
            key: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Ceilings:
        """The inverse of to_dict; ValueError on an unknown or a missing field."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ValueError(f"ceilings: {name!r} is not one of {', '.join(known)}")
        for name in ("gemm_flops", "copy_bandwidth"):
            if name not in fields:
                raise ValueError(f"ceilings: {name!r} is missing")
        values = dict(fields)
        for name in ("attention_flops", "attention_backward_flops"):
            values[name] = {int(t): rate for t, rate in values.get(name, {}).items()}
        return cls(**values)
