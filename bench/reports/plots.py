"""Figures: where a model's FLOPs go, predicted against measured, kernels beside their peers.

Each is drawn into a file whose ending says the format (png, svg, pdf), written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...model import PRESETS, ModelConfig, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("QKV", "scores and weighted sum", "output projection", "FFN", "logits")  # all that hold matrix products
# Okabe & Ito's colours: told apart by every eye, and in grey
COLORS = ("#56B4E9", "#D55E00", "#009E73", "#0072B2", "#E69F00", "#CC79A7", "#F0E442", "#000000")
SIZES = ("small", "medium", "large", "xl")
SHORTEST, LONGEST = 256, 65536
MARKERS = "osD^vP*X"


def why_no_plots() -> str | None:
    """None where figures can be drawn; else a sentence that says what is missing and how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"plots need matplotlib ({error}): pip install 'rooflight[demo]'"
    return None


def require_plots(suffix: str = "") -> None:
    """Raises ValueError where no figure can be drawn, or none into a file whose name ends so."""
    if why := why_no_plots():
        raise ValueError(why)
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix.removeprefix(".") not in formats:
        raise ValueError(f"plots: expected a file that ends in one of {', '.join(sorted(formats))}, got {suffix!r}")


def _figure(columns: int, size: tuple[float, float], rows: int = 1) -> tuple[Figure, Any]:
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    from ...tokenizer.files import atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".") or None
    try:
        # without a date and with ids that depend on the drawing alone: the same figure is the same file
        with atomic(path) as file, plt.rc_context({"svg.hashsalt": "rooflight"}):
            figure.savefig(file, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
    finally:
        plt.close(figure)


def flop_shares(config: ModelConfig, context_length: int | None = None) -> dict[str, float]:
    """Each part's share of a forward pass's matrix FLOPs, every query counted against every key."""
    e = estimate(config, batch_size=1, context_length=context_length, causal="full")
    return {c.name: c.forward.flops / e.forward_flops for c in e.components if c.name in PARTS}


def plot_shares(name: str, config: ModelConfig, path: Path) -> None:
    """Shares of the forward FLOPs: a bar for each GPT-2 size and for the model; the model's against context length."""
    family = "-swiglu" if config.ffn == "swiglu" else ""
    models = {f"gpt2-{size}{family}": PRESETS[f"gpt2-{size}{family}"] for size in SIZES} | {name: config}
    figure, ((bars, lengths),) = _figure(2, (11, 4.5))

    _stack(bars, list(models), [flop_shares(model) for model in models.values()])
    bars.set(title="At each model's own context length", ylabel="share of the forward pass's FLOPs")
    bars.set_xticks(range(len(models)), [model.removeprefix("gpt2-") for model in models], rotation=20)

    points = []
    T = SHORTEST
    while T <= LONGEST:
        points.append(T)
        T *= 2
    shares = [flop_shares(replace(config, context_length=T)) for T in points]
    lengths.stackplot(points, [[s[part] for s in shares] for part in PARTS], labels=PARTS, colors=COLORS)
    lengths.set_xscale("log", base=2)
    lengths.set(title=f"{name}, as the context grows", xlabel="context length (tokens)", ylim=(0, 1))
    lengths.set_xticks(points, [f"{T:,}" for T in points], rotation=30)
    lengths.margins(x=0)
    lengths.axvline(config.context_length, color="black", linestyle=":", linewidth=1)
    handles, labels = lengths.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    _save(figure, path)


def _stack(axes: Axes, names: Sequence[str], shares: Iterable[dict[str, float]]) -> None:
    """One bar for each name, its parts on top of one another with their percentages."""
    for x, share in zip(range(len(names)), shares, strict=True):
        bottom = 0.0
        for part, color in zip(PARTS, COLORS, strict=False):
            axes.bar(x, share[part], bottom=bottom, color=color, width=0.75)
            if share[part] > 0.03:
                axes.text(x, bottom + share[part] / 2, f"{share[part]:.1%}", ha="center", va="center", fontsize=7)
            bottom += share[part]
    axes.set_ylim(0, 1)


def plot_validation(validations: Sequence[dict[str, Any]], path: Path) -> None:
    """Predicted against measured seconds on logarithmic axes: every component of every model, and whole steps.

    validations: as Validation.to_dict gives them.  Raises ValueError when there is none.
    """
    if not validations:
        raise ValueError("validations: expected at least one, got none")
    figure, ((axes,),) = _figure(1, (7.5, 6))
    names = list(dict.fromkeys(row["name"] for v in validations for row in v["components"]))
    values = []
    for validation, marker in zip(validations, MARKERS * len(validations), strict=False):
        for row in validation["components"]:
            values += [row["predicted"], row["measured"]]
            color = COLORS[names.index(row["name"]) % len(COLORS)]
            # more parts than colours: those of the second round are hollow
            face = color if names.index(row["name"]) < len(COLORS) else "none"
            axes.plot(row["measured"], row["predicted"], marker, color=color, markerfacecolor=face, markersize=6)
        if validation["step_seconds"]:
            predicted = sum(row["predicted"] for row in validation["components"])
            values += [predicted, validation["step_seconds"]]
            axes.plot(validation["step_seconds"], predicted, marker, color="black", markersize=10, fillstyle="none")
    low, high = min(values) / 1.5, max(values) * 1.5
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color="black", alpha=0.1)
    for i, name in enumerate(names):
        face = COLORS[i % len(COLORS)] if i < len(COLORS) else "none"
        axes.plot([], [], "o", color=COLORS[i % len(COLORS)], markerfacecolor=face, label=name)
    for validation, marker in zip(validations, MARKERS * len(validations), strict=False):
        title = f"{validation['name']}, {validation['batch_size']} x {validation['context_length']}"
        axes.plot([], [], marker, color="grey", label=title)
    axes.plot([], [], "o", color="black", fillstyle="none", markersize=10, label="whole step")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="measured (s)", ylabel="predicted (s)", title="One training step; the band is 10 %")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def plot_kernels(measurements: Sequence[dict[str, Any]], path: Path) -> None:
    """Each case's peers as times ours, one line a case; right of 1 the peer is slower.

    measurements: as `kernel_tables.records` gives them.  Raises ValueError when there is none.
    """
    cases: dict[str, dict[str, float]] = {}
    for m in measurements:
        shape = " ".join(f"{key}={int(value)}" for key, value in m["shape"].items())
        cases.setdefault(f"{m['operation']} {m['mode']}, {shape}, {m['dtype']}", {})[m["provider"]] = m[
            "device_milliseconds"
        ]
    peers = list(dict.fromkeys(m["provider"] for m in measurements if m["provider"] != "rooflight"))
    if not peers:
        raise ValueError("measurements: expected some of a peer, got none")
    figure, ((axes,),) = _figure(1, (9, 1.5 + 0.28 * len(cases)))
    for peer, color, marker in zip(peers, COLORS * len(peers), MARKERS * len(peers), strict=False):
        both = [(times, y) for y, times in enumerate(cases.values()) if peer in times and "rooflight" in times]
        points = [(times[peer] / times["rooflight"], y) for times, y in both]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, label=peer)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="the peer's time over ours")
    axes.grid(alpha=0.3, axis="x", which="both")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


