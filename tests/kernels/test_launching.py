"""Launch handles: equal keys are one variant to Triton, and its C launcher gets what Triton itself would give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rooflight import kernels
from support.recorder import REFUSED

CASES = Path(__file__).parents[1] / "support" / "launches.py"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """By case: what it found, in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, CASES], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_equal_keys_are_one_variant_to_triton(results):
    n_ours, n_triton, n_broken = results["random_arguments"]
    assert n_broken == 0
    assert 1000 < n_triton <= n_ours < 10000  # keys met again, or nothing was compared


@pytest.mark.cpu  # the stand-in for the driver takes CPU tensors, whose descriptors are not kept
def test_the_c_launcher_gets_what_triton_gives_it(results):
    found = results["what_reaches_the_driver"]
    assert "ours" not in found, f"{found['ours']}\n{found['theirs']}"
    assert found["handled"] >= found["launched"] > 500  # the second time at the latest
    assert len(found["kernels"]) >= 14


@pytest.mark.cpu  # the stand-in for the driver is an sm_90
def test_a_known_call_whose_path_fails_takes_the_other(results):
    found = results["a_known_call_that_fails"]
    assert {"_flash_attention_fwd_hopper_kernel", "_flash_attention_bwd_hopper_kernel"} <= set(found["before"])
    portable = ["fwd", "delta", "bwd_dkdv", "bwd_dq"]
    assert found["after"] == [f"_flash_attention_{name}_kernel" for name in portable]
    assert found["failing"] == [*found["after"][:2], *found["after"][1:]]  # the hopper backward had begun
    assert [text.partition(" cannot")[0] for text in found["warned"]] == [
        "attention's hopper forward", "attention's hopper backward"
    ]  # fmt: skip
    assert found["again"] == found["before"]


@pytest.mark.cpu  # the stand-in for the driver is an sm_90
def test_new_kinds_of_calls_share_what_they_can(results):
    found = results["new_kinds"]
    portable = ["fwd", "delta", "bwd_dkdv", "bwd_dq"]
    assert found["unaligned"] == [f"_flash_attention_{name}_kernel" for name in portable]
    assert {"_flash_attention_fwd_hopper_kernel", "_flash_attention_bwd_hopper_kernel"} <= set(found["aligned"])
    assert found["known"] == ["KnownAttentionBackward"] * 2  # none went the long way
    assert found["codes"] == 0  # of launches written out, whatever the length
    assert found["descriptors"] < 6000  # of 12800 that were made


def test_triton_launches_where_it_does_more(results):
    found = results["who_is_told"]
    again = {name for name, by_triton in found.items() if not by_triton}
    assert again == {"again", "debug, again", "another device, again", "at last"}


def test_lengths_that_change_do_not_compile_anew(results):
    """300 tokens generated, and each function over 50 lengths: at most two variants a kernel."""
    assert len(results["variants"]) == 1 + len(results["what_a_capture_sees"])
    for name, counts in results["variants"].items():
        assert counts, name
        assert max(counts.values()) <= 2, (name, counts)


def test_what_a_graph_captures_neither_waits_nor_compiles(results):
    """Of every public function, a call after the first; utils: encodes a descriptor, on the host."""
    seen = results["what_a_capture_sees"]
    assert {name.split(",")[0].split(" of ")[0] for name in seen} >= {
        name for name in kernels.__all__ if callable(getattr(kernels, name)) and name.islower() and "tables" not in name
    } - {"alibi_slopes", "flash_attention", "flash_attention_varlen"} | {"attention", "packed attention", "adamw"}
    for name, found in seen.items():
        assert found["launches"] >= 2, name
        assert set(found["asked"]) <= {"get_current_device", "get_current_stream", "utils"}, name
        assert not set(found["ops"]) & {*REFUSED, "aten::_to_copy", "aten::is_pinned", "aten::record_stream"}, name


def test_a_known_launch_neither_allocates_nor_waits(results):
    found = results["a_known_launch"]
    assert found["ops"] == []
    assert found["asked"] == ["get_current_device", "get_current_stream"]
    assert found["alike"]  # a plan's arguments, and a launch's


def test_a_subclass_of_tensor_is_launched_too(results):
    assert results["subclasses"] == [True, True]  # by a plan, by itself


def test_descriptors_are_kept_by_what_they_say(results):
    assert all(results["descriptors"].values()), results["descriptors"]
