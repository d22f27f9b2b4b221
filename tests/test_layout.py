"""The house's rules that a reader should not have to enforce: arrows between rooms, file sizes, and good neighbours."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room and those it may import; tests may import everything, and nothing imports tests.
MAY_IMPORT = {
    "kernels": set(),
    "model": {"kernels"},
    "training": {"kernels", "model"},
    "bench": {"kernels", "model", "training", "tokenizer"},
    "tokenizer": set(),
    "integrations": {"kernels"},
}
# The same inside bench; its files at the top (the commands, the demo) may import every room.
BENCH_MAY_IMPORT = {
    "cases": set(),
    "measure": {"cases"},
    "rates": {"measure"},
    "predict": {"cases", "measure", "rates"},
    "reports": {"measure"},  # its records
}
LIMIT = 400  # lines in a file


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def names_imported(source: str, path: Path) -> list[list[str]]:
    """What a module under ROOT imports, relative or by the installed name, as the parts of absolute names."""
    package = ("rooflight", *path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found += names
    return found


def rooms_imported(source: str, path: Path) -> set[str]:
    """Rooms that a module under ROOT names in an import; tests and their support too."""
    names = names_imported(source, path)
    rooms = {name[1] for name in names if name[0] == "rooflight" and name[1:] not in ([], ["__version__"])}
    return rooms | {name[0] for name in names if name[0] in ("tests", "support", "conftest")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    for path in python_files(room):
        allowed = MAY_IMPORT[room] | {room}
        stray = rooms_imported(path.read_text(), path) - allowed
        if path.name.startswith("benchmark_"):  # collected by pytest like a test
            stray -= {"support"}
        assert not stray, f"{path.relative_to(ROOT)} imports {', '.join(sorted(stray))}"


@pytest.mark.parametrize("room", BENCH_MAY_IMPORT)
def test_imports_inside_bench_go_one_way(room):
    """Nor to the commands above the rooms."""
    for path in python_files(f"bench/{room}"):
        names = [name for name in names_imported(path.read_text(), path) if name[:2] == ["rooflight", "bench"]]
        allowed = BENCH_MAY_IMPORT[room] | {room}
        stray = {".".join(name) for name in names if not allowed & {*name[2:3]}}
        assert not stray, f"{path.relative_to(ROOT)} imports {', '.join(sorted(stray))}"


def test_every_folder_of_bench_that_holds_python_is_a_room():
    assert {path.parent.name for path in (ROOT / "bench").glob("*/*.py")} == set(BENCH_MAY_IMPORT)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..training import loop", {"training"}),
        ("from .. import training", {"training"}),
        ("from . import rope", {"kernels"}),
        ("from .attention import launch", {"kernels"}),
        ("import rooflight.model.config as c", {"model"}),
        ("def f():\n    from rooflight import bench", {"bench"}),
        ("from support.aot import compile_cases", {"support"}),
        ("import torch", set()),
    ],
)
def test_the_arrow_reader_sees_every_form(source, found):
    assert rooms_imported(source, ROOT / "kernels" / "x.py") == found


def modules_imported(path: Path) -> set[Path]:
    """The project's files that a module of it imports, in functions and for its types too."""
    found = set()
    for _, *parts in (name for name in names_imported(path.read_text(), path) if name[0] == "rooflight"):
        # A name of a package is a file of its own, or else stands in the package.
        for file in ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1]):
            module = next((m for m in (file.with_suffix(".py"), file / "__init__.py") if m.is_file()), None)
            if module:
                found.add(module)
                break
    return found


def circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """A way through the graph that comes back to where it began; empty where there is none."""
    done: set[Path] = set()

    def search(way: list[Path]) -> list[Path]:
        for module in sorted(graph[way[-1]] - done):
            if module in way:
                return [*way[way.index(module) :], module]
            if found := search([*way, module]):
                return found
        done.add(way[-1])
        return []

    return next((found for module in sorted(graph) if module not in done and (found := search([module]))), [])


def test_no_modules_import_each_other():
    graph = {path: modules_imported(path) for path in python_files(*MAY_IMPORT)}
    assert not circle(graph), " -> ".join(str(path.relative_to(ROOT)) for path in circle(graph))


def test_a_circle_is_found():
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circle({a: {b}, b: {c}, c: {b}}) == [b, c, b]
    assert not circle({a: {b, c}, b: {c}, c: set()})


def test_no_file_is_longer_than_the_limit():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*python_files(*MAY_IMPORT, "src", "tests"), *ROOT.glob("*.py")]
        if (lines := len(path.read_text().splitlines())) > LIMIT
    }
    assert not long


def test_tests_hold_no_package():
    """An __init__.py there would put the repository root on sys.path, where our kernels/ shadows PyPI's."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


NEIGHBOURS = """
import kernels, transformers
import rooflight.kernels
assert kernels.__name__ == "kernels" and hasattr(kernels, "get_kernel"), kernels
assert rooflight.kernels.rms_norm.__module__.startswith("rooflight.")
from transformers import LlamaConfig, LlamaForCausalLM
print("neighbours ok")
"""


def test_transformers_and_pypi_kernels_work_beside_rooflight(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NEIGHBOURS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "neighbours ok"
