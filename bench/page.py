"""Everything in bench/results/ as one HTML file: the README's tables, each component, and the plots."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ..model import PRESETS
from ..training.files import write_text
from .plots import plot_kernels, plot_rates, plot_shares, plot_validation, rate_series
from .report import RESULTS, markdown_table, read_results, section

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


def write_page(path: Path, folder: Path = RESULTS) -> None:
    """Write the page, whole or not at all. Raises ValueError on a results file that nothing renders."""
    parts = ["<h1>rooflight, predicted and measured</h1>"]
    for name, results in read_results(folder).items():
        parts += [f"<h2>{escape(name)}</h2>", to_html(section(results))]
        if results["kind"] == "validation":
            parts += [to_html(_components(v)) for v in results["validations"]]
            parts.append(_picture(partial(plot_validation, results["validations"]), "predicted and measured"))
        elif results["kind"] == "kernels" and any(m["provider"] != "rooflight" for m in results["measurements"]):
            parts.append(_picture(partial(plot_kernels, results["measurements"]), "kernels and their peers"))
            if rate_series(results["measurements"]):
                parts.append(_picture(partial(plot_rates, results["measurements"]), "rates by length"))
    parts += ["<h2>Where the FLOPs go</h2>", "<p>In closed form; nothing here is measured.</p>"]
    parts.append(_picture(partial(plot_shares, "gpt2-xl", PRESETS["gpt2-xl"]), "shares of the FLOPs"))
    head = f"<meta charset='utf-8'><title>rooflight: results</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    write_text(path, f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n")


def _components(validation: dict[str, Any]) -> str:
    """A step's components, their sum and the rest of the step, as Markdown."""
    step = validation["step_seconds"]

    def line(name: str, predicted: float | None, measured: float) -> list[str]:
        numbers = [f"{predicted * 1e3:,.3f}", f"{predicted / measured:.3f}"] if predicted is not None else ["", ""]
        return [name, numbers[0], f"{measured * 1e3:,.3f}", numbers[1], f"{measured / step:.1%}"]

    rows = [line(row["name"], row["predicted"], row["measured"]) for row in validation["components"]]
    total = sum(row["predicted"] for row in validation["components"])
    rows.append(line("residual: step - sum", None, validation["residual_seconds"]))
    rows.append(line("step", total, step))
    title = f"{validation['name']}, {validation['batch_size']} x {validation['context_length']}, {validation['dtype']}"
    columns = ["component", "predicted, ms", "measured, ms", "ratio", "share of step"]
    return f"{title}:\n\n" + markdown_table(columns, rows)


def _picture(draw: Callable[[Path], None], title: str) -> str:
    """A plot as an image that needs no other file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "plot.svg"
        draw(file)
        data = base64.b64encode(file.read_bytes()).decode()
    return f"<p><img alt='{escape(title)}' src='data:image/svg+xml;base64,{data}'></p>"


def to_html(markdown: str) -> str:
    """Paragraphs, tables, links and `code` of our own Markdown as HTML."""
    blocks = re.split(r"\n{2,}", markdown.strip())
    return "\n".join(_table(block) if block.startswith("|") else f"<p>{_text(block)}</p>" for block in blocks)


def _text(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def _table(block: str) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines())
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
