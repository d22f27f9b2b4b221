"""`python -m support.faulty_run`: `rooflight`, whose second process has an error in its fifth step of training."""

from __future__ import annotations

import os

from rooflight.bench.cli import main
from rooflight.training import loop
from support.runs import after, crash

if __name__ == "__main__":
    faulty = os.environ["RANK"] == "1"
    loop.Interval.add = after(4, loop.Interval.add, lambda: faulty and crash())  # type: ignore[method-assign]
    main()
