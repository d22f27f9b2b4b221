"""Every number and every name of every table is whole at 80 columns, at 40, and in a pipe."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from rooflight.bench import tune
from rooflight.bench.cases import tokenizer
from rooflight.bench.cli import app
from rooflight.bench.predict import side_by_side, validate
from rooflight.bench.rates import ceilings
from rooflight.bench.reports import kernel_tables, terminal
from rooflight.kernels.attention.portable.tiles import Tile
from rooflight.model import PRESETS, estimate
from rooflight.model.ceilings import Ceilings

RATES = Ceilings(
    {"bfloat16": 8e14}, 4e12, 1e13, {"linear_cross_entropy backward bfloat16": {(16384, 4096, 131072): 6.5e14}},
    device="NVIDIA H200", date="2026-11-27", memory_bytes=141 * 10**9,
)  # fmt: skip
HOW = "allocated by torch, one eager step, as its caching allocator counts it, from the first to the last operation"


def kernels() -> Table:
    measured = [
        {
            "operation": operation, "mode": mode, "shape": shape, "dtype": "bfloat16", "provider": provider,
            "milliseconds": 1234.567, "milliseconds_p20": 1200.001, "milliseconds_p80": 1300.002,
            "gigabytes_per_second": 4296.1, "teraflops": 791.123, "peak_mib": 12345.0,
        }
        for operation, shape in (
            ("flash_attention", {"B": 2, "H": 64, "K": 8, "T": 16384, "S": 16384, "D": 128, "causal": True}),
            ("rms_norm", {"M": 131072, "N": 128}),
        )
        for mode in ("forward", "backward")
        for provider in ("rooflight", "rooflight hopper, dynamic", "torch.compile")
    ]  # fmt: skip
    return kernel_tables.table(measured, {"gemm_teraflops": 791.0, "copy_gigabytes_per_second": 4296.0})


def validation() -> list[Table]:
    e = estimate(PRESETS["gpt2-xl"], batch_size=16, ceilings=RATES)
    quantities = ("parameters", ""), ("step time, compiled", "ms"), ("throughput, compiled", "k tokens/s")
    rows = tuple(validate.Row(name, unit, 1234567.89, 7654321.01, HOW) for name, unit in quantities)
    components = tuple(validate.ComponentRow(c.name, 1.25, 1.5) for c in e.components)
    return validate.Validation("a model with a name", e, rows, components, 20.0, ("a note",), 0.3).tables()


def steps() -> Table:
    step = side_by_side.StepTime("plain, compiled", False, 50304, 1334.5, 1333.25, 1400.75, 48912.3, 1221.5, 73 << 30,
                                 141.5, 0.412, 0.451, 11.1, 9.2)  # fmt: skip
    return side_by_side.steps_table("gpt2-xl, 16 x 1,024, bfloat16, AdamW; MFU of 791.0 TFLOP/s, measured", [step] * 3)


def compared() -> Table:
    rows = [
        tokenizer.Row("train", "rooflight", 1234.567, 2345.678, 9_876_000_000, ""),
        tokenizer.Row("train", "sentencepiece", 0.0, 0.0, 0, "ModuleNotFoundError: No module named 'sentencepiece'"),
        tokenizer.Row("encode short", "tokenizers", 12.5, 13.5, 1_000_000, ""),
        tokenizer.Row("encode short", "rooflight", 12.5, 13.5, 1_000_000, ""),
    ]
    return tokenizer.table(rows, "TinyStoriesV2-GPT4-train.txt, 2,226.8 MB, 10,000 tokens, 2 processes")


def trials() -> Table:
    tile = Tile(128, 256, 16, 4)
    why = "does not fit: out of resource: shared memory, Required: 295936, Hardware limit: 232448"
    return tune.trials_table([tune.Trial("dkdv", "bfloat16", 128, tile, None, why)] * 2)


TABLES = {
    "kernels": lambda: [kernels()],
    "failures": lambda: [kernel_tables.failures_table([{"case": "c" * 50, "provider": "p" * 30, "error": HOW}])],
    "estimate": lambda: [estimate(PRESETS["gpt2-xl"], batch_size=16, ceilings=RATES).table()],
    "estimate, no ceilings": lambda: [estimate(PRESETS["llama-8b"], batch_size=16, gpus=8).table()],
    "estimate, link": lambda: [estimate(PRESETS["gpt2-xl"], batch_size=16, ceilings=RATES, gpus=8, link=5e10).table()],
    "validate": validation,
    "steps": lambda: [steps()],
    "tokenizer bench": lambda: [compared()],
    "ceilings": lambda: [ceilings.ceilings_table(RATES)],
    "tune": lambda: [trials()],
    "paths": lambda: [kernel_tables.paths_table("sm_90", None)],
}


def told(tables: list[Table], width: int | None) -> list[str]:
    return [line for table in tables for line, _ in terminal.lines(table, width)]


@pytest.mark.parametrize("width", [80, 60, None])
@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_whole_and_beside_its_name(name: str, width: int | None):
    tables = TABLES[name]()
    for table in tables:
        lines = told([table], width)
        text = " ".join(" ".join(lines).split())
        assert "…" not in text
        longest = max(len(word) for line in lines for word in line.split())
        assert width is None or all(len(line) <= max(width, longest + len(terminal.GAP)) for line in lines)
        heads = [str(column.header) for column in table.columns]
        cells = [[str(cell) for cell in column.cells] for column in table.columns]
        by_name = not any(line.startswith(f"{heads[0]}{terminal.GAP}") for line in lines)
        for head, column in zip(heads, table.columns, strict=True):
            assert head in text or (by_name and column.justify != "right")  # names speak for themselves
        for row in zip(*cells, strict=True):
            key = row[1] if by_name else row[0]
            for cell in filter(None, row):
                whole = [line for line in lines if cell in line and (key in line or cell == row[0])]
                prose = f"{key}: {cell}" in text or (cell == row[0] and cell in text)
                assert whole or prose, cell
        for line in str(table.caption or "").split("\n"):
            assert line in text


@pytest.mark.parametrize("name", TABLES)
def test_a_pipe_gets_one_row_a_line(name: str):
    for table in TABLES[name]():
        lines = told([table], None)
        filled = [row for row in zip(*(column.cells for column in table.columns), strict=True) if any(row)]
        below = bool(table.title) + 1 + len(str(table.caption or "").split("\n")) * bool(table.caption)
        assert len([line for line in lines if line]) == len(filled) + below


def test_what_fits_is_not_taken_apart():
    table = Table("name", "number")
    table.add_row("a", "1")
    assert told([table], 80) == ["", "name  number", "a     1"]


@pytest.mark.parametrize(
    ("columns", "terminal_there", "width"), [("80", False, 80), (None, False, None), ("66", True, 66)]
)
def test_the_width_is_the_terminals_or_the_one_asked_for(monkeypatch, columns, terminal_there, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal.width_of(Console(file=io.StringIO(), force_terminal=terminal_there)) == width


def test_text_is_broken_after_a_comma_and_words_never():
    assert terminal.fold("peak 25.9 GB, at loss: parameters 6.22 GB", 24) == [
        "peak 25.9 GB, at loss:",
        "parameters 6.22 GB",
    ]
    assert terminal.fold("a" * 30, 24) == ["a" * 30]
    assert terminal.fold("one two three four five six seven", 12) == ["one two", "three four", "five six", "seven"]


@pytest.mark.parametrize("columns", ["80", "200", None])
def test_the_estimate_says_how_to_measure_what_times_need(columns, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {"COLUMNS": columns} if columns else {}
    monkeypatch.delenv("COLUMNS", raising=False)
    output = CliRunner(env=environment).invoke(app, ["estimate", "gpt2-xl"], catch_exceptions=False).output
    assert "`rooflight bench ceilings --dtype bfloat16` measures them" in output
    assert "scores and weighted sum" in output
    assert re.search(r"^FFN +983 +2,013 ", output, re.MULTILINE)
    assert (max(map(len, output.splitlines())) <= 80) == (columns == "80")
