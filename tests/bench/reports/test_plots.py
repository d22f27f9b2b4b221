"""Figures and the page show the numbers they are given."""

import builtins
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rooflight.bench.reports import page, plots
from rooflight.model import PRESETS

MACHINE = {
    "device": "D",
    "threads": 2,
    "torch": "2",
    "triton": "3",
    "cuda": None,
    "commit": "abc",
    "date": "2026-01-02",
}


def validation(name: str = "tiny") -> dict:
    quantities = {"parameters": "", "matrix FLOPs": "GFLOP", "peak memory": "MiB", "step time": "ms"}
    rows = [
        {"quantity": q, "unit": unit, "predicted": 8.0, "measured": 10.0, "ratio": 0.8}
        for q, unit in quantities.items()
    ]
    components = [
        {"name": f"part {i} <{i}>", "predicted": 1e-3 * i, "measured": 2e-3 * i, "ratio": 0.5} for i in range(1, 12)
    ]
    return {
        "name": name, "batch_size": 8, "context_length": 256, "dtype": "bfloat16", "rows": rows,
        "components": components, "step_seconds": 0.2, "residual_seconds": 0.068,
    }  # fmt: skip


def kernel(provider: str, milliseconds: float) -> dict:
    return {
        "operation": "rms_norm", "mode": "forward", "shape": {"M": 2, "N": 4}, "dtype": "float32", "provider": provider,
        "device_milliseconds": milliseconds, "gigabytes_per_second": 1.0, "teraflops": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ffn", "logits", "scores"), [("gpt2-small", 0.398, 0.271, 0.133), ("gpt2-xl", 0.574, 0.047, 0.092)]
)
def test_shares_are_the_published_ones(name: str, ffn: float, logits: float, scores: float):
    share = plots.flop_shares(PRESETS[name])
    assert [round(share[part], 3) for part in ("FFN", "logits", "scores and weighted sum")] == [ffn, logits, scores]
    assert sum(share.values()) == pytest.approx(1)
    assert tuple(share) == plots.PARTS


def test_shares_of_a_longer_context():
    share = plots.flop_shares(replace(PRESETS["gpt2-xl"], context_length=16384))
    assert round(share["scores and weighted sum"], 3) == 0.618


def test_files_take_the_format_of_their_ending(tmp_path: Path):
    plots.plot_validation([validation(), validation("other")], tmp_path / "sub" / "v.png")
    assert (tmp_path / "sub" / "v.png").read_bytes().startswith(b"\x89PNG")
    plots.plot_shares("tiny", PRESETS["tiny"], tmp_path / "s.svg")
    assert "<svg" in (tmp_path / "s.svg").read_text()
    with pytest.raises(ValueError, match=r"Format 'doc' is not supported"):
        plots.plot_kernels([kernel("rooflight", 1.0), kernel("torch", 2.0)], tmp_path / "k.doc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.svg", "sub"]


def test_nothing_to_draw_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="validations: expected at least one"):
        plots.plot_validation([], tmp_path / "v.svg")
    with pytest.raises(ValueError, match="measurements: expected some of a peer"):
        plots.plot_kernels([kernel("rooflight", 1.0)], tmp_path / "k.svg")


def attention(provider: str, T: int, rate: float, **changes) -> dict:
    shape = {"B": 1, "H": 2, "K": 2, "T": T, "D": 128, "causal": True} | changes
    return {
        "operation": "flash_attention", "mode": "forward", "shape": shape, "provider": provider, "teraflops": rate,
        "dtype": "bfloat16", "device_milliseconds": 1.0, "timed_by": "graph",
    }  # fmt: skip


def test_rates_stand_against_lengths(tmp_path: Path):
    measured = [attention("rooflight", 8192, 2.0), attention("rooflight", 4096, 1.0), attention("peer", 4096, 1.5)]
    others = [
        attention("rooflight", 4096, 9.0, window=64),
        attention("rooflight", 8192, 9.0, K=1),
        attention("rooflight", 4096, 3.0, D=64),  # at one length alone
        kernel("rooflight", 1.5),
    ]
    title = ("attention forward, causal, head size 128", "TFLOP/s by sequence length")
    assert plots.rate_series(measured + others) == {title: {"rooflight": {4096: 1.0, 8192: 2.0}, "peer": {4096: 1.5}}}
    plots.plot_rates(measured, tmp_path / "r.svg")
    assert "<svg" in (tmp_path / "r.svg").read_text()
    with pytest.raises(ValueError, match="expected an operation at two lengths"):
        plots.plot_rates(others, tmp_path / "r.svg")


