"""Marks for a part of a grid of cases."""

from __future__ import annotations

from typing import Any

import pytest


def on_cpu(*values: Any) -> list[Any]:
    """Parameters that run in the interpreter only.

    On a GPU every case compiles kernels, a second or two each: there a grid's axes are run, and drawn cases cross them.
    """
    return [pytest.param(value, marks=pytest.mark.cpu) for value in values]
