"""The measured rates of one machine that a roofline stands on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Sizes = tuple[int, ...]

# fp8's rate over that of two bytes, dense, by the data sheet of an H100 or H200: 1,979 over 989 TFLOP/s. It stands in
# where products in fp8 were not measured, and is the only figure here that was not.
FP8_RATIO = 2.0


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches, measured (never read from a table of device names).

    gemm_flops      dtype name ("bfloat16", ...) -> FLOP/s of large matrix products, the peak that MFU is held against
    copy_bandwidth  bytes/s to and from memory, read and written bytes both counted
    exp_rate        exponentials/s; None: not a limit
    kernels         "gemm bfloat16", "rms_norm backward float32", ... -> {sizes: work/s} of that kernel by itself, at a
                    few sizes; work is FLOPs where the kernel holds matrix products and elements elsewhere. A kernel
                    that is not here takes what the rates above leave it
    device, date, versions      where, when and with what they were measured
    memory_bytes    the device's memory; None: unknown
    host            "gemm bfloat16", ... -> seconds that the host takes to issue a call of that kernel, a GPU's alone; a
                    kernel that is not here takes the host no time
    fp8_flops       "forward", "backward" -> FLOP/s of large products in fp8, as kernels/fp8.py sums them in each pass;
                    empty where the device has none, or they were not measured
    """

    gemm_flops: dict[str, float]
    copy_bandwidth: float
    exp_rate: float | None = None
    kernels: dict[str, dict[Sizes, float]] = field(default_factory=dict)
    device: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    host: dict[str, float] = field(default_factory=dict)
    fp8_flops: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates: list[tuple[str, object]] = [("copy_bandwidth", self.copy_bandwidth)]
        if self.exp_rate is not None:
            rates.append(("exp_rate", self.exp_rate))
        rates += [(f"gemm_flops[{dtype!r}]", rate) for dtype, rate in self.gemm_flops.items()]
        rates += [(f"host[{kernel!r}]", seconds) for kernel, seconds in self.host.items()]
        rates += [(f"fp8_flops[{pass_!r}]", rate) for pass_, rate in self.fp8_flops.items()]
        for kernel, points in self.kernels.items():
            if not points or len({len(sizes) for sizes in points}) != 1 or min(min(sizes) for sizes in points) < 1:
                raise ValueError(f"kernels[{kernel!r}]: expected rates at sizes >= 1, as many each, got {points!r}")
            rates += [(f"kernels[{kernel!r}][{sizes}]", rate) for sizes, rate in points.items()]
        for name, rate in rates:
            if not isinstance(rate, int | float) or not 0 < rate < float("inf"):
                raise ValueError(f"{name}: expected a finite rate > 0, got {rate!r}")

    def gemm_rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`; ValueError when that was not measured."""
        if dtype not in self.gemm_flops:
            measured = ", ".join(self.gemm_flops) or "none"
            raise ValueError(f"ceilings: no GEMM rate for dtype {dtype!r} (measured: {measured}); measure it first")
        return self.gemm_flops[dtype]

    def fp8_rate(self, dtype: str, pass_: str) -> tuple[float, str]:
        """FLOP/s of products in fp8 in the forward or backward pass, and the dtype whose products' shares of their peak
        are taken for theirs: bfloat16's where it was measured, else `dtype`'s, as is FP8_RATIO times its rate where
        fp8's was not."""
        alike = "bfloat16" if "bfloat16" in self.gemm_flops else dtype
        return self.fp8_flops.get(pass_) or FP8_RATIO * self.gemm_rate(alike), alike

    def rate(self, kernel: str, sizes: Sizes) -> float | None:
        """Work/s of a kernel at those sizes, log-linear between the ones measured, level beyond; None: not measured."""
        points = self.kernels.get(kernel)
        return None if points is None else _interpolate(points, sizes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are strings: sizes are joined by x."""
        kernels = {
            kernel: {"x".join(map(str, sizes)): rate for sizes, rate in points.items()}
            for kernel, points in self.kernels.items()
        }
        return asdict(self) | {"kernels": kernels}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Ceilings:
        """The inverse of to_dict; ValueError on anything that it would not have written."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        _expect("fields", fields, dict)
        for name in fields:
            if name not in known:
                raise ValueError(f"ceilings: {name!r} is not one of {', '.join(known)}")
        for name in ("gemm_flops", "copy_bandwidth"):
            if name not in fields:
                raise ValueError(f"ceilings: {name!r} is missing")
        for name, kind in (
            ("gemm_flops", dict),
            ("kernels", dict),
            ("host", dict),
            ("fp8_flops", dict),
            ("versions", dict),
            ("device", str),
            ("date", str),
        ):
            _expect(name, fields.get(name, kind()), kind)
        for name, points in fields.get("kernels", {}).items():
            _expect(f"kernels[{name!r}]", points, dict)
        if fields.get("memory_bytes") is not None:
            _expect("memory_bytes", fields["memory_bytes"], int)
        values = dict(fields)
        values["kernels"] = {
            kernel: {tuple(map(int, sizes.split("x"))): rate for sizes, rate in points.items()}
            for kernel, points in values.get("kernels", {}).items()
        }
        return cls(**values)


def _expect(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"ceilings: {name}: expected {kind.__name__}, got {type(value).__name__}")


def _interpolate(points: Mapping[Sizes, float], sizes: Sizes) -> float:
    """The rate at `sizes`, one dimension after another."""
    if not sizes:
        return points[()]
    planes: dict[int, dict[Sizes, float]] = {}
    for (first, *rest), rate in points.items():
        planes.setdefault(first, {})[tuple(rest)] = rate
    low = max((first for first in planes if first <= sizes[0]), default=min(planes))
    high = min((first for first in planes if first >= sizes[0]), default=max(planes))
    below, above = (_interpolate(planes[first], sizes[1:]) for first in (low, high))
    if low == high:
        return below
    share = math.log(sizes[0] / low) / math.log(high / low)
    return below ** (1 - share) * above**share
