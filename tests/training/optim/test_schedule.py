from __future__ import annotations

import math

import pytest

from rooflight.training.optim.schedule import SCHEDULES, get_lr_cosine_schedule, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    factors = [lr_factor(p, schedule=schedule, warmup=0.2) for p in (0.0, 0.05, 0.1, 0.2)]
    assert factors == pytest.approx([0.0, 0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55, 0.1]),
        ("trapezoid", [1.0, 1.0, 0.1 + 0.9 * 0.8, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_shape_after_warm_up(schedule, expected):
    """By hand at progress 0.2, 0.4, 0.6 and 1: the cosine has 0.8 of the run, the trapezoid's decay its last half."""
    factors = [lr_factor(p, schedule=schedule, warmup=0.2, decay=0.5, min_ratio=0.1) for p in (0.2, 0.4, 0.6, 1.0)]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_outside_the_run_is_clamped(schedule):
    assert lr_factor(-1.0, schedule=schedule) == lr_factor(0.0, schedule=schedule)
    assert lr_factor(7.0, schedule=schedule) == lr_factor(1.0, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_degenerate_fractions(schedule):
    """No warm-up starts at the peak; a run that is all warm-up ends at it; no decay stays there."""
    assert lr_factor(0.0, schedule=schedule, warmup=0.0) == 1.0
    assert lr_factor(1.0, schedule=schedule, warmup=1.0, decay=0.0) == 1.0
    if schedule == "trapezoid":
        assert lr_factor(1.0, schedule=schedule, warmup=0.0, decay=0.0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of cosine, trapezoid, constant, got 'linear'"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\], got -0.1"),
        ({"min_ratio": 2.0}, r"min_ratio must be in \[0, 1\], got 2.0"),
        ({"warmup": 0.6, "decay": 0.5}, r"warmup \+ decay must be at most 1, got 0.6 \+ 0.5"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        lr_factor(0.5, **arguments)


def test_cs336_cosine_schedule():
    """The course's own example: peak 1, minimum 0.1, 7 warm-up steps, cycle of 21, steps 0 to 24."""
    expected = [0, 1/7, 2/7, 3/7, 4/7, 5/7, 6/7, 1]  # fmt: skip
    expected += [0.1 + 0.45 * (1 + math.cos(math.pi * k / 14)) for k in range(1, 15)]
    expected += [0.1] * 3
    actual = [get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    assert actual == pytest.approx(expected, abs=1e-12)
    assert actual[10] == pytest.approx(0.9018, abs=1e-4)  # a figure that shares no formula with either side


def test_cs336_cosine_schedule_without_a_cosine():
    assert [get_lr_cosine_schedule(it, 1.0, 0.1, 2, 2) for it in range(4)] == [0.0, 0.5, 1.0, 0.1]
    with pytest.raises(ValueError, match="warmup_iters <= cosine_cycle_iters"):
        get_lr_cosine_schedule(0, 1.0, 0.1, 5, 4)
