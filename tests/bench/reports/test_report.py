"""The README's tables are those of bench/results/, and nothing else."""

import json
from pathlib import Path

import pytest

from rooflight.bench.reports import report

ROOT = Path(__file__).parents[3]
MACHINE = {
    "device": "Device",
    "threads": 2,
    "torch": "2",
    "triton": "3",
    "cuda": None,
    "commit": "abc",
    "date": "2026-01-02",
}


def measurement(provider: str, milliseconds: float, **changes) -> dict:
    return {
        "operation": "rms_norm",
        "mode": "forward",
        "shape": {"M": 2, "N": 4},
        "dtype": "float32",
        "provider": provider,
        "milliseconds": milliseconds,
        "gigabytes_per_second": 1234.4,
        "teraflops": 0.5,
        **changes,
    }


def write(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps({"machine": MACHINE, **content}))


def test_the_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    shown = text.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert shown == report.render().strip(), "run `rooflight bench report`"


def test_kernels_stand_beside_their_peers(tmp_path: Path):
    records = [measurement("rooflight", 1.5), measurement("torch", 3.0), measurement("eager", 6.0)]
    write(tmp_path, "kernels.json", {"kind": "kernels", "measurements": records})
    text = report.render(tmp_path)
    assert "| rms_norm forward, M=2 N=4, float32 | 1.500 | 1,234 GB/s | torch 3.000, eager 6.000 |" in text
    assert "Measured on: Device, 2 threads, torch 2, triton 3, commit abc, 2026-01-02." in text


def test_attention_is_shown_by_its_flops(tmp_path: Path):
    record = measurement("rooflight", 1.5, operation="flash_attention", teraflops=512.25)
    write(tmp_path, "kernels.json", {"kind": "kernels", "measurements": [record]})
    assert "512.2 TFLOP/s" in report.render(tmp_path)


def test_ratios_are_ours_over_the_peers(tmp_path: Path):
    rows = [
        {"task": "train", "peer": "other", "seconds": 2.0, "peer_seconds": 8.0},
        {"task": "train", "peer": "third", "seconds": 2.0, "peer_seconds": 1.0},
        {"task": "decode", "peer": "third", "seconds": 0.5, "peer_seconds": 1.0},
    ]
    corpus = {"name": "prose", "bytes": 3e6, "encoded_bytes": 2e6, "vocab_size": 1000}
    write(tmp_path, "tokenizer.json", {"kind": "tokenizer", "rows": rows, "corpus": corpus})
    text = report.section(report.read_results(tmp_path)["tokenizer"])
    assert "| tokenizer | seconds | / other's | / third's |" in text
    assert "| train | 2.00 | 0.25 | 2.00 |" in text
    assert "| decode | 0.50 |  | 0.50 |" in text
    assert "prose, 3 MB, 1,000 tokens trained on it, 2 MB of it encoded" in text

    # the README's table has every text, and where all were measured once
    write(tmp_path, "another.json", {"kind": "tokenizer", "rows": rows[:1], "corpus": corpus | {"name": "code"}})
    text = report.render(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| text, vocabulary |  | train | decode |",
        "| --- | ---: | ---: | ---: |",
        "| code, 3 MB, 1,000 tokens | seconds | 2.00 |  |",
        "|  | / other's | 0.25 |  |",
        "| prose, 3 MB, 1,000 tokens | seconds | 2.00 | 0.50 |",
        "|  | / other's | 0.25 |  |",
        "|  | / third's | 2.00 | 0.50 |",
    ]
    assert text.count("Measured on: Device, 2 threads") == 1


def test_the_readme_keeps_what_stands_outside_the_markers(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    row = {"task": "train", "peer": "other", "seconds": 2.0, "peer_seconds": 8.0}
    write(tmp_path, "tokenizer.json", {"kind": "tokenizer", "rows": [row]})
    assert report.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert not report.update_readme(readme, tmp_path)


def test_bad_files_are_named(tmp_path: Path):
    write(tmp_path, "odd.json", {"kind": "weather"})
    with pytest.raises(ValueError, match=r"odd\.json.*got 'weather'"):
        report.render(tmp_path)
    (tmp_path / "README.md").write_text("no markers\n")
    with pytest.raises(ValueError, match="markers"):
        report.update_readme(tmp_path / "README.md", tmp_path)


def test_what_the_workers_said_becomes_a_results_file():
    first, again = measurement("peer", 3.0), measurement("peer", 2.0)
    failure = {"case": "rms_norm-M2-N4-float32", "provider": "other", "error": "no kernel"}
    heard = [
        {"ceilings": {"gemm_teraflops": 2.0, "copy_gigabytes_per_second": 2468.8}},
        {"measurement": first},
        {"measurement": measurement("peer", 5.0, mode="backward")},
        {"failure": failure},
        {"measurement": again},  # its case was begun anew
        {"measurement": measurement("rooflight", 1.0)},
        {"done": "rms_norm-M2-N4-float32", "kind": [None, False, False]},
    ]
    results = report.kernel_results(MACHINE, heard)
    assert [(m["mode"], m["provider"], m["milliseconds"]) for m in results["measurements"]] == [
        ("forward", "peer", 2.0),
        ("forward", "rooflight", 1.0),
        ("backward", "peer", 5.0),
    ]
    assert results["failures"] == [failure]
    assert report.of_roof(again, results["ceilings"]) == pytest.approx(0.5)  # a copy bounds a norm
    assert report.of_roof(again | {"operation": "flash_attention"}, results["ceilings"]) == 0.25
    assert report.of_roof(again, {}) is None
    assert report.failures_table([failure]).row_count == 1


def test_a_case_without_ours_is_left_out(tmp_path: Path):
    write(tmp_path, "kernels.json", {"kind": "kernels", "measurements": [measurement("peer", 3.0)]})
    assert "3.000" not in report.render(tmp_path)


def test_the_table_names_each_case_once():
    full = {"milliseconds_p20": 0.9, "milliseconds_p80": 1.1, "peak_mib": None, "host_microseconds": 9.5}
    table = report.table([measurement("rooflight", 1.0, **full), measurement("peer", 2.0, **full)], {})
    assert list(table.columns[0].cells) == ["rms_norm forward, M=2 N=4, float32", ""]
    assert list(table.columns[8].cells) == ["9.5", "9.5"]
