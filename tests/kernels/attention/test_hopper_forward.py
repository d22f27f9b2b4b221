"""The Hopper attention forward, run from its own source by the Gluon emulator, and bugs that must not pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rooflight.kernels.attention.hopper import blocks as hopper_blocks
from rooflight.kernels.attention.hopper import forward as hopper_forward
from rooflight.kernels.attention.hopper import schedule as hopper_schedule
from rooflight.kernels.attention.hopper.schedule import TILE, Schedule
from support.attention import LAYOUTS, draw, draw_packed, draw_past_longest, draw_sinks
from support.gluon_emulator import emulated
from support.hopper_forward import attend, judge_forward

pytestmark = pytest.mark.cpu

BF16, FP16 = torch.bfloat16, torch.float16

MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 70},  # narrower than a block: none is visible to every row
    "wide window": {"window": 300},  # partial, whole and partial blocks
    "two-sided window": {"causal": False, "window": (200, 40)},
}


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, head_dim: int) -> None:
    judge_forward(draw(1, 2, 1, 300, 300, head_dim, BF16), seed=1, **MASKS[mask])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp16_and_every_head_size(head_dim: int) -> None:
    judge_forward(draw(1, 1, 1, 200, 330, head_dim, FP16), seed=2)


# One query (decoding), one key, a whole tile, one row more, fewer queries than keys, the other way (rows with no key)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (128, 128), (129, 257), (150, 400), (400, 150)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "two-sided window"])
def test_lengths_align_at_the_bottom_right(mask: str, lengths: tuple[int, int]) -> None:
    judge_forward(draw(1, 1, 1, *lengths, 64, BF16), seed=3, **MASKS[mask])


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2)], ids=str)
def test_each_query_head_reads_its_own_key_value_head(heads: tuple[int, int]) -> None:
    judge_forward(draw(2, *heads, 130, 130, 64, BF16), seed=4)


# Empty sequences on either side and on both, a whole tile, ends within a tile, more queries than keys
PACKED = ([130, 0, 128, 7, 50, 0, 1], [140, 20, 128, 0, 30, 0, 260])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["causal", "full", "window"])
def test_packed_sequences(mask: str, head_dim: int) -> None:
    judge_forward(draw_packed(*PACKED, 2, 1, head_dim, BF16), seed=5, **MASKS[mask])


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("seed", range(6))
def test_many_schedules(seed: int, kind: str) -> None:
    inputs = draw(1, 1, 1, 300, 400, 64, BF16) if kind == "dense" else draw_packed([140, 60], [300, 60], 1, 1, 64, BF16)
    judge_forward(inputs, seed=100 + seed)


RUNS = [TILE, Schedule("static", 1), Schedule("static", 3), Schedule("dynamic", 1), Schedule("dynamic", 3)]


def name_of(schedule: Schedule) -> str:
    return f"{schedule.kind} {schedule.n_program or ''}"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", RUNS, ids=name_of)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_more_schedules(head_dim: int, mask: str, schedule: Schedule) -> None:
    first = 2 * RUNS.index(schedule) + 10 * list(MASKS).index(mask)  # 50 orders for each head size, none of them twice
    for seed in (first, first + 1):
        judge_forward(draw(1, 2, 1, 300, 500, head_dim, BF16), seed=seed, schedule=schedule, **MASKS[mask])
        judge_forward(draw_packed(*PACKED, 2, 1, head_dim, BF16), seed=seed, schedule=schedule, **MASKS[mask])


@pytest.mark.parametrize("schedule", RUNS, ids=name_of)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 256])  # two slots for queries, one
def test_schedules(head_dim: int, packed: bool, schedule: Schedule) -> None:
    inputs = draw_packed(*PACKED, 2, 1, head_dim, BF16) if packed else draw(1, 2, 1, 300, 300, head_dim, BF16)
    for seed in (6, 7):
        judge_forward(inputs, seed=seed, schedule=schedule)


@pytest.mark.parametrize("schedule", RUNS, ids=name_of)
def test_sections_of_heads(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hopper_schedule.SECTION_BYTES, 64, 2 * 300 * 64 * 2)  # of one key-value head
    judge_forward(draw(1, 5, 5, 300, 300, 64, BF16), schedule=schedule)
    judge_forward(draw(3, 4, 2, 150, 300, 64, BF16), schedule=schedule)


def test_the_choice_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_schedule, "multiprocessors", lambda device: 2)
    taken = []
    monkeypatch.setattr(hopper_forward, "tile_counter", lambda device: taken.append(1) or torch.zeros(1).int())
    for head_dim, T, dynamic in ((64, 256, False), (64, 257, True), (128, 257, False), (256, 257, False)):
        taken.clear()
        judge_forward(draw(1, 1, 1, T, T, head_dim, BF16))
        assert bool(taken) == dynamic
        assert ("dynamic" in str(hopper_schedule.CHOICES[head_dim])) == (head_dim == 64)


@pytest.mark.parametrize("n_program", [1, 2, 5])
def test_a_launch_leaves_the_counter_at_zero(n_program: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(hopper_forward, "tile_counter", lambda device: counter)
    for T in (300, 64):  # more tiles than programs, then as many tiles as heads
        for seed in range(3):
            judge_forward(draw(1, 2, 1, T, T, 64, BF16), seed=seed, schedule=Schedule("dynamic", n_program))
            assert counter.item() == 0


@pytest.mark.parametrize("layout", ["(B, T, H, D)", "(T, B, H, D)", "fused"])
def test_layouts(layout: str) -> None:
    inputs = {name: LAYOUTS[layout](x) for name, x in draw(2, 2, 2, 140, 140, 64, BF16).items()}
    judge_forward(inputs, seed=8)


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_max_seqlen_below_the_longest_leaves_the_rest_alone(head_dim: int, mask: str) -> None:
    """A GPU's values are not checked: what lies past it is neither read, NaN that it is, nor written."""
    long, short, kept = draw_past_longest([130, 40, 200], [140, 7, 90], 100, 80, 2, 1, head_dim, BF16)
    (out, lse), expected = (attend(**inputs, **MASKS[mask]) for inputs in (long, short))
    assert torch.equal(out[kept["q"]], expected[0])
    assert torch.equal(lse[:, kept["q"]], expected[1])
    assert out[~kept["q"]].isnan().all()
    assert lse[:, ~kept["q"]].isnan().all()


