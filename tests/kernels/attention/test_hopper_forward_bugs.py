"""Bugs planted in the Hopper forward, each of which the emulator must catch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rooflight.kernels.attention.hopper import blocks as hopper_blocks
from rooflight.kernels.attention.hopper import forward as hopper_forward
from rooflight.kernels.attention.hopper import loads as hopper_loads
from rooflight.kernels.attention.hopper import schedule as hopper_schedule
from rooflight.kernels.attention.hopper.schedule import Schedule
from support.attention import draw, draw_packed
from support.gluon_emulator import DeadlockError, EmulationError, ProtocolError, RaceError, mutated
from support.hopper_forward import attend

pytestmark = pytest.mark.cpu

BF16, FP16 = torch.bfloat16, torch.float16


FENCE_OUT = (
    "    fence_async_shared()  # TMA reads it, or loads the next queries over it, through the asynchronous proxy\n"
)
RELEASE_K = "            mbarrier.arrive(shared.k_empty.index(s), count=1)\n"
RELEASE_V = "            mbarrier.arrive(shared.v_empty.index(s_v), count=1)\n"
WAIT_Z = "            z = warpgroup_mma_wait(1, [z])\n"
WAIT_O = "            o = warpgroup_mma_wait(0, [o])\n"
NEXT_K = "mbarrier.wait(shared.k_full.index(s_next), parity_next, pred=n + 1 < tile.n_block)"
PLACE = """\
    for n in gl.static_range(NUMBERS if problem.cu_seqlens_q is not None else DENSE_NUMBERS):
        write_number(shared.place, s_q * NUMBERS + n, tile[n], 1)
