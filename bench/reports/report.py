"""Tables of what was measured, from the files in bench/results/: the README's few, and a section for each file.

A results file is JSON with "kind" (which renderer reads it), "machine" (where, with what, when) and the measurements.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...training.files import write_text
from . import kernel_tables

RESULTS = Path(__file__).parents[1] / "results"
PREDICTED = ".predicted.json"  # `bench validate` writes it beside the measurement, before there is one
BEGIN, END = "<!-- results: written by `rooflight bench report` -->", "<!-- end of results -->"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _kernels(results: dict[str, Any]) -> str:
    """A row for each provider of each case, and what was not measured and why."""
    ceilings = results.get("ceilings") or {}
    rows, before = [], None
    for m in kernel_tables.records(results["measurements"]):
        case = kernel_tables.case_text(m)
        rows.append([case if case != before else "", m["provider"], *kernel_tables.cells(m, ceilings)])
        before = case
    text = markdown_table(["kernel", "provider", *kernel_tables.COLUMNS], rows)
    text = f"{text}\n\n{kernel_tables.caption(ceilings)}."
    if failures := results.get("failures"):
        lost = [[failure["case"], failure["provider"] or "all", failure["error"]] for failure in failures]
        text += "\n\nNot measured, or measured and left out:\n\n" + markdown_table(
            ["case", "provider", "because"], lost
        )
    return text


def _headlines(files: Sequence[dict[str, Any]]) -> list[str]:
    """The GPU's kernels, a row for a shape, as measured last."""
    tables = kernel_tables.headlines(kernel_tables.newest(files))
    return [
        f"{title}:\n\n{markdown_table(columns, rows)}\n\nMeasured on: {'; '.join(places)}."
        for title, columns, rows, places in tables
    ]


def _steps(results: dict[str, Any]) -> str:
    """Training steps of one model, ours beside plain PyTorch's, each over the fastest peer with its vocabulary."""
    best: dict[int, float] = {}
    for row in results["rows"]:
        if not row["ours"]:
            best[row["vocab_size"]] = min(row["milliseconds"], best.get(row["vocab_size"], math.inf))
    rows = [
        [
            f"{row['name']}, vocabulary {row['vocab_size']:,}",
            f"{row['milliseconds']:,.0f}",
            f"{row['tokens_per_second'] / 1e3:,.1f} k",
            f"{row['host_milliseconds']:,.0f}",
            f"{row['peak_bytes'] / 2**30:,.1f}",
            f"{best[row['vocab_size']] / row['milliseconds']:.2f}" if row["ours"] and row["vocab_size"] in best else "",
        ]
        for row in results["rows"]
    ]
    columns = [results["title"], "ms", "tokens/s", "host ms", "peak GiB", "speed over the peer's"]
    return "One training step:\n\n" + markdown_table(columns, rows)


def _predictions(results: dict[str, Any]) -> str:
    """What was predicted before there was a measurement, beside it: misses stay."""
    rows = []
    for row in results["rows"]:
        low, high, measured = row["low"], row["high"], row["measured"]
        predicted = f"{low:,g}" if low == high else f">= {low:,g}" if high is None else f"{low:,g} to {high:,g}"
        hit = low <= measured <= (math.inf if high is None else high) if low != high else None
        ratio = f"{low / measured:.2f}" if hit is None else "held" if hit else "missed"
        rows.append(
            [row["what"], row["unit"], predicted, row["predicted_on"], f"{measured:,g}", row["measured_on"], ratio]
        )
    columns = ["what", "unit", "predicted", "on", "measured", "on", "held, or predicted / measured"]
    return "Predicted before, measured since:\n\n" + markdown_table(columns, rows)


def _demo(results: dict[str, Any]) -> str:
    """What the demo reached, then its prediction beside its measurement."""
    training = results["training"]
    rows = [
        [row["quantity"], *(_number(row[key], row["unit"]) for key in ("predicted", "measured")), f"{row['ratio']:.3f}"]
        for row in results["rows"]
    ]
    return (
        f"The demo: {training['val_bits_per_byte']:.3f} bits per byte on held-out text after {training['step']:,} "
        f"steps ({training['tokens']:,} tokens) in {training['seconds']:.0f} s, one step predicted and measured:\n\n"
        + markdown_table(["quantity", "predicted", "measured", "ratio"], rows)
    )


def _number(value: float, unit: str) -> str:
    return f"{value:,.2f} {unit}" if unit else f"{value:,.0f}"


def _tokenizers(files: Sequence[dict[str, Any]]) -> str:
    """All texts in one table: a row of our seconds for each, then a row for each peer."""
    tasks = list(dict.fromkeys(r["task"] for results in files for r in results["rows"]))
    rows = []
    for results in files:
        beside: dict[str, dict[str, dict[str, Any]]] = {}
        for r in results["rows"]:
            beside.setdefault(r["peer"], {})[r["task"]] = r
        ours = {task: r for found in beside.values() for task, r in found.items()}
        corpus = results["corpus"]
        text = f"{corpus['name']}, {corpus['bytes'] / 1e6:,.0f} MB, {corpus['vocab_size']:,} tokens"
        rows.append([text, "seconds", *(f"{ours[task]['seconds']:.2f}" if task in ours else "" for task in tasks)])
        for peer, found in beside.items():
            ratios = (f"{r['seconds'] / r['peer_seconds']:.2f}" if (r := found.get(task)) else "" for task in tasks)
            rows.append(["", f"/ {peer}'s", *ratios])
    encoded = max(results["corpus"]["encoded_bytes"] for results in files) / 1e6
    workers = " or ".join(map(str, sorted({results["machine"]["threads"] for results in files})))
    return (
        "The tokenizer: our seconds, and below them the same over each peer's, so that less than 1 is faster. Each "
        f"text trains a vocabulary in {workers} processes, and {encoded:,.0f} MB of it are encoded with that:\n\n"
        + markdown_table(["text, vocabulary", "", *tasks], rows)
    )


