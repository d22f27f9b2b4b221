"""Pytest set-up: the `--benchmark` flag, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: busy OpenMP threads that spin-wait cost up to 10x on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

ROOT = Path(__file__).parent
BENCH = ROOT / "bench"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks in bench/ (through pytest-benchmark) instead of the tests",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            config.args = [str(BENCH)]
    elif not torch.cuda.is_available():
        # Triton reads this once, when it is first imported; the benchmarks measure the eager path instead.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    skip = pytest.mark.skip(reason="a benchmark: run `pytest --benchmark`")
    for item in items:
        if item.path.is_relative_to(BENCH):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is a GPU, else the CPU, where the kernels run in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
