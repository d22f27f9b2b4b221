"""Every test runs with uninitialised memory poisoned, and on a strict interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def strict_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Imported here: this file loads before the root conftest has set TRITON_INTERPRET, and triton reads it once.
        from support.interpreter import install

        install()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(strict_interpreter: None) -> Iterator[None]:
    from support.interpreter import poisoned_empty

    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def nothing_runs_on_a_lost_gpu() -> Iterator[None]:
    from support.cuda_context import end_if_lost

    yield
    end_if_lost()