Series = dict[str, dict[int, float]]  # provider: {length: rate}


def rate_series(measurements: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Series]:
    """What can be drawn against a length: by title and axis, each provider's rates.

    Attention in TFLOP/s by the sequence's length, RMSNorm in GB/s by the row's; series of one point are left out.
    """
    found: dict[tuple[str, str], Series] = {}
    for m in measurements:
        shape = m["shape"]
        if m["operation"] == "flash_attention":
            if "window" in shape or "documents" in shape or shape["H"] != shape["K"]:
                continue
            mask = "causal" if shape["causal"] else "full"
            title = f"attention {m['mode']}, {mask}, head size {shape['D']}", "TFLOP/s by sequence length"
            length, rate = shape["T"], m["teraflops"]
        elif m["operation"] == "rms_norm" and "residual" not in shape and shape["M"] > 64:  # not the launch-bound one
            title = f"rms_norm {m['mode']}", "GB/s by row size"
            length, rate = shape["N"], m["gigabytes_per_second"]
        else:
            continue
        points = found.setdefault(title, {}).setdefault(m["provider"], {})
        points[length] = max(rate, points.get(length, 0.0))  # the larger batch of two
    return {
        title: {provider: dict(sorted(points.items())) for provider, points in series.items()}
        for title, series in found.items()
        if max(map(len, series.values())) > 1
    }


def plot_rates(measurements: Sequence[dict[str, Any]], path: Path) -> None:
    """Rates against lengths, ours beside each peer's: a panel for each of rate_series, four in a row.

    measurements: as `kernel_tables.records` gives them.  Raises ValueError where none has two lengths.
    """
    panels = rate_series(measurements)
    if not panels:
        raise ValueError("measurements: expected an operation at two lengths, got none")
    names = list(dict.fromkeys(provider for series in panels.values() for provider in series))
    look = dict(zip(names, zip(COLORS * len(names), MARKERS * len(names), strict=False), strict=False))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = _figure(columns, (3.8 * columns, 3.6 * rows), rows)
    every = [axes for row in grid for axes in row]
    for axes, ((title, unit), series) in zip(every, panels.items(), strict=False):
        for provider, points in series.items():
            color, marker = look[provider]
            axes.plot(list(points), list(points.values()), f"{marker}-", color=color, label=provider)
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=unit.partition(" by ")[2], ylabel=unit.partition(" by ")[0], ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    lines = {line.get_label(): line for axes in every for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    _save(figure, path)


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """A bar for each way to take one training step, ours and the peers', the host's part drawn into it."""
    rows = results["rows"]
    figure, ((axes,),) = _figure(1, (9, 1.2 + 0.4 * len(rows)))
    for y, row in enumerate(rows):
        axes.barh(y, row["milliseconds"], color=COLORS[0] if row["ours"] else COLORS[4], height=0.7)
        axes.barh(y, row["host_milliseconds"], color="none", edgecolor="black", height=0.4, linewidth=0.8)
        axes.text(row["milliseconds"], y, f" {row['milliseconds']:,.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['name']}, V = {row['vocab_size']:,}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms a step; framed: the host's part", title=results["title"])
    axes.margins(x=0.1)
    axes.grid(alpha=0.3, axis="x")
    _save(figure, path)
