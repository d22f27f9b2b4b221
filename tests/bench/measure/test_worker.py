"""Cases in processes of their own: one that hangs or dies costs itself alone, and time runs out in good order."""

import dataclasses
import json
import sys
import time

import pytest
import torch

from rooflight.bench.cases import kernels as kernel_cases
from rooflight.bench.cases.attention import attention_case
from rooflight.bench.cases.case import HOPPER, OURS, PORTABLE
from rooflight.bench.cases.kernels import cases, probes
from rooflight.bench.measure import worker

# A worker of three cases with two providers each. It hangs, dies or loses its device where it is told to (a case and a
# provider; "after" a case, between two; "last", at its very end), and says what no JSON reader understands.
SCRIPT = """
import json, os, sys, time
skipped = json.loads(sys.argv[1])
print("a library's banner", flush=True)

def at_place(*place):
    if place == HANGS:
        time.sleep(60)
    if place == LOSES:
        print(json.dumps({"lost": "AcceleratorError: illegal"}), flush=True)
    if place == LOSES or DIES and place[:len(DIES)] == DIES:
        os._exit(11)

for case in ("first", "second", "third"):
    if [case, ""] in skipped:
        continue
    print(json.dumps({"begun": case, "kind": [64, case == "second", False]}), flush=True)
    for provider in ("ours", "peer"):
        if [case, provider] in skipped:
            continue
        print(json.dumps({"at": [case, provider]}), flush=True)
        at_place(case, provider)
        print(json.dumps({"measurement": [case, provider]}), flush=True)
    print(json.dumps({"at": [case, ""]}), flush=True)
    at_place(case, "")
    print(json.dumps({"done": case}), flush=True)
    at_place("after", case)
print(json.dumps({"finished": "cases"}), flush=True)
at_place("last")
"""
EVERYTHING = [(case, provider) for case in ("first", "second", "third") for provider in ("ours", "peer")]


def run(hangs=None, dies=None, loses=None, step=3.0, seconds=60.0, hear=lambda line: None):
    script = SCRIPT.replace("HANGS", repr(hangs)).replace("DIES", repr(dies)).replace("LOSES", repr(loses))
    return worker.run(
        lambda skipped: [sys.executable, "-c", script, json.dumps(skipped)],
        step=step,
        deadline=time.monotonic() + seconds,
        hear=hear,
    )


def measured(heard):
    return [tuple(line["measurement"]) for line in heard if "measurement" in line]


def failures(heard):
    return [tuple(line["failure"].values()) for line in heard if "failure" in line]


def test_everything_is_heard_in_order():
    told = []
    heard = run(hear=told.append)
    assert measured(heard) == EVERYTHING
    assert [line["done"] for line in heard if "done" in line] == ["first", "second", "third"]
    assert {"at": ["second", "peer"]} in told


def test_a_hang_costs_its_provider_alone():
    heard = run(hangs=("second", "ours"))
    assert failures(heard) == [("second", "ours", "no end within 3 s")]
    assert measured(heard) == [pair for pair in EVERYTHING if pair != ("second", "ours")]
    assert worker.right_kinds(heard, "ours") == {(64, False, False)}
    assert worker.right_kinds(heard, "peer") == {(64, False, False), (64, True, False)}


def test_a_crash_costs_its_provider_alone():
    heard = run(dies=("first", "peer"))
    assert failures(heard) == [("first", "peer", "its process ended with status 11")]
    assert measured(heard) == [pair for pair in EVERYTHING if pair != ("first", "peer")]  # and none twice


def test_a_lost_device_is_the_failure_of_who_had_it():
    heard = run(loses=("second", "ours"))
    assert failures(heard) == [("second", "ours", "AcceleratorError: illegal")]
    assert set(measured(heard)) == set(EVERYTHING) - {("second", "ours")}
    assert worker.right_kinds(heard, "ours") == {(64, False, False)}


@pytest.mark.parametrize("place", [("second", ""), ("after", "second")], ids=str)
def test_a_death_between_two_cases_costs_no_other(place):
    """While it cleans up behind a case, or with nothing at hand at all."""
    heard = run(dies=place)
    assert failures(heard) == [("second", "", "its process ended with status 11")]
    assert measured(heard) == EVERYTHING
    assert worker.right_kinds(heard, "ours") == {(64, False, False)}


def test_a_death_after_every_case_costs_none():
    """Each process did something, so each has a successor."""
    heard = run(dies=("after",))
    assert [case for case, _, _ in failures(heard)] == ["first", "second", "third"]
    assert measured(heard) == EVERYTHING


def test_a_death_after_the_last_word_is_none():
    heard = run(dies=("last",))
    assert (failures(heard), measured(heard)) == ([], EVERYTHING)


def test_a_worker_that_never_begins_is_given_up():
    start = [sys.executable, "-c", "import sys; sys.exit(3)"]
    heard = worker.run(lambda skipped: start, step=5, deadline=time.monotonic() + 60)
    assert failures(heard) == [("", "", "its process ended with status 3")] * worker.BARREN