def test_rows_past_a_packed_end_are_left_alone() -> None:
    inputs = draw_packed([90, 70], [90, 70], 1, 1, 64, BF16)
    padded = {name: torch.nn.functional.pad(inputs[name], (0, 0, 0, 0, 0, 50)) for name in "qkv"}
    ends = inputs["cu_seqlens_q"]
    out, lse = torch.full_like(padded["q"], 7.0), torch.full((1, 210), 7.0)
    with emulated(hopper_forward):
        hopper_forward.launch_forward(*padded.values(), out, lse, ends, ends, 90, 90, None, 0, 0.1)
    assert (out[160:] == 7).all()
    assert (lse[:, 160:] == 7).all()
    # nor does one sequence write its neighbour's rows after the neighbour did
    backwards = torch.full_like(padded["q"], 7.0)
    with emulated(hopper_forward):
        hopper_forward.launch_forward(*padded.values(), backwards, lse, ends[:2], ends[:2], 90, 90, None, 0, 0.1)
    assert (backwards[90:] == 7).all()
    assert torch.equal(backwards[:90], out[:90])


@pytest.mark.parametrize("packed", [False, True])
def test_outputs_past_2_31_elements(packed: bool) -> None:
    inputs = draw_packed([140], [140], 1, 1, 64, BF16) if packed else draw(1, 1, 1, 140, 140, 64, BF16)
    expected, _ = attend(**inputs)
    stride = 1 << 24  # row 128 stands at 2^31; untouched, most of the storage is no memory
    storage = torch.UntypedStorage(2 * 140 * stride)
    out = torch.tensor([], dtype=BF16).set_(
        storage, 0, expected.shape, (stride, 64, 1) if packed else (0, 0, stride, 1)
    )
    ends, lse = inputs.get("cu_seqlens_q"), torch.empty(1, 140) if packed else torch.empty(1, 1, 140)
    with emulated(hopper_forward):
        hopper_forward.launch_forward(*list(inputs.values())[:3], out, lse, ends, ends, 140, 140, None, 0, 0.125)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_of_a_packed_neighbour_do_not_reach_over(value: float) -> None:
    inputs = draw_packed([90, 70, 60], [90, 70, 60], 1, 1, 64, BF16)
    clean, _ = attend(**inputs, seed=9)
    poisoned = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name in "kv":
        poisoned[name][90:160] = value
    out, _ = attend(**poisoned, seed=9)
    for rows in (slice(0, 90), slice(160, 220)):
        assert torch.equal(out[rows], clean[rows])


