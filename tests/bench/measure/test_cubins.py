"""Another compiler's machine code: what is built is whole, the launches that get it are the right ones, and what is
wrong, or ends a process, is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rooflight.bench.measure.cubins import compare, plain, rows

pytestmark = pytest.mark.cpu
CHILD = Path(__file__).parents[2] / "support" / "cubins.py"
CASE = "rms_norm 1600"
KERNELS = ["rms_norm_fwd", "rms_norm_bwd", "rms_norm_dw"]


def run(*command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cubins")
    done = run("-P", "-m", "rooflight.bench.measure.cubins", "build", directory, CASE)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def child(directory, mode):
    done = run(CHILD, directory, CASE, mode)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    return [tuple(json.loads(line)) for line in lines if line.startswith("[")], json.loads(last)


@pytest.mark.slow
def test_each_kernel_gets_the_other_code_alone_and_then_all_do(built):
    index = json.loads((built / "index.json").read_text(encoding="utf-8"))
    assert [entry["name"].strip("_").removesuffix("_kernel") for entry in index["kernels"]] == KERNELS
    assert all((built / entry["file"]).read_bytes()[:4] == b"\x7fELF" for entry in index["kernels"])
    said, found = child(built, "right")
    assert [label for label, _ in said if label != "begin"] == [*KERNELS, "all, by handle"]
    assert {verdict for label, verdict in said if label != "begin"} == {"bitwise the same"}
    # the code made here; each alone; all, twice
    assert found["events"] == [[], [0], [1], [2], [0, 1, 2], [0, 1, 2]]
    said, _ = child(built, "wrong")
    verdicts = dict(said)
    assert verdicts["rms_norm_fwd"].startswith("wrong: out0 off by 1.0")
    assert verdicts["rms_norm_bwd"] == "bitwise the same"
    assert verdicts["all, by handle"].startswith("wrong")


@pytest.mark.slow
def test_what_is_not_among_the_cubins_is_told(built, tmp_path):
    index = json.loads((built / "index.json").read_text(encoding="utf-8"))
    index["kernels"][0]["parameters"].append(".param .u64")
    del index["kernels"][1]
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    for entry in index["kernels"]:
        (tmp_path / entry["file"]).write_bytes((built / entry["file"]).read_bytes())
    said, found = child(tmp_path, "right")
    assert found["loaded"] == ["_rms_norm_dw_kernel"]
    verdicts = dict(said)
    assert verdicts["rms_norm_fwd"].startswith("not run: other parameters")
    assert verdicts["rms_norm_bwd"] == "not run: not among the cubins"


def test_a_verdict():
    base = {"out": torch.tensor([1.0, 1.01])}
    wanted = {"out": torch.tensor([1.0, 1.0])}
    assert compare(base, base, wanted) == "bitwise the same"
    assert compare({"out": torch.tensor([1.0, 1.005])}, base, wanted).startswith("the same to rounding")
    for value in (1.02, torch.nan, torch.inf):
        assert compare({"out": torch.tensor([1.0, value])}, base, wanted).startswith("wrong: out")


def test_constants_are_written_alike_in_every_triton():
    assert plain((1.0, True, [2.5, None])) == "(1, True, (2.5, None))"


ENDING = """
import json, os, sys
for name in ("fwd", "bwd", "dq"):
    if name in json.loads(sys.argv[1]):
        continue
    print(json.dumps(["begin", name]), flush=True)
    if name == "bwd":
        print("an illegal instruction", flush=True)
        os._exit(3)
    print(12, json.dumps([name, "bitwise the same"]), sep="\\n", flush=True)
"""


def test_a_kernel_that_ends_the_process_costs_its_row():
    def command(skipped):
        return [sys.executable, "-c", ENDING, json.dumps(skipped)]

    assert list(rows("case", command, time.monotonic() + 60)) == [
        ("fwd", "bitwise the same"),
        ("bwd", "ended 3: an illegal instruction"),
        ("dq", "bitwise the same"),
    ]


def test_no_time_left():
    def command(skipped):
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    ((label, verdict),) = rows("case", command, time.monotonic() + 0.5)
    assert label == "the case"
    assert verdict.endswith("no time left")
