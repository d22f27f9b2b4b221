"""What installs is what stands in the files."""

import tomllib
from importlib.metadata import entry_points, requires
from pathlib import Path

ROOT = Path(__file__).parent.parent
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


def test_every_room_is_installed_and_typed():
    rooms = PROJECT["tool"]["setuptools"]["package-dir"]
    assert {name.removeprefix("rooflight.") for name in rooms} == set(rooms.values())
    for folder in rooms.values():
        assert (ROOT / folder / "py.typed").exists()
        packages = {
            f"rooflight.{path.parent.relative_to(ROOT)}".replace("/", ".") for path in (ROOT / folder).rglob("py.typed")
        }
        assert packages <= set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_console_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="rooflight")
    assert command.value == "rooflight.bench.cli:main"
    assert any(r.startswith("triton") for r in requires("rooflight") or [])