"""
PERSISTENT, DYNAMIC, PACK = {"schedule": Schedule("static", 1)}, {"schedule": Schedule("dynamic", 2)}, {"packed": True}

BUGS: dict[str, tuple[type[BaseException], dict[str, Any], list[tuple[str, str]]]] = {
    "k released before its product is done": (RaceError, {}, [(WAIT_Z + RELEASE_K, RELEASE_K + WAIT_Z)]),
    "v released before its product is done": (RaceError, {}, [(WAIT_O + RELEASE_V, RELEASE_V + WAIT_O)]),
    "no phase flip of k_full": (EmulationError, {}, [(NEXT_K, NEXT_K.replace("parity_next", "0"))]),
    "no phase flip of v_full": (
        EmulationError,
        {},
        [("mbarrier.wait(shared.v_full.index(s_v), parity_v)", "mbarrier.wait(shared.v_full.index(s_v), 0)")],
    ),
    "no phase flip of k_empty": (
        EmulationError,
        {},
        [("mbarrier.wait(shared.k_empty.index(s), parity ^ 1)", "mbarrier.wait(shared.k_empty.index(s), 1)")],
    ),
    "no phase flip of v_empty": (
        EmulationError,
        {},
        [("mbarrier.wait(shared.v_empty.index(s_v), parity_v ^ 1)", "mbarrier.wait(shared.v_empty.index(s_v), 1)")],
    ),
    "the next keys not waited for": (RaceError, {}, [(NEXT_K, "pass")]),
    "queries not waited for": (
        EmulationError,
        {},
        [("    mbarrier.wait(shared.q_full.index(s * CONSUMERS + c), parity)\n", "")],
    ),
    "no fence before the TMA store": (
        RaceError,
        {},
        [
            (
                FENCE_OUT,
                "",
            )
        ],
    ),
    "no fence after values are zeroed": (
        RaceError,
        PACK,
        [("        fence_async_shared()  # wgmma reads through the asynchronous proxy\n", "")],
    ),
    "values zeroed before they land": (
        AssertionError,  # a race with the load, or a result: the load may not have started
        PACK,
        [("            mbarrier.wait(shared.v_full.index(s), parity)\n", "")],
    ),
    "values used before both halves are zeroed": (
        AssertionError,  # a race, or a result
        PACK,
        [("    mbarrier.wait(v_clean, parity)\n", "")],
    ),
    "scores used in flight": (RaceError, {}, [("warpgroup_mma_wait(1, [z])", "warpgroup_mma_wait(2, [z])")]),
    "output used in flight": (RaceError, {}, [("warpgroup_mma_wait(0, [o])", "warpgroup_mma_wait(1, [o])")]),
    "too few bytes expected": (ProtocolError, {}, [("block_type.nbytes)", "block_type.nbytes // 2)")]),
    "too many bytes expected": (DeadlockError, {}, [("block_type.nbytes)", "block_type.nbytes * 2)")]),
    "one consumer releases for both": (
        EmulationError,
        {},
        [("k_empty = new_barriers(STAGES, CONSUMERS)", "k_empty = new_barriers(STAGES, 1)")],
    ),
    "more releases than consumers": (
        DeadlockError,
        {},
        [("v_empty = new_barriers(STAGES, CONSUMERS)", "v_empty = new_barriers(STAGES, CONSUMERS + 1)")],
    ),
    "program ends before its store": (
        ProtocolError,
        {},
        [
            (
                "        s_q, n_block = _next_place(n_done, shared, c)\n    tma.store_wait(0)\n",
                "        s_q, n_block = _next_place(n_done, shared, c)\n",
            )
        ],
    ),
    "queries reloaded under the output": (
        AssertionError,  # a race, or a result
        PERSISTENT,
        [("        mbarrier.wait(shared.q_empty.index(s * CONSUMERS + c), parity ^ 1)\n", "        pass\n")],
    ),
    "blocks of earlier tiles not counted": (
        EmulationError,
        PERSISTENT,
        [
            (
                "            g += tile.n_block\n",
                "",
            )
        ],
    ),
    "slot of queries released before the output has left": (
        RaceError,
        PERSISTENT,
        [("    tma.store_wait(0)\n    mbarrier.arrive(", "    mbarrier.arrive(")],
    ),
    "slot of queries never released": (
        DeadlockError,
        PERSISTENT,
        [("_release_output(s_q ^ 1, shared, c, n_done > 0)", "_release_output(s_q ^ 1, shared, c, False)")],
    ),
    "slot of queries released before it was used": (
        EmulationError,
        {},
        [("_release_output(s_q ^ 1, shared, c, n_done > 0)", "_release_output(s_q ^ 1, shared, c, True)")],
    ),
    "the end not announced": (
        DeadlockError,
        {},
        [("        mbarrier.arrive(shared.q_full", "        pass  # (shared.q_full")],
    ),
    "a place announced after its queries": (
        AssertionError,
        PERSISTENT,
        [
            (PLACE, ""),
            ("    for i in range(tile.n_block + 1):\n", PLACE + "    for i in range(tile.n_block + 1):\n"),
        ],
    ),
    "a tile taken twice": (
        AssertionError,
        PERSISTENT,
        [("        n_taken += 1\n        t = next", "        n_taken = gl.maximum(n_taken + 1, 2)\n        t = next")],
    ),
    "a tile skipped": (AssertionError, DYNAMIC, [("t = n_program + n_added", "t = n_program + n_added + 1")]),
    "a masked block left unmasked": (
        AssertionError,
        {},
        [("masked_block(n, tile.hi,", "masked_block(0, tile.hi,")],
    ),
    "o not rescaled": (
        AssertionError,
        {},
        [("o = o * gl.convert_layout(rescale, gl.SliceLayout(1, layout))[:, None]", "o = o * 1.0")],
    ),
    "packed ends stored whole": (
        AssertionError,
        PACK,
        [("    if VARLEN and first + 64 > tile.T:\n", "    if False:\n")],
    ),
    "values past a packed end not zeroed": (
        AssertionError,
        PACK,
        [("        if n_valid < BLOCK_N:\n", "        if False:\n")],
    ),
}


def caught(module: ModuleType, run: dict[str, Any], seeds: int = 8) -> BaseException | None:
    """What the first of some schedules raises, a wrong result included."""
    options = dict(run)
    if options.pop("packed", False):  # sequences, then rows that belong to none, which must stay as they were
        inputs = draw_packed([90, 130], [90, 130], 1, 1, 64, BF16)
        for name, value in (("q", 1.0), ("k", torch.inf), ("v", torch.inf)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 0, 0, 0, 0, 70), value=value)
    elif options:  # many tiles of few blocks
        inputs = draw(1, 3, 1, 250, 300, 64, BF16)
    else:
        inputs = draw(1, 1, 1, 300, 900, 64, BF16)
        options = {"window": 500}
    expected = [x.nan_to_num(7) for x in attend(**inputs, **options)]
    for seed in range(seeds):
        try:
            found = [x.nan_to_num(7) for x in attend(**inputs, module=module, seed=seed, **options)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "another result"
        except (EmulationError, AssertionError) as error:
            return error
    return None


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug: str, tmp_path: Path) -> None:
    kind, run, replacements = BUGS[bug]
    module = mutated(tmp_path, (hopper_blocks, hopper_schedule, hopper_loads, hopper_forward), *replacements)
    error = caught(module, run)
    assert isinstance(error, kind), repr(error)


@pytest.mark.parametrize("run", [{}, PERSISTENT, DYNAMIC, PACK], ids=str)
def test_no_bug_is_not_caught(run: dict[str, Any], tmp_path: Path) -> None:
    assert caught(mutated(tmp_path, (hopper_blocks, hopper_schedule, hopper_loads, hopper_forward)), run) is None