def test_what_it_serves() -> None:
    def reason(head_dim: int = 64, dtype: torch.dtype = BF16, S: int = 8, **changes: Any) -> str | None:
        options = {name: changes.pop(name) for name in ("softcap", "has_sinks") if name in changes}
        tensors = draw(2, 2, 2, 8, S, head_dim, dtype) | changes
        return hopper_forward.supports(*tensors.values(), None, **options)

    assert reason() is None
    assert reason(256, FP16) is None
    assert reason(dtype=torch.float32) == "no torch.float32 kernel"
    assert reason(80) == "head size 80, not 64, 128, 256"
    assert reason(softcap=1.0) == "softcap"
    assert reason(has_sinks=draw_sinks(2, BF16) is not None) == "sinks"
    assert reason(S=0) == "no queries or no keys"
    x = draw(2, 2, 2, 8, 8, 64, BF16)["k"]
    assert reason(k=LAYOUTS["every other"](x)) == "k is not contiguous along the head size"
    assert reason(v=LAYOUTS["odd offset"](x)) == "v is not aligned to 16 bytes"
    assert reason(k=LAYOUTS["expanded over B and H"](x)) == "k is expanded"
    for layout in ("(B, T, H, D)", "fused"):
        assert reason(k=LAYOUTS[layout](x)) is None
    packed, ends = x[0].transpose(0, 1), torch.tensor([0, 8], dtype=torch.int32)
    assert hopper_forward.supports(packed, packed, packed, ends) is None
    assert hopper_forward.supports(packed, packed, packed[::2].repeat_interleave(2, 2)[..., ::2], ends) is not None


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("layout", ["(B, T, H, D)", "fused"])
def test_descriptors_are_those_that_triton_makes(layout: str, varlen: bool) -> None:
    x = LAYOUTS[layout](draw(2, 3, 3, 5, 5, 64, FP16)["q"])
    if varlen:
        x = x[0].transpose(0, 1)
    ours, heads = hopper_blocks.boxes(128, varlen).describe(x), hopper_blocks.as_heads(x, varlen)
    strides = [n if size > 1 else 64 for n, size in zip(heads.stride(), heads.shape, strict=True)]
    layout_in_memory = hopper_blocks.gl.NVMMASharedLayout.get_default_for([1, 1, 128, 64], hopper_blocks.gl.float16)
    theirs = TensorDescriptor(heads, list(heads.shape), strides, [1, 1, 128, 64], layout_in_memory)
    assert vars(ours).keys() - {"described"} == vars(theirs).keys()
    for name, value in vars(theirs).items():
        assert name == "base" or getattr(ours, name) == value, name
    assert ours.base.data_ptr() == theirs.base.data_ptr()
