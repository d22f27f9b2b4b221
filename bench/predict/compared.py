"""Prediction beside measurement, as it is told: the totals of a step, its components, and what they leave."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ...model.estimate import Estimate
from .host import eager_seconds
from .residual import Residual

RESIDUAL = {"kernels": "kernels, in the step", "gaps": "gaps between them", "clock": "a lower clock"}


@dataclass(frozen=True)
class Row:
    """One quantity; what says how it was measured and why it may differ from the prediction."""

    quantity: str
    unit: str
    predicted: float
    measured: float
    what: str

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else float("nan")


@dataclass(frozen=True)
class ComponentRow:
    """A component's seconds in one step, forward, backward and update together."""

    name: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else float("nan")


@dataclass(frozen=True)
class Validation:
    """One step, whole and in its components, and the estimate it is held against."""

    name: str
    predicted: Estimate
    rows: tuple[Row, ...]
    components: tuple[ComponentRow, ...] = ()
    step_seconds: float | None = None
    notes: tuple[str, ...] = ()  # what could not be measured, and why
    host_seconds: float | None = None  # of the step, until the host has issued all of it; None on a CPU
    split: Residual | None = None  # of the residual; None where it was not looked into

    @property
    def residual(self) -> float | None:
        """Seconds of the measured step that its measured components leave unexplained; None without both."""
        if self.step_seconds is None or not self.components:
            return None
        return self.step_seconds - sum(row.measured for row in self.components)

    def tables(self) -> list[Table]:
        """The components where they were measured, and the totals."""
        return [*([self._component_table()] if self.components else []), self._total_table()]

    def _total_table(self) -> Table:
        out = Table(title=f"{self._title()}: predicted and measured", caption=self._caption())
        out.add_column("quantity")
        for column in ("predicted", "measured", "ratio"):
            out.add_column(column, justify="right")
        out.add_column("how it is measured")
        for row in self.rows:
            numbers = [f"{v:,.0f}" if row.unit == "" else f"{v:,.2f} {row.unit}" for v in (row.predicted, row.measured)]
            out.add_row(row.quantity, *numbers, f"{row.ratio:.3f}", row.what)
        return out

    def _component_table(self) -> Table:
        out = Table(title=f"{self._title()}: components, each by itself")
        out.add_column("component")
        for column in ("predicted", "measured", "ratio", "share of step"):
            out.add_column(column, justify="right")
        for row in self.components:
            out.add_row(row.name, _ms(row.predicted), _ms(row.measured), f"{row.ratio:.3f}", self._share(row.measured))
        out.add_section()
        predicted, measured = (sum(getattr(row, key) for row in self.components) for key in ("predicted", "measured"))
        out.add_row("sum", _ms(predicted), _ms(measured), f"{predicted / measured:.3f}", self._share(measured))
        if self.step_seconds is not None and self.residual is not None:
            out.add_row("residual: step - sum", "", _ms(self.residual), "", self._share(self.residual))
            for name, seconds in asdict(self.split).items() if self.split else ():
                out.add_row(f"  {RESIDUAL[name]}", "", _ms(seconds), "", self._share(seconds))
            step, eager = self.step_seconds, eager_seconds(self.predicted) or predicted
            out.add_row("step", _ms(eager), _ms(step), f"{eager / step:.3f}", "100.0%", style="bold")
        return out

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.step_seconds:.1%}" if self.step_seconds else ""

    def _title(self) -> str:
        e = self.predicted
        return f"{self.name}, batch {e.batch_size} x {e.context_length}, {e.dtype}"

    def _caption(self) -> str:
        c = self.predicted.ceilings
        assert c is not None
        rates = ", ".join(f"{dtype} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in c.gemm_flops.items())
        machine = f"{c.device}, {c.date}: products {rates}; copy {c.copy_bandwidth / 1e9:.1f} GB/s"
        host = "" if self.host_seconds is None else f"the host issues a step in {_ms(self.host_seconds)}"
        return "\n".join(filter(None, (machine, host, *self.notes)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the totals, the components, the residual."""
        e = self.predicted
        return {
            "name": self.name,
            "model": e.config.to_dict(),
            "batch_size": e.batch_size,
            "context_length": e.context_length,
            "dtype": e.dtype,
            "rows": [asdict(row) | {"ratio": row.ratio} for row in self.rows],
            "components": [asdict(row) | {"ratio": row.ratio} for row in self.components],
            "step_seconds": self.step_seconds,
            "residual_seconds": self.residual,
            "residual": asdict(self.split) if self.split else None,
            "host_seconds": self.host_seconds,
            "notes": list(self.notes),
        }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"
