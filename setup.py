"""How the rooms become parts of the package `rooflight`; everything else about the build stands in pyproject.toml.

The rooms are folders at the top level, for the reader, and install under one import name, so that they never collide
with PyPI's `kernels` or a user's own model.py. Only a wheel needs them moved. An editable install is one line in a .pth
file that names src/, where rooflight/__init__.py looks for the rooms itself. (Were they in the package-dir table,
setuptools would install an import hook instead, which comes after sys.path: any folder called rooflight/ in the current
one would be imported in its place, without a word.)
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("kernels", "model", "tokenizer", "training", "bench", "integrations")


class build_with_rooms(build_py):  # noqa: N801 (a command's name)
    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.package_dir.update({f"rooflight.{room}": room for room in ROOMS})
            folders = {path.parent for room in ROOMS for path in Path(room).rglob("*.py")}
            self.packages = [*self.packages, *sorted(f"rooflight.{'.'.join(folder.parts)}" for folder in folders)]


setup(cmdclass={"build_py": build_with_rooms})
