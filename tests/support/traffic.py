"""Bytes that operators read and write, counted where torch dispatches them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _nbytes(x: Tensor) -> int:
    """Of the elements that x has in memory: one that is expanded is read once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * x.element_size()


class Traffic(TorchDispatchMode):
    """Inputs and outputs of every operator, in bytes, by its name.

    Views and allocations move nothing, a tensor given twice is read once, and a gather reads what it returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.bytes.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}.values()
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name == "aten::gather":
            read = [args[2], *written]
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = all(t.untyped_storage()._cdata in storages for t in written) and not func._schema.is_mutable
        if not is_view and not name.startswith("aten::empty"):
            self.bytes[name] += sum(map(_nbytes, (*read, *written)))
        return out
