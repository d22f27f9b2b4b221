"""CUDA graphs on a CPU: operators are recorded once and run again from the record, without Python.

As strict as a capture: it runs nothing (what it wrote is put back), refuses what would wait for a device or take a
number from the host, and a replay reads and writes the addresses of the capture alone. Memory from before the capture
must still be there at each replay; what was made in it stays, as in a graph's pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# A number for the host, a size that depends on data, or a tensor of numbers from the host.
REFUSED = (
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal",
    "aten::masked_select", "aten::_unique2", "aten::lift_fresh",
)  # fmt: skip


class Place:
    """Where a tensor lies: in the pool, which keeps its storage, or in memory from before."""

    def __init__(self, x: Tensor, pool: dict[int, torch.UntypedStorage]) -> None:
        storage = x.untyped_storage()
        self.kept = pool.get(storage._cdata)
        self.weak = StorageWeakRef(storage)
        self.address = storage.data_ptr()
        self.view = x.storage_offset(), x.shape, x.stride()
        self.dtype = x.dtype

    def tensor(self) -> Tensor:
        storage = self.kept
        if storage is None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
            if storage is None or storage.data_ptr() != self.address:
                raise RuntimeError("a replay reads memory that was freed since the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.pool: dict[int, torch.UntypedStorage] = {}
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Place]]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storages from before that were written, and their bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = func._schema.name.startswith("aten::index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if func._schema.name in REFUSED or masked:
            raise RuntimeError(f"{func._schema.name} is not permitted while a graph is captured")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = tree_map_only(Tensor, lambda x: Place(x, self.pool), (args, kwargs))
        self._save_what_it_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        storages = {x.untyped_storage()._cdata for x in given}
        made = []
        for i, x in enumerate(tree_leaves(result)):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in storages:
                self.pool[x.untyped_storage()._cdata] = x.untyped_storage()
                made.append((i, Place(x, self.pool)))
        self.calls.append((func, *places, made))
        return result

    def _save_what_it_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in tree_leaves(values.get(argument.name)):
                if not isinstance(x, Tensor):
                    continue
                storage = x.untyped_storage()
                if storage._cdata not in self.pool and storage._cdata not in self.before:
                    held = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before[storage._cdata] = held, held.clone()

    def put_back(self) -> None:
        for held, bytes_before in self.before.values():
            held.copy_(bytes_before)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            args, kwargs = tree_map_only(Place, Place.tensor, (args, kwargs))
            leaves = tree_leaves(func(*args, **kwargs))
            for i, place in made:
                place.tensor().copy_(leaves[i])


class Recorder:
    """Stands in for rooflight.training.graph.CudaGraphs."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def run(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recording = _Recording()
        try:
            with recording:
                result = function()
        finally:
            recording.put_back()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay, result
