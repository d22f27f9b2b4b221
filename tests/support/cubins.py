"""What test_cubins.py looks into, in one process without the interpreter: a case's child over a driver that records.

    python cubins.py DIR CASE MODE      # MODE: right, or wrong: one kernel of the other code changes a result

The driver launches nothing: results are of CPU tensors, which the test changes where a function of the other code ran.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    directory, case, mode = Path(sys.argv[1]), *sys.argv[2:]
    import torch
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from rooflight.bench.measure import cubins
    from rooflight.bench.measure.absent import AbsentGPU
    from rooflight.kernels import dispatch

    launched: list[int] = []
    loaded: list[str] = []  # the first call's kernels, then the other code's

    class Driver(AbsentGPU):
        launcher_cls = nvidia.CudaLauncher

        def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
            assert code[:4] == b"\x7fELF"
            loaded.append(name)
            return object(), len(loaded) - 1, 64, 0, 1024  # the function is a number

        def launch(self, *args: Any) -> None:
            launched.append(args[4])  # the function

        def fill_tma_descriptor(self, *args: Any) -> tuple[str]:
            return ("map",)

        fill_tma_descriptor_tiled = fill_tma_descriptor

        def build_signature_metadata(self, signature: Any) -> bytes:
            return b""

    stand_in = Driver()
    driver.set_active(stand_in)
    for name, value in {
        "PyKernelArg": SimpleNamespace, "ARG_CONSTEXPR": 0, "ARG_KERNEL": 1, "ARG_TUPLE": 2,
        "compile_module_from_src": lambda **_: SimpleNamespace(launch=stand_in.launch), "library_dirs": list,
    }.items():  # fmt: skip
        setattr(nvidia, name, value)
    dispatch.INTERPRETED = True
    passes = cubins.passes

    def counted(name: str, device: str) -> Any:
        """The case's calls; their results are 1, or 2 where the first function of the other code ran and is wrong."""
        call, _ = passes(name, device)

        def called() -> dict[str, torch.Tensor]:
            launched.clear()
            keys = call().keys()
            if not events:
                ours.update(launched)
            events.append([function - len(ours) for function in launched if function not in ours])
            value = 2.0 if mode == "wrong" and 0 in events[-1] else 1.0
            return {key: torch.full((4,), value) for key in keys}

        return called, lambda: {key: torch.ones(4) for key in call()}

    ours: set[int] = set()
    events: list[list[int]] = []
    cubins.passes = counted
    cubins.child(case, directory, [], "cpu")
    print(json.dumps({"loaded": loaded[len(ours) :], "events": events}))


if __name__ == "__main__":
    main()
