"""What installs is what stands in the files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest

import rooflight

ROOT = Path(__file__).parent.parent
SOURCES = [path for path in (ROOT / "src" / "rooflight").rglob("*") if path.suffix in (".py", ".typed")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [line for line in lines if line]


def test_uv_and_pip_use_the_same_pins():
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == pins()


def test_every_direct_dependency_is_pinned():
    names = {pin.partition("==")[0] for pin in pins()}
    optional = [r for group in PROJECT["project"]["optional-dependencies"].values() for r in group]
    for requirement in PROJECT["project"]["dependencies"] + optional:
        name = requirement.partition(">")[0]
        assert name in names or name.startswith("rooflight["), requirement


def test_triton_may_be_no_newer_than_the_one_that_is_tested():
    (allowed,) = (r for r in PROJECT["project"]["dependencies"] if r.startswith("triton"))
    (major, minor) = next(pin for pin in pins() if pin.startswith("triton==")).removeprefix("triton==").split(".")[:2]
    assert allowed == f"triton>=3.6,<{major}.{int(minor) + 1}"


def run_in(folder: Path, *command: str | Path, **environment: str) -> str:
    """What a command prints, without the environment that this process finds its own rooflight by."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    inherited["PYTHONDONTWRITEBYTECODE"] = "1"  # what is built from a tree holds all that lies in it
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of this tree, in a folder that has the package's name, as a clone has."""
    kept = tmp_path_factory.mktemp("clones") / "rooflight"
    names = (".[!cg]*", ".cache", ".git", ".gpu", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, kept, ignore=shutil.ignore_patterns(*names))
    return kept


def build(tree: Path, what: str, out: Path) -> Path:
    """The file that `what`, a hook of the build backend (PEP 517, 660), makes of a tree."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import sys; from setuptools.build_meta import {what}; print(*('', {what}(sys.argv[1])), sep='\\n')"
    return out / run_in(tree, sys.executable, "-P", "-c", code, out).splitlines()[-1]


def environment_with(wheel: Path, folder: Path) -> Path:
    """A virtual environment's Python that has the wheel unpacked, and the dependencies from here."""
    run_in(folder, sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    dependencies = [entry for entry in sys.path if entry.endswith("-packages")]
    (site / "zz_dependencies.pth").write_text("\n".join(dependencies))
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    return build(clone, "build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, clone, wheel, tmp_path_factory) -> tuple[Path, Path]:
    """A Python that has rooflight installed, and the folder that its rooms must come from."""
    folder = tmp_path_factory.mktemp(request.param)
    python = environment_with(wheel if request.param == "wheel" else build(clone, "build_editable", folder), folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    return python, clone if request.param == "editable" else site / "rooflight"


WHERE = """
import sys, rooflight
from importlib.util import find_spec
assert {"kernels", "tokenizer", "__version__"} <= set(dir(rooflight))
specs = [find_spec(f"rooflight.{room}") for room in rooflight.__all__[1:]]
rooms = {spec.submodule_search_locations[0].rpartition("/")[0] for spec in specs}
assert len(rooms) == 1 and rooflight.bench.__path__[0].startswith(*rooms)
assert "torch" not in sys.modules and "numpy" not in sys.modules
print(rooflight.__version__, *rooms)
"""


@pytest.mark.parametrize("where", ["a user's folder", "the clone's parent", "the clone"])
def test_an_installed_package_is_found_from_anywhere(installed, clone, tmp_path, where):
    """Past folders called rooflight/, which would win over a namespace package without a word."""
    (tmp_path / "rooflight" / "kernels").mkdir(parents=True)
    (tmp_path / "rooflight" / "kernels" / "__init__.py").touch()
    python, rooms = installed
    folder = {"a user's folder": tmp_path, "the clone's parent": clone.parent, "the clone": clone}[where]
    assert run_in(folder, python, "-c", WHERE) == f"{rooflight.__version__} {rooms}"
    assert run_in(folder, python, "-m", "rooflight", "--version") == f"rooflight {rooflight.__version__}"


def test_a_clone_works_without_being_installed(clone, tmp_path):
    (tmp_path / "rooflight").mkdir()
    dependencies = [entry for entry in sys.path if entry.endswith("-packages")]
    code = f"import sys; sys.path += {dependencies}; exec({WHERE!r})"
    for folder in (tmp_path, clone, clone.parent):
        shown = run_in(folder, sys.executable, "-S", "-c", code, PYTHONPATH=str(clone / "src"))
        assert shown == f"{rooflight.__version__} {clone}"


def test_a_wheel_holds_what_the_rooms_hold(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    rooms = ("kernels", "model", "tokenizer", "training", "bench", "integrations")
    modules = {f"rooflight/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*.py")}
    data = {
        f"rooflight/{path.relative_to(ROOT)}"
        for path in (ROOT / "bench").glob("*/*.*")
        if path.suffix not in (".py", ".pyc")
    }
    package = {f"rooflight/{path.relative_to(ROOT / 'src' / 'rooflight')}" for path in SOURCES}
    assert held == modules | data | package
    assert "rooflight/py.typed" in held
    assert f"Version: {rooflight.__version__}\n" in metadata


def test_the_sdist_is_the_whole_tree_and_builds_itself(clone, wheel, tmp_path):
    with tarfile.open(build(clone, "build_sdist", tmp_path)) as archive:
        # 3.11 has the filter from 3.11.4 on
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    missing = [path for path in clone.rglob("*") if not (unpacked / path.relative_to(clone)).exists()]
    assert not [path for path in missing if not ({"build", "rooflight.egg-info"} & {*path.relative_to(clone).parts})]
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(build(unpacked, "build_wheel", tmp_path)) as its:
        assert its.namelist() == ours.namelist()


def test_the_console_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="rooflight")
    assert command.value == "rooflight.bench.cli:main"
    assert any(r.startswith("triton") for r in requires("rooflight") or [])