def test_a_worker_that_begins_at_its_second_try_goes_on(tmp_path):
    """A driver that is busy with the last process' remains, say."""
    flag = tmp_path / "tried"
    first = f"import os, sys\nif not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w'); sys.exit(3)\n"
    script = first + SCRIPT.replace("HANGS", "0").replace("DIES", "0").replace("LOSES", "0")
    heard = worker.run(
        lambda skipped: [sys.executable, "-c", script, json.dumps(skipped)], step=5, deadline=time.monotonic() + 60
    )
    assert measured(heard) == EVERYTHING


@pytest.fixture
def a_gpu(monkeypatch):
    """a_gpu(default path, lines of the checks) runs `kernels` as if on one: (failures, providers skipped)."""

    def pretend(default, checks):
        case = attention_case(1, 2, 2, 64, 32, True, torch.float32, torch.device("cpu"))
        ours = case.providers[OURS]
        other = HOPPER if default == "portable" else PORTABLE
        case = dataclasses.replace(
            case,
            providers={OURS: ours, other: ours, "torch": ours},
            defaults={"forward": default, "backward": default},
        )
        skipped = []
        monkeypatch.setattr(kernel_cases, "cases", lambda device: [case])
        monkeypatch.setattr(worker, "run_shares", lambda start_with, n_worker, **options: list(checks))
        monkeypatch.setattr(worker, "run", lambda start_with, **options: skipped.extend(options["skipped"]) or [])
        heard = worker.kernels("cuda", 10.0, lambda line: None)
        return [(line["failure"]["provider"], line["failure"]["error"]) for line in heard if "failure" in line], [
            provider for name, provider in skipped if name == case.name
        ]

    return pretend


KIND = [32, False, False]
PROBED = [{"begun": "probe", "kind": KIND}, {"done": "probe"}]
WRONG = {"failure": {"case": "probe", "provider": HOPPER, "error": "wrong"}}


@pytest.mark.parametrize(("default", "hoppers"), [("portable", [HOPPER]), ("hopper", [OURS])])
def test_the_hopper_path_is_timed_where_its_probes_were_right(default, hoppers, a_gpu):
    assert a_gpu(default, PROBED) == ([], [])
    for checks in ([], [PROBED[0], WRONG, PROBED[1]], PROBED[:1]):
        failures, skipped = a_gpu(default, checks)
        assert skipped == hoppers
        assert [provider for provider, _ in failures if provider in hoppers][-1:] == hoppers


def test_what_died_in_its_check_is_not_timed(a_gpu):
    case = attention_case(1, 2, 2, 64, 32, True, torch.float32, torch.device("cpu")).name
    died = {"failure": {"case": case, "provider": "torch", "error": "its process ended with status 3"}, "died": True}
    assert a_gpu("portable", [*PROBED, died]) == ([("torch", "its process ended with status 3")], ["torch"])


def test_shares_run_at_once_and_are_all_heard():
    script = """
import json, sys, time
print(json.dumps({"begun": sys.argv[1]}), flush=True)
time.sleep(1)
print(json.dumps({"done": sys.argv[1]}), flush=True)
"""
    told, begun = [], time.monotonic()
    heard = worker.run_shares(
        lambda skipped, share: [sys.executable, "-S", "-c", script, share],
        4,
        step=30,
        deadline=time.monotonic() + 60,
        hear=told.append,
    )
    assert time.monotonic() - begun < 3.5
    assert [line["done"] for line in heard if "done" in line] == ["0/4", "1/4", "2/4", "3/4"]
    assert sorted(line["done"] for line in told if "done" in line) == ["0/4", "1/4", "2/4", "3/4"]


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
    skipped = [[case.name, ""] for case in every[:2] + every[3:]]
    skipped += [[every[2].name, "eager"], [worker.CEILINGS, ""]]
    heard = worker.run(worker.command("cpu", "cases"), step=100, deadline=time.monotonic() + 200, skipped=skipped)
    assert [line["done"] for line in heard if "done" in line] == [every[2].name]
    found = [line["measurement"] for line in heard if "measurement" in line]
    assert {(m["provider"], m["mode"]) for m in found} == {
        (provider, mode) for provider in ("rooflight", "torch") for mode in ("forward", "backward")
    }
    assert not any("failure" in line for line in heard)


def test_a_check_fills_the_caches_and_says_results_of_probes_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    small, case = probes(cpu)[0], cases(cpu)[2]
    skipped = [[one.name, ""] for one in probes(cpu)[1:] + cases(cpu) if one.name != case.name]
    heard = worker.run_shares(
        worker.command("cpu", "checks"), 1, step=100, deadline=time.monotonic() + 200, skipped=skipped
    )
    assert heard == [
        {"begun": small.name, "kind": [128, False, False]},
        {"done": small.name},
        {"begun": case.name},
        {"done": case.name},
        {"finished": "checks"},
    ]
