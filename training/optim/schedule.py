"""Learning-rate schedules as pure functions.

The training loop's schedules map progress, the fraction of the run that is done, in [0, 1], to a factor on each
learning rate. Progress is max(step / max_steps, elapsed / max_seconds), so a run that time ends decays as fully as one
that steps end. `get_lr_cosine_schedule` is the step-based form of the CS336 course.
"""

from __future__ import annotations

import math

from ...model.typed import typed

SCHEDULES = ("cosine", "trapezoid", "constant")


@typed
def lr_factor(
    progress: float, *, schedule: str = "trapezoid", warmup: float = 0.02, decay: float = 0.5, min_ratio: float = 0.0
) -> float:
    """The factor on the peak learning rate at `progress` in [0, 1]; values outside are clamped.

    Every schedule rises linearly from 0 to 1 over the first `warmup` of the run; then
        cosine       falls to min_ratio along half a cosine (Loshchilov & Hutter 2017, eq. 5),
        trapezoid    stays at 1 and falls linearly to min_ratio over the last `decay` (Hu et al. 2024; Hägele et al.
        2024),
        constant     stays at 1.
    Raises ValueError on an unknown schedule or a fraction outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    for name, value in (("warmup", warmup), ("decay", decay), ("min_ratio", min_ratio)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if schedule == "trapezoid" and warmup + decay > 1.0:
        raise ValueError(f"warmup + decay must be at most 1, got {warmup} + {decay}")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    if schedule == "cosine":
        done = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "trapezoid" and progress > 1.0 - decay:
        return min_ratio + (1.0 - min_ratio) * (1.0 - progress) / decay
    return 1.0


def get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """The learning rate of step `it`: linear warm-up, half a cosine, then min_learning_rate (CS336 assignment 1,
    section 4.4).

    it < warmup_iters: it / warmup_iters of the maximum; it <= cosine_cycle_iters: the cosine between maximum and
    minimum.
    Raises ValueError unless 0 <= warmup_iters <= cosine_cycle_iters.
    """
    if not 0 <= warmup_iters <= cosine_cycle_iters:
        raise ValueError(
            f"warmup_iters and cosine_cycle_iters must satisfy 0 <= warmup_iters <= cosine_cycle_iters, "
            f"got {warmup_iters} and {cosine_cycle_iters}"
        )
    if it < warmup_iters:
        return it / warmup_iters * max_learning_rate
    if it > cosine_cycle_iters or cosine_cycle_iters == warmup_iters:
        return min_learning_rate if it > warmup_iters else max_learning_rate
    done = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + 0.5 * (1.0 + math.cos(math.pi * done)) * (max_learning_rate - min_learning_rate)