def _tokenizer(results: dict[str, Any]) -> str:
    """A row for each task on the same text: our seconds, and those over each peer's."""
    peers = list(dict.fromkeys(r["peer"] for r in results["rows"]))
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for r in results["rows"]:
        tasks.setdefault(r["task"], {})[r["peer"]] = r
    rows = []
    for task, beside in tasks.items():
        ratios = [f"{r['seconds'] / r['peer_seconds']:.2f}" if (r := beside.get(peer)) else "" for peer in peers]
        rows.append([task, f"{next(iter(beside.values()))['seconds']:.2f}", *ratios])
    table = markdown_table(["tokenizer", "seconds", *(f"/ {peer}'s" for peer in peers)], rows)
    corpus = results.get("corpus")
    if corpus is None:
        return table
    size, encoded = (f"{corpus[key] / 1e6:,.0f} MB" for key in ("bytes", "encoded_bytes"))
    text = f"{corpus['name']}, {size}, {corpus['vocab_size']:,} tokens trained on it, {encoded} of it encoded"
    return f"The tokenizer on {text}; our time over each peer's, so that less than 1 is faster:\n\n{table}"


def _validation(results: dict[str, Any]) -> str:
    """One row a model: the whole step, its memory, and the component that the estimate misses by most."""
    rows = []
    for v in results["validations"]:
        totals = {row["quantity"]: row for row in v["rows"]}
        cells = [f"{v['name']}, {v['batch_size']} x {v['context_length']}, {v['dtype']}"]
        for quantity in ("step time", "peak memory"):
            row = totals[quantity]
            cells += [_number(row["predicted"], row["unit"]), _number(row["measured"], row["unit"])]
            cells.append(f"{row['ratio']:.3f}")
        large = [row for row in v["components"] if row["measured"] > 0.02 * v["step_seconds"]]
        worst = max(large, key=lambda row: abs(math.log(row["ratio"])))
        rows.append([*cells, f"{totals['matrix FLOPs']['ratio']:.6f}", f"{worst['name']} {worst['ratio']:.3f}"])
    columns = ["one training step", "predicted", "measured", "ratio", "memory, predicted", "measured", "ratio"]
    columns += ["FLOPs, ratio", "component furthest off, of those above 2 %"]
    return markdown_table(columns, rows)


def _prediction(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{name}, {p['batch_size']} x {p['context_length']}, {p['dtype']}",
            f"{p['seconds'] * 1e3:,.1f} ms",
            f"{p['tokens_per_second']:,.0f}",
            f"{p['memory_bytes'] / 2**30:,.1f} GiB",
        ]
        for name, p in results["predictions"].items()
    ]
    return "Predicted, not measured:\n\n" + markdown_table(["one training step", "time", "tokens/s", "memory"], rows)


RENDERERS = {
    "kernels": _kernels,
    "steps": _steps,
    "predictions": _predictions,
    "demo": _demo,
    "tokenizer": _tokenizer,
    "validation": _validation,
    "prediction": _prediction,
}


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """{file's stem: its content}, by name; a prediction whose measurement stands beside it is left out.

    Raises ValueError on a kind that nothing renders.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(PREDICTED) and path.with_name(path.name.replace(PREDICTED, ".json")).exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.get("kind") not in RENDERERS:
            raise ValueError(f"{path}: expected kind to be one of {', '.join(RENDERERS)}, got {results.get('kind')!r}")
        found[path.stem] = results
    return found


def section(results: dict[str, Any]) -> str:
    """One file's results as Markdown, and where they come from."""
    source = "For" if results["kind"] == "prediction" else "Measured on"
    text = f"{RENDERERS[results['kind']](results)}\n\n{source}: {kernel_tables.where(results['machine'])}."
    return f"{text} {results['note']}" if "note" in results else text


def render(folder: Path = RESULTS) -> str:
    """The README's tables: GPU kernels by shape, steps, the demo, validations, the tokenizer's texts together.

    The page has every file whole (reports/page.py). Raises ValueError on a kind that nothing renders.
    """
    found = list(read_results(folder).values())
    by_kind = {kind: [results for results in found if results["kind"] == kind] for kind in RENDERERS}
    sections = _headlines(by_kind["kernels"])
    for kind in ("steps", "demo", "validation", "prediction"):
        sections += map(section, by_kind[kind])
    texts = [results for results in by_kind["tokenizer"] if "corpus" in results]
    sections += [section(results) for results in by_kind["tokenizer"] if results not in texts]
    if texts:
        places = dict.fromkeys(kernel_tables.where(results["machine"]) for results in texts)
        sections.append(f"{_tokenizers(texts)}\n\nMeasured on: {'; '.join(places)}.")
    return "\n\n".join(sections)


def update_readme(readme: Path, folder: Path = RESULTS) -> bool:
    """Replace what stands between the two markers of the README; returns whether anything changed.

    Raises ValueError when the markers are not there.
    """
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme}: the markers {BEGIN!r} and {END!r} are missing")
    new = pattern.sub(lambda _: f"{BEGIN}\n{render(folder)}\n{END}", text)
    if new == text:
        return False
    write_text(readme, new)
    return True
