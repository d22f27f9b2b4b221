"""Prediction beside measurement: parameters, FLOPs, memory and time of one training step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import reference
from ..model import ModelConfig, Transformer, estimate
from ..model.ceilings import Ceilings
from ..training.config import TrainConfig
from ..training.loop import TrainResult
from .ceilings import load_ceilings, measure_ceilings, save_ceilings


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
class Validation:
    """The rows, and the ceilings that the predictions stand on."""

    rows: tuple[Row, ...]
    ceilings: Ceilings

    def table(self) -> Table:
        out = Table(title="One training step: predicted and measured", caption=self._caption())
        out.add_column("quantity")
        for column in ("predicted", "measured", "ratio"):
            out.add_column(column, justify="right")
        out.add_column("how it is measured")
        for row in self.rows:
            numbers = [f"{value:,.0f}" if row.unit == "" else f"{value:,.2f} {row.unit}" for value in _values(row)]
            out.add_row(row.quantity, *numbers, f"{row.ratio:.3f}", row.what)
        return out

    def _caption(self) -> str:
        c = self.ceilings
        rates = ", ".join(f"{dtype} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in c.gemm_flops.items())
        return f"{c.device}, {c.date}: products {rates}; copy {c.copy_bandwidth / 1e9:.1f} GB/s"

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) | {"ratio": row.ratio} for row in self.rows], "ceilings": self.ceilings.to_dict()}


def _values(row: Row) -> tuple[float, float]:
    return row.predicted, row.measured


def count_flops(config: ModelConfig, batch_size: int) -> tuple[int, int]:
    """(parameters, matrix-product FLOPs of a forward and backward) as torch counts them, on tensors without storage."""
    with torch.device("meta"):
        model = Transformer(config, ops=reference)
        tokens = torch.zeros(batch_size, config.context_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def ceilings_of(device: torch.device) -> Ceilings:
    """The ones kept from an earlier measurement on this machine, else measured now and kept."""
    known = load_ceilings(device)
    if known is None:
        known = measure_ceilings(device)
        save_ceilings(known, device)
    return known


def validate_step(run: TrainConfig, device: torch.device, measured: TrainResult) -> Validation:
    """Hold the closed form of a run's training step against what the run measured."""
    ceilings = ceilings_of(device)
    predicted = estimate(run.model, batch_size=run.batch_size, dtype=run.dtype, causal="full", ceilings=ceilings)
    parameters, flops = count_flops(run.model, run.batch_size)
    where = "allocated by torch" if device.type == "cuda" else "resident, beyond the process's own; eager keeps more"
    rows = (
        Row("parameters", "", predicted.parameters, parameters, "counted in the model"),
        Row("matrix FLOPs", "GFLOP", predicted.flops / 1e9, flops / 1e9, "torch's FlopCounterMode, T^2 attention"),
        Row("peak memory", "MiB", predicted.memory_bytes / 2**20, measured.peak_memory_bytes / 2**20, where),
        Row("step time", "ms", (predicted.seconds or 0) * 1e3, measured.step_seconds * 1e3, "median of the run"),
        Row(
            "throughput",
            "k tokens/s",
            (predicted.tokens_per_second or 0) / 1e3,
            measured.tokens_per_second / 1e3,
            "mean of the run's steps",
        ),
    )
    return Validation(rows, ceilings)
