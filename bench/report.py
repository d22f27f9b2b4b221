"""Tables of measurements, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from .harness import Measurement


def table(measurements: Iterable[Measurement]) -> Table:
    """One row per provider and mode, in the order measured."""
    out = Table(title="Kernels, ours beside their peers (median; p20 to p80)")
    for column in ("operation", "mode", "shape", "dtype", "provider"):
        out.add_column(column)
    for column in ("ms", "p20-p80", "GB/s", "TFLOP/s", "peak MiB"):
        out.add_column(column, justify="right")
    before = None
    for m in measurements:
        if before not in (None, (m.operation, m.mode, m.shape)):
            out.add_section()
        before = (m.operation, m.mode, m.shape)
        out.add_row(
            m.operation,
            m.mode,
            " ".join(f"{key}={int(value)}" for key, value in m.shape.items()),
            m.dtype,
            m.provider,
            f"{m.milliseconds:.3f}",
            f"{m.milliseconds_p20:.3f}-{m.milliseconds_p80:.3f}",
            f"{m.gigabytes_per_second:.1f}",
            f"{m.teraflops:.3f}",
            "" if m.peak_mib is None else f"{m.peak_mib:.0f}",
        )
    return out
