"""Tables of what was measured: for the terminal, and for the README from the files in bench/results/.

A results file is JSON with "kind" (which renderer reads it), "machine" (where, with what, when) and the measurements.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ...training.files import write_text

RESULTS = Path(__file__).parents[1] / "results"
PREDICTED = ".predicted.json"  # `bench validate` writes it beside the measurement, before there is one
BEGIN, END = "<!-- results: written by `rooflight bench report` -->", "<!-- end of results -->"


def kernel_results(machine: dict[str, Any], heard: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The content of a results file, from what the workers of `bench kernels` said."""
    measurements: dict[tuple[str, str, str], dict] = {}  # a case begun anew measures some of its providers again
    failures, ceilings = [], {}
    for line in heard:
        if "measurement" in line:
            m = line["measurement"]
            case = " ".join((m["operation"], _shape(m["shape"]), m["dtype"]))
            measurements[case, m["mode"], m["provider"]] = m
        elif "failure" in line:
            failures.append(line["failure"])
        elif "ceilings" in line:
            ceilings = line["ceilings"]
    cases = list(dict.fromkeys(case for case, _, _ in measurements))
    in_order = sorted(measurements, key=lambda key: (cases.index(key[0]), key[1] != "forward"))
    return {
        "kind": "kernels",
        "machine": machine,
        "ceilings": ceilings,
        "measurements": [measurements[key] for key in in_order],
        "failures": failures,
    }


def of_roof(m: dict[str, Any], ceilings: dict[str, float]) -> float | None:
    """A measurement's share of the ceiling that bounds it: products for attention, copies for the rest."""
    if not ceilings:
        return None
    if m["operation"] == "flash_attention":
        return m["teraflops"] / ceilings["gemm_teraflops"]
    return m["gigabytes_per_second"] / ceilings["copy_gigabytes_per_second"]


def table(measurements: Iterable[dict[str, Any]], ceilings: dict[str, float]) -> Table:
    """One row per provider and mode, in the order measured."""
    out = Table(title="Kernels, ours beside their peers (median; p20 to p80)", expand=False)
    if ceilings:
        gemm, copy = ceilings["gemm_teraflops"], ceilings["copy_gigabytes_per_second"]
        out.caption = f"roof: products {gemm:,.3g} TFLOP/s, copies {copy:,.0f} GB/s"
    for column in ("case", "provider"):
        out.add_column(column)
    for column in ("ms", "p20-p80", "GB/s", "TFLOP/s", "% roof", "MiB", "host us"):
        out.add_column(column, justify="right", no_wrap=True)
    before = None
    for m in measurements:
        case = f"{m['operation']} {m['mode']}, {_shape(m['shape'])}, {m['dtype']}"
        if before not in (None, case):
            out.add_section()
        share = of_roof(m, ceilings)
        out.add_row(
            case if case != before else "",
            m["provider"],
            f"{m['milliseconds']:.3f}",
            f"{m['milliseconds_p20']:.3f}-{m['milliseconds_p80']:.3f}",
            f"{m['gigabytes_per_second']:.1f}",
            f"{m['teraflops']:.3f}",
            "" if share is None else f"{100 * share:.1f}",
            "" if m["peak_mib"] is None else f"{m['peak_mib']:.0f}",
            "" if m["host_microseconds"] is None else f"{m['host_microseconds']:.1f}",
        )
        before = case
    return out


def failures_table(failures: Iterable[dict[str, str]]) -> Table:
    out = Table(title="Not measured")
    for column in ("case", "provider", "because"):
        out.add_column(column)
    for failure in failures:
        out.add_row(failure["case"], failure["provider"] or "all", failure["error"])
    return out


def _shape(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={int(value)}" for key, value in shape.items())


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _where(machine: dict[str, Any]) -> str:
    parts = [machine["device"], f"torch {machine['torch']}", f"triton {machine['triton']}"]
    if not machine.get("cuda"):
        parts.insert(1, f"{machine['threads']} threads")
    return ", ".join([*parts, f"commit {machine['commit']}", machine["date"]])


def _kernels(results: dict[str, Any]) -> str:
    """Ours and each peer in one row: milliseconds, and the rate that bounds the operation."""
    grouped: dict[tuple[str, str, str, str], dict[str, dict]] = {}
    for m in results["measurements"]:
        grouped.setdefault((m["operation"], m["mode"], _shape(m["shape"]), m["dtype"]), {})[m["provider"]] = m
    rows = []
    for (operation, mode, shape, dtype), providers in grouped.items():
        if "rooflight" not in providers:
            continue
        ours = providers.pop("rooflight")
        if operation == "rms_norm":
            rate = f"{ours['gigabytes_per_second']:,.0f} GB/s"
        else:
            rate = f"{ours['teraflops']:,.1f} TFLOP/s"
        peers = ", ".join(f"{name} {peer['milliseconds']:.3f}" for name, peer in providers.items())
        rows.append([f"{operation} {mode}, {shape}, {dtype}", f"{ours['milliseconds']:.3f}", rate, peers])
    return markdown_table(["kernel", "ms", "rate", "peers, ms"], rows)


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
    return f"{RENDERERS[results['kind']](results)}\n\n{source}: {_where(results['machine'])}."


def render(folder: Path = RESULTS) -> str:
    """Every results file as Markdown, ordered by file name, the tokenizer's as one table where they name their text.

    Raises ValueError on a kind that nothing renders.
    """
    found = list(read_results(folder).values())
    together = [results for results in found if results["kind"] == "tokenizer" and "corpus" in results]
    sections = [section(results) for results in found if results not in together]
    if together:
        places = dict.fromkeys(_where(results["machine"]) for results in together)
        sections.append(f"{_tokenizers(together)}\n\nMeasured on: {'; '.join(places)}.")
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
