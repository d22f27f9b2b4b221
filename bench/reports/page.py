"""Everything in bench/results/ as one page, Markdown or HTML: the README's tables, each component, and the plots."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ...model import PRESETS
from ...training.files import write_text
from .kernel_tables import newest, records
from .plots import plot_kernels, plot_rates, plot_shares, plot_steps, plot_validation, rate_series
from .report import RESULTS, markdown_table, read_results, section

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Picture:
    """A plot between the page's paragraphs."""

    name: str
    title: str
    draw: Callable[[Path], None]


def write_page(path: Path, folder: Path = RESULTS) -> None:
    """Write the page, whole or not at all: Markdown with its plots beside it where `path` ends in .md, else one HTML
    file. Raises ValueError on a results file that nothing renders.
    """
    blocks = list(_blocks(folder))
    if path.suffix == ".md":
        write_text(path, "\n\n".join(_link(block, path) for block in blocks) + "\n")
        return
    head = f"<meta charset='utf-8'><title>rooflight: results</title><style>{STYLE}</style>"
    body = "\n".join(_embed(block) if isinstance(block, Picture) else to_html(block) for block in blocks)
    write_text(path, f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n")


def _blocks(folder: Path) -> Iterator[str | Picture]:
    yield "# rooflight, predicted and measured"
    found = read_results(folder)
    measured = newest([results for results in found.values() if results["kind"] == "kernels"])
    if rate_series(measured):
        yield "## Rates on a GPU"
        yield "Of device time, bf16, as measured last; the files that they come from follow below."
        yield Picture("rates", "rates by length and row size", partial(plot_rates, measured))
    for name, results in found.items():
        yield f"## {name}"
        yield section(results)
        if results["kind"] == "validation":
            yield from map(_components, results["validations"])
            yield Picture(name, "predicted and measured", partial(plot_validation, results["validations"]))
        elif results["kind"] == "steps":
            yield Picture(name, "training steps", partial(plot_steps, results))
        elif results["kind"] == "kernels" and {m["provider"] for m in results["measurements"]} > {"rooflight"}:
            yield Picture(name, "kernels and their peers", partial(plot_kernels, records(results["measurements"])))
    yield "## Where the FLOPs go"
    yield "In closed form; nothing here is measured."
    yield Picture("shares", "shares of the FLOPs", partial(plot_shares, "gpt2-xl", PRESETS["gpt2-xl"]))


def _link(block: str | Picture, page: Path) -> str:
    if isinstance(block, str):
        return block
    file = page.with_name(f"{page.stem}-{block.name}.svg")
    block.draw(file)
    return f"![{block.title}]({file.name})"


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


def _embed(picture: Picture) -> str:
    """A plot as an image that needs no other file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "plot.svg"
        picture.draw(file)
        data = base64.b64encode(file.read_bytes()).decode()
    return f"<p><img alt='{escape(picture.title)}' src='data:image/svg+xml;base64,{data}'></p>"


def to_html(markdown: str) -> str:
    """Headings, paragraphs, tables, links and `code` of our own Markdown as HTML."""
    return "\n".join(map(_block, re.split(r"\n{2,}", markdown.strip())))


def _block(block: str) -> str:
    if block.startswith("|"):
        return _table(block)
    marks = re.match("#*", block)[0]  # type: ignore[index]
    tag = f"h{len(marks)}" if marks else "p"
    return f"<{tag}>{_text(block[len(marks) :].strip())}</{tag}>"


def _text(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def _table(block: str) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines())
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
