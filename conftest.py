"""Pytest set-up: Triton's interpreter where there is no GPU, long tests first, and two flags of our own.

`--benchmark` runs the benchmarks; `--announce` tells of failures and slow tests as they happen.
"""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

# Before torch is imported: busy OpenMP threads that spin-wait cost up to 10x on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

ROOT = Path(__file__).parent
BENCH = ROOT / "bench"
# pytest-benchmark's options, their defaults, and ours: all of bench/ in 90 s on two busy cores
QUICK = (("benchmark_max_time", "1.0", "0.2"), ("benchmark_min_rounds", 5, 1))

SLOW_SECONDS = 10  # from which on --announce names a test


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks in bench/ (through pytest-benchmark) instead of the tests",
    )
    parser.addoption(
        "--announce",
        action="store_true",
        help=f"print each failure's first line and each test of over {SLOW_SECONDS} s as it happens",
    )
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "seconds that a test may take, where pytest-timeout is installed")


class Announcer:
    """Prints failures and slow tests when they happen: a run that is cut off never reaches its summary.

    A failure with its first line; a slow test, and on Ctrl-C each that still runs, with its seconds.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.began: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = time.monotonic() - self.began.pop(nodeid)
        if seconds > SLOW_SECONDS:
            self._write(f"SLOW {nodeid} {seconds:.1f} s")

    def pytest_keyboard_interrupt(self) -> None:
        for nodeid, began in self.began.items():
            self._write(f"UNFINISHED {nodeid} {time.monotonic() - began:.1f} s")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._announce(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._announce(report)

    def _announce(self, report: Any) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
        self._write(f"FAILED {report.nodeid}: {lines[0] if lines else ''}")

    def _write(self, line: str) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"\n{line}")  # after a line of dots
        terminal.flush()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--announce") and not hasattr(config, "workerinput"):  # xdist's workers have no terminal
        config.pluginmanager.register(Announcer(config))
    if config.getoption("--benchmark"):
        if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            config.args = [str(BENCH)]
        for option, default, quick in QUICK:
            if getattr(config.option, option, None) == default:
                setattr(config.option, option, quick)
    elif not torch.cuda.is_available():
        # Triton reads this once, when it is first imported; the benchmarks measure the eager path instead.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(trylast=True)  # of the items that are left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    skip = pytest.mark.skip(reason="a benchmark: run `pytest --benchmark`")
    for item in items:
        if item.path.is_relative_to(BENCH):
            item.add_marker(skip)
    if torch.cuda.is_available():
        items[:] = long_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def long_first(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """`items` in as many runs of equal length as xdist deals out to start with, the long tests spread over their heads.

    A process that has no more steals from the end of another's run, so that no long test begins last.
    """
    long = [item for item in items if item.get_closest_marker("long")]
    others = iter([item for item in items if not item.get_closest_marker("long")])
    dealt = []
    for i in range(processes):
        heads = long[i::processes]
        dealt += [*heads, *islice(others, max(0, len(items) // processes - len(heads)))]
    return [*dealt, *others]


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prediction beside measurement, for every benchmark that ran."""
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in session.benchmarks if b and "predicted / measured" in b.extra_info] if session else []
    if not (config.getoption("--benchmark") and done):
        return
    from rooflight.bench.predict.benchmarks import lines

    terminalreporter.section("predicted and measured")
    for line in lines((b.group, b.stats.median, b.extra_info) for b in done):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is a GPU, else the CPU, where the kernels run in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