def test_steps_are_bars(tmp_path: Path):
    row = {"name": "ours", "ours": True, "vocab_size": 64, "milliseconds": 404.0, "host_milliseconds": 300.0}
    plots.plot_steps({"title": "a step", "rows": [row, row | {"name": "theirs", "ours": False}]}, tmp_path / "s.svg")
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_the_page_shows_gpu_rates_once_from_all_files(tmp_path: Path):
    gpu = MACHINE | {"cuda": "13.0"}
    for name, T in (("a", 4096), ("b", 8192)):
        content = {"kind": "kernels", "machine": gpu, "measurements": [attention("rooflight", T, 2.0)]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page.write_page(tmp_path / "page.md", tmp_path)
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", (tmp_path / "page.md").read_text()) == [
        "page-rates.svg", "page-shares.svg",
    ]  # fmt: skip


def test_without_matplotlib_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real = builtins.__import__

    def refuse(name, *rest, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"plots need matplotlib \(.*\): pip install 'rooflight\[demo\]'"):
        plots.plot_shares("tiny", PRESETS["tiny"], tmp_path / "s.svg")


def test_the_page_holds_tables_and_plots_and_needs_nothing_else(tmp_path: Path):
    results = {
        "a": {"kind": "validation", "validations": [validation()]},
        "b": {"kind": "kernels", "measurements": [kernel("rooflight", 1.5), kernel("torch", 3.0)]},
    }
    for name, content in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": MACHINE, **content}))
    # a prediction is shown until its measurement stands beside it
    predicted = {"batch_size": 1, "context_length": 2, "dtype": "bfloat16", "seconds": 0.302, "memory_bytes": 2**30}
    content = {"kind": "prediction", "machine": MACHINE, "predictions": {"xl": predicted | {"tokens_per_second": 5e4}}}
    for name in ("a", "c"):
        (tmp_path / f"{name}.predicted.json").write_text(json.dumps(content))

    page.write_page(tmp_path / "page.html", tmp_path)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<img ") == text.count("src='data:image/svg+xml;base64,") == 3
    assert not re.search(r"(src|href)=['\"]?http", text)
    assert text.count("Predicted, not measured") == 1
    for cell in ("302.0 ms", "50,000", "1.0 GiB", "part 1 &lt;1&gt;", "0.800", "residual: step - sum", "68.000"):
        assert f"<td>{cell}</td>" in text, cell
    assert text.count("<table>") == text.count("</table>") == 4
    assert "<h1>rooflight, predicted and measured</h1>" in text
    assert "<h2>a</h2>" in text


def test_the_committed_page_shows_the_committed_results(tmp_path: Path):
    page.write_page(tmp_path / "results.md")
    committed = Path(__file__).parents[3] / "docs" / "results.md"
    again = "run `rooflight bench report --page docs/results.md --page docs/results.html`"
    assert committed.read_text() == (tmp_path / "results.md").read_text(), again


def test_the_page_in_markdown_has_its_plots_beside_it(tmp_path: Path):
    folder = tmp_path / "results"
    folder.mkdir()
    content = {"machine": MACHINE, "kind": "validation", "validations": [validation()]}
    (folder / "a.json").write_text(json.dumps(content))
    page.write_page(tmp_path / "page.md", folder)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# rooflight, predicted and measured\n\n## a\n\n| one training step |")
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert pictures == ["page-a.svg", "page-shares.svg"]
    before = {name: (tmp_path / name).read_text() for name in pictures}
    assert all("<svg" in picture for picture in before.values())
    page.write_page(tmp_path / "page.md", folder)
    assert {name: (tmp_path / name).read_text() for name in pictures} == before
