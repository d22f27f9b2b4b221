"""The table at the end of `pytest --benchmark`: every closed form beside the time that was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = ("benchmark", "provider", "MFLOP", "MB", "predicted ms", "measured ms", "ratio", "of ceiling")
CEILING_SECONDS = 10.0  # for the ceilings of a dtype, where none were kept
OURS = "rooflight"  # whose kernels' rates a prediction stands on


def record(flops: int, moved: int, predicted: float, least: float, measured: float | None) -> dict[str, Any]:
    """A benchmark's extra_info.  least: seconds that the ceiling leaves; measured: the median, None where none was."""
    info: dict[str, Any] = {"flops": flops, "bytes": moved, "predicted_seconds": predicted}
    if measured is not None:
        info |= {
            "TFLOP/s": flops / measured / 1e12,
            "GB/s": moved / measured / 1e9,
            "share of ceiling": least / measured,
            "predicted / measured": predicted / measured,
        }
    return info


def lines(benchmarks: Iterable[tuple[str, float, dict[str, Any]]]) -> list[str]:
    """The table of (group, median seconds, extra_info), in text; a peer's time is not predicted, but measured."""
    rows = [COLUMNS]
    for group, seconds, info in benchmarks:
        provider = info.get("provider", OURS)
        ours = provider == OURS
        rows.append(
            (
                group,
                provider,
                f"{info['flops'] / 1e6:,.3f}",
                f"{info['bytes'] / 1e6:,.3f}",
                f"{info['predicted_seconds'] * 1e3:,.4f}" if ours else "-",
                f"{seconds * 1e3:,.4f}",
                f"{info['predicted / measured']:.3f}" if ours else "-",
                f"{info['share of ceiling']:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
