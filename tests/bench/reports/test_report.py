"""The README's tables are those of bench/results/, and nothing else."""

import json
from pathlib import Path

import pytest

from rooflight.bench.reports import kernel_tables, report

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


def test_kernels_stand_beside_their_peers_and_failures_are_listed(tmp_path: Path):
    timed = {"milliseconds_p20": 1.4, "milliseconds_p80": 1.6, "peak_mib": None}
    measured = [measurement("rooflight", 1.5, **timed), measurement("torch", 3.0, **timed)]
    failure = {"case": "rms_norm-M2-N4", "provider": "torch.compile", "error": "ran eager"}
    write(tmp_path, "kernels.json", {"kind": "kernels", "measurements": measured, "failures": [failure]})
    text = report.section(report.read_results(tmp_path)["kernels"])
    assert (
        "| rms_norm forward, M=2 N=4, float32 | rooflight | 1.500 | 1.400-1.600 | 1.500 |  | 1,234.4 | 0.500 |  |  |"
        in text
    )
    assert "|  | torch | 3.000 | 1.400-1.600 | 3.000 |" in text
    assert "| rms_norm-M2-N4 | torch.compile | ran eager |" in text
    assert "Measured on: Device, 2 threads, torch 2, triton 3, commit abc, 2026-01-02." in text


def test_a_row_of_an_older_file_is_marked_where_the_host_bounds_it(tmp_path: Path):
    timed = {"milliseconds_p20": 0.9, "milliseconds_p80": 1.1, "peak_mib": 4.0}
    old = {"host_microseconds": 990.0} | timed
    new = {
        "device_milliseconds": 0.25, "device_milliseconds_p20": 0.2, "device_milliseconds_p80": 0.3,
        "call_milliseconds": 1.0, "host_microseconds": 20.0, "host_bound": False, "peak_mib": 4.0,
    }  # fmt: skip
    write(tmp_path, "kernels.json", {"kind": "kernels", "measurements": [measurement("rooflight", 1.0, **old)]})
    assert "| 1.000* | 990.0 |" in report.section(report.read_results(tmp_path)["kernels"])
    write(tmp_path, "kernels.json", {"kind": "kernels", "measurements": [measurement("rooflight", 1.0, **new)]})
    assert "| 0.250 | 0.200-0.300 | 1.000 | 20.0 |" in report.section(report.read_results(tmp_path)["kernels"])


GPU = MACHINE | {"device": "GPU", "cuda": "13.0"}


def attention(provider: str, rate: float, T: int = 8192, **changes) -> dict:
    return {
        "operation": "flash_attention",
        "mode": "forward",
        "shape": {"B": 2, "H": 16, "K": 16, "T": T, "D": 128, "causal": True},
        "dtype": "bfloat16",
        "provider": provider,
        "device_milliseconds": 1.0,
        "teraflops": rate,
        "timed_by": "graph",
        **changes,
    }


def test_the_readme_has_a_row_for_each_shape_and_says_where_we_lose(tmp_path: Path):
    earlier = [attention("rooflight hopper", 600.0), attention("torch cuDNN", 700.0), attention("rooflight", 1.0)]
    later = [
        attention("rooflight", 668.0, path="hopper"),
        attention("rooflight portable", 449.0),
        attention("torch cuDNN", 613.0),
        attention("torch flash", 319.0),
        attention("rooflight", 100.0, 512, path="hopper"),
        attention("torch cuDNN", 200.0, 512),
        attention("torch cuDNN", 9.0, 1024),  # without ours
        attention("rooflight", 9.0, 2048, path="hopper", timed_by="events"),  # launches may show
        attention("torch cuDNN", 9.0, 2048, timed_by="events"),
    ]
    write(tmp_path, "a.json", {"kind": "kernels", "machine": GPU, "measurements": earlier})
    later_gpu = GPU | {"date": "2026-01-03"}
    write(tmp_path, "b.json", {"kind": "kernels", "machine": later_gpu, "measurements": later})
    text = report.render(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| 2 x 16 x 8,192 x 128, forward | 668 | 449 | 613 | 319 | 1.09 |",
        "| 2 x 16 x 512 x 128, forward | 100 |  | 200 |  | 0.50 |",
    ]
    assert "2026-01-03" in text
    assert "2026-01-02" not in text


def test_steps_stand_over_the_peers_of_the_same_vocabulary(tmp_path: Path):
    row = {
        "name": "ours", "ours": True, "vocab_size": 64, "milliseconds": 300.0, "tokens_per_second": 54600.0,
        "host_milliseconds": 10.0, "peak_bytes": 2**30,
    }  # fmt: skip
    peer = row | {"name": "theirs", "ours": False, "milliseconds": 330.0}
    rows = [row, peer, peer | {"vocab_size": 63, "milliseconds": 9.0}, row | {"vocab_size": 65}]
    write(tmp_path, "steps.json", {"kind": "steps", "title": "XL", "rows": rows})
    text = report.render(tmp_path)
    assert "| ours, vocabulary 64 | 300 | 54.6 k | 10 | 1.0 | 1.10 |" in text
    assert "| theirs, vocabulary 64 | 330 | 54.6 k | 10 | 1.0 |  |" in text
    assert "| ours, vocabulary 65 | 300 | 54.6 k | 10 | 1.0 |  |" in text


def test_predictions_that_missed_stay(tmp_path: Path):
    row = {"unit": "ms", "predicted_on": "2026-01-01", "measured_on": "2026-01-02"}
    rows = [
        row | {"what": "step", "low": 302.0, "high": 302.0, "measured": 404.0},
        row | {"what": "range", "low": 4.0, "high": 5.0, "measured": 4.5},
        row | {"what": "below", "low": 4.0, "high": None, "measured": 3.9},
    ]
    write(tmp_path, "p.json", {"kind": "predictions", "rows": rows})
    text = report.section(report.read_results(tmp_path)["p"])
    assert "| step | ms | 302 | 2026-01-01 | 404 | 2026-01-02 | 0.75 |" in text
    assert "| range | ms | 4 to 5 | 2026-01-01 | 4.5 | 2026-01-02 | held |" in text
    assert "| below | ms | >= 4 | 2026-01-01 | 3.9 | 2026-01-02 | missed |" in text


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
    results = kernel_tables.kernel_results(MACHINE, heard)
    assert [(m["mode"], m["provider"], m["milliseconds"]) for m in results["measurements"]] == [
        ("forward", "peer", 2.0),
        ("forward", "rooflight", 1.0),
        ("backward", "peer", 5.0),
    ]
    assert results["failures"] == [failure]
    assert kernel_tables.of_roof(again, results["ceilings"]) == pytest.approx(0.5)  # a copy bounds a norm
    assert kernel_tables.of_roof(again | {"operation": "flash_attention"}, results["ceilings"]) == 0.25
    assert kernel_tables.of_roof(again, {}) is None
    assert kernel_tables.failures_table([failure]).row_count == 1


def test_the_table_names_each_case_once():
    full = {"milliseconds_p20": 0.9, "milliseconds_p80": 1.1, "peak_mib": None, "host_microseconds": 9.5}
    table = kernel_tables.table([measurement("rooflight", 1.0, **full), measurement("peer", 2.0, **full)], {})
    assert list(table.columns[0].cells) == ["rms_norm forward, M=2 N=4, float32", ""]
    assert list(table.columns[5].cells) == ["9.5", "9.5"]
