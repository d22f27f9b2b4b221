"""Compile what the launchers launch, for any GPU, on a machine without one, and inspect the result.

A case is a module-level function that calls launchers (or kernels) on CPU tensors. A process without
TRITON_INTERPRET runs it under a stand-in for Triton's driver that names the wanted GPU and compiles instead of
launching, so tiles, warps, specialisations and options are the ones that ship. No kernel may have torn products.

    artifacts = compile_cases([(my_case, {"N": 4096})], "sm_90")      # one list of Artifact per case
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rooflight.bench.measure.absent import AbsentGPU, compile_launches
from support.descriptors import torn_products
from support.ranks import forks
from support.sass import Bound, inner_loops, opcodes, together

# Shared memory one block may use, bytes: CUDA C++ Programming Guide, table "Technical specifications per compute
# capability"; LDS of one CDNA3 work-group: AMD Instinct MI300 ISA guide.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Artifact:
    """One compiled kernel. spills counts instructions that store or load local memory (vector spills on AMD).

    instructions, loop: empty and None where the machine code was not listed (see compile_cases).
    loop: what its hot inner loop costs, all partitions of warps together; None without tensor cores, and where the
    listing does not tell the shapes of their products (sm_100, AMD).
    """

    kernel: str
    target: str
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int] = field(repr=False)  # opcode with its modifiers -> occurrences
    loop: Bound | None = None

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start, such as "HGMMA"."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


def compile_cases(
    cases: Sequence[tuple[Callable[..., Any], dict[str, Any]]],
    target: str,
    timeout: float = 600,
    instructions: bool = True,
) -> list[list[Artifact]]:
    """The artifacts that each (function, keyword arguments) compiles for `target`. Arguments must survive JSON.

    instructions=False leaves the listing of the machine code out, a third of the time, where the kernel spills nothing
    and has no products that could be torn (those of sm_90 alone).
    """
    request = {
        "target": target,
        "instructions": instructions or target == "sm_90",
        "cases": [[inspect.getfile(function), function.__name__, arguments] for function, arguments in cases],
    }
    with tempfile.TemporaryDirectory() as folder:
        process = forks(_compile, 1, request, folder, join=False)
        try:
            if not process.join(timeout):
                raise TimeoutError(f"compiling for {target} took over {timeout} s")
        finally:
            process.processes[0].kill()
        answer = json.loads(Path(folder, "answer.json").read_text(encoding="utf-8"))
    return [[Artifact(**a | {"loop": a["loop"] and Bound(**a["loop"])}) for a in case] for case in answer]


# ---------------------------------------------------------------- in the other process


def _absent(target: str) -> AbsentGPU:
    kind = ("hip", target, 64) if target.startswith("gfx") else ("cuda", int(target.removeprefix("sm_")), 32)
    return AbsentGPU(*kind, shared=SHARED_LIMIT[target])


def _disassemble(cubin: bytes, listed: bool) -> tuple[int, str]:
    """Registers and, if wanted or where the kernel has local memory, the listing; from the cuobjdump of Triton's."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def ask(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = ask("--dump-resource-usage")
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
        return registers, ask("-sass") if listed or stack or local else ""


def _artifact(name: str, target: str, constexprs: dict[str, Any], kernel: Any, listed: bool) -> Artifact:
    metadata = kernel.metadata
    loop = None
    if "cubin" in kernel.asm:
        registers, listing = _disassemble(kernel.asm["cubin"], listed)
        if torn := torn_products(listing):
            raise AssertionError(f"{name} reads parts of its operands from elsewhere on some path: {torn}")
        instructions = opcodes(listing)
        bounds = inner_loops(listing, target, metadata.num_warps)
        loop = together(bounds) if bounds else None
        spills = sum(n for op, n in instructions.items() if op.split(".")[0] in ("STL", "LDL"))
    else:
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        instructions = Counter(m[1] for m in re.finditer(r"^\t([a-z]\w+)", text, re.MULTILINE))
    return Artifact(
        name, target, constexprs, metadata.num_warps, metadata.num_stages, registers, spills, metadata.shared,
        dict(instructions), loop,
    )  # fmt: skip


def _compile(rank: int, request: dict[str, Any], folder: str) -> None:
    """Writes folder/answer.json."""
    os.environ["TRITON_CACHE_DIR"] = folder
    import triton

    made: list[Artifact] = []

    def keep(fn: Any, args: Any, kwargs: Any, kernel: Any) -> None:
        names = [p.name for p in fn.params]
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        fixed = {p.name: given[p.name] for p in fn.params if p.is_constexpr and p.name in given}
        shown = {k: v if isinstance(v, int | float | str | bool | None) else str(v) for k, v in fixed.items()}
        made.append(_artifact(fn.fn.__name__, request["target"], shown, kernel, request["instructions"]))

    compile_launches(_absent(request["target"]), keep)
    answer = []
    for file, name, arguments in request["cases"]:
        spec = importlib.util.spec_from_file_location(f"aot_{Path(file).stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules.get(spec.name)
        if module is None:
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        made.clear()
        getattr(module, name)(**arguments)
        answer.append([asdict(artifact) for artifact in made])
    assert not triton.knobs.runtime.interpret
    Path(folder, "answer.json").write_text(json.dumps(answer), encoding="utf-8")
