"""Cases in processes of their own: one that hangs or dies costs itself alone, and time runs out in good order."""

import json
import sys
import time

import torch

from rooflight.bench.cases.kernels import cases
from rooflight.bench.measure import worker

# A worker of three cases with two providers each; "hangs" and "dies" do, and it says what no JSON reader understands.
SCRIPT = """
import json, os, sys, time
skipped = json.loads(sys.argv[1])
print("a library's banner", flush=True)
for case in ("first", "second", "third"):
    if [case, ""] in skipped:
        continue
    print(json.dumps({"at": [case, ""]}), flush=True)
    for provider in ("ours", "peer"):
        if [case, provider] in skipped:
            continue
        print(json.dumps({"at": [case, provider]}), flush=True)
        if (case, provider) == HANGS:
            time.sleep(60)
        if (case, provider) == DIES:
            os._exit(11)
        print(json.dumps({"measurement": [case, provider]}), flush=True)
    print(json.dumps({"done": case, "kind": [64, case == "second", False]}), flush=True)
"""


def run(hangs=None, dies=None, step=3.0, seconds=60.0, hear=lambda line: None):
    script = SCRIPT.replace("HANGS", repr(hangs)).replace("DIES", repr(dies))
    return worker.run(
        lambda skipped: [sys.executable, "-c", script, json.dumps(skipped)],
        step=step,
        deadline=time.monotonic() + seconds,
        hear=hear,
    )


def measured(heard):
    return [tuple(line["measurement"]) for line in heard if "measurement" in line]


def test_everything_is_heard_in_order():
    told = []
    heard = run(hear=told.append)
    assert measured(heard) == [(case, p) for case in ("first", "second", "third") for p in ("ours", "peer")]
    assert [line["done"] for line in heard if "done" in line] == ["first", "second", "third"]
    assert {"at": ["second", "peer"]} in told


def test_a_hang_costs_its_provider_alone():
    heard = run(hangs=("second", "ours"))
    assert {"failure": {"case": "second", "provider": "ours", "error": "no end within 3 s"}} in heard
    assert measured(heard) == [
        ("first", "ours"),
        ("first", "peer"),
        ("second", "peer"),
        ("third", "ours"),
        ("third", "peer"),
    ]
    assert worker.right_kinds(heard, "ours") == {(64, False, False)}
    assert worker.right_kinds(heard, "peer") == {(64, False, False), (64, True, False)}


def test_a_crash_costs_its_provider_alone():
    heard = run(dies=("first", "peer"))
    assert {"failure": {"case": "first", "provider": "peer", "error": "its process ended with status 11"}} in heard
    assert {("second", "ours"), ("third", "peer")} <= set(measured(heard))


def test_a_worker_that_never_begins_is_not_tried_again():
    start = [sys.executable, "-c", "import sys; sys.exit(3)"]
    heard = worker.run(lambda skipped: start, step=5, deadline=time.monotonic() + 60)
    assert heard == [{"failure": {"case": "", "provider": "", "error": "its process ended with status 3"}}]


def test_the_deadline_ends_it():
    begun = time.monotonic()
    heard = run(hangs=("second", "ours"), step=60.0, seconds=2.0)
    assert time.monotonic() - begun < 20
    assert not any("failure" in line for line in heard)
    assert measured(heard)[:1] == [("first", "ours")]


def test_a_real_worker_on_a_cpu(monkeypatch):
    """The worker itself, with all cases but one left out."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    every = cases(torch.device("cpu"))
    skipped = [[case.name, ""] for case in every[:2] + every[3:]] + [[every[2].name, "eager"]]
    heard = worker.run(worker.command("cpu", "cases"), step=100, deadline=time.monotonic() + 200, skipped=skipped)
    assert [line["done"] for line in heard if "done" in line] == [every[2].name]
    found = [line["measurement"] for line in heard if "measurement" in line]
    assert {(m["provider"], m["mode"]) for m in found} == {
        (provider, mode) for provider in ("rooflight", "torch") for mode in ("forward", "backward")
    }
    assert not any("failure" in line for line in heard)
