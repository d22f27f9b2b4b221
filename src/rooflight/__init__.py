"""Triton kernels for training transformer language models, and everything around them.

The rooms (kernels, model, tokenizer, training, bench, integrations) are imported when they are first named: `import
rooflight` alone waits for no torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import bench, integrations, kernels, model, tokenizer, training

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "integrations", "kernels", "model", "tokenizer", "training"]

# A wheel has the rooms beside this file; in a clone, and what is installed from it in editable mode, they stand at the
# top level, two folders up.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[2]))


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
