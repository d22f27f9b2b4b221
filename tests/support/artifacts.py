"""The table of compiled kernels in docs/artifacts.md: run this file to write it again.

Every kernel is compiled as its launcher launches it, without a GPU (support.aot), so a change in generated code shows
as a diff of the table. `python tests/support/artifacts.py [target ...]` writes all targets, or just those given.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.aot import Artifact, compile_cases

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "artifacts.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = ("kernel", "case", "tile", "warps", "stages", "registers", "spills", "shared", "tensor")
TENSOR_CORES = "HMMA|HGMMA|UTC.*MMA|v_mfma"
LOOPS = "inner loops, "  # stands before the target in the heading of the second table
RESOURCES = ("tensor", "exp", "fma", "alu", "shared", "issue")
LOOP_COLUMNS = (
    "kernel",
    "case",
    *RESOURCES,
    "bound by",
    "overlapped",
    "in turn",
    "exp in flight",
    "serialised",
    "spills",
)

Case = tuple[Callable[..., Any], dict[str, Any]]


def rms_norm(N: int, dtype: str, residual: bool = False, heads: bool = False, rows: int = 4096) -> None:
    import torch

    from rooflight.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd

    shape = (8, 16, 32, N) if heads else (rows, N)
    x = torch.empty(shape, dtype=getattr(torch, dtype))
    if heads:
        x = x.transpose(1, 2)
    weight = torch.empty(N, dtype=x.dtype)
    y, stream, rstd = rms_norm_fwd(x, weight, 1e-6, x if residual else None, 0.0)
    rms_norm_bwd(y, stream if residual else None, stream if residual else x, weight, rstd, 0.0, True)


def adamw(gradient: str, copy: str | None = None, size: int = 4096) -> None:
    import torch

    from rooflight.kernels.adamw import AdamWTables, adamw_update

    w, step = torch.empty(size), torch.empty(())
    g, c = w.to(getattr(torch, gradient)), None if copy is None else w.to(getattr(torch, copy))
    adamw_update(
        [w], [g], [w], [w], [step], [c], AdamWTables(),
        lr=step, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
    )  # fmt: skip


def rope(head_dim: int, dtype: str, interleaved: bool = False, joined: bool = False) -> None:
    import torch

    from rooflight.kernels.rope import rope_join, rope_turn

    q, k = (torch.empty(2, 512, heads, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2) for heads in (32, 8))
    table = torch.empty(512, head_dim // 2)
    if joined:
        rope_join(q, k, k, table, table, None, False)
    else:
        rope_turn(q, k, table, table, None, interleaved, False)


def gelu(N: int, dtype: str) -> None:
    import torch

    from rooflight.kernels.gelu import gelu_bwd, gelu_fwd

    x = torch.empty(512, N, dtype=getattr(torch, dtype))
    gelu_bwd(gelu_fwd(x), x)


def swiglu(N: int, dtype: str) -> None:
    import torch

    from rooflight.kernels.swiglu import swiglu_bwd, swiglu_fwd

    gate, up = torch.empty(512, 2 * N, dtype=getattr(torch, dtype)).chunk(2, -1)
    swiglu_bwd(swiglu_fwd(gate, up), gate, up)


def cross_entropy(V: int, dtype: str, softcap: float = 0.0, labels: bool = False) -> None:
    import torch

    from rooflight.kernels.cross_entropy import RowOptions, row_gradients, row_losses

    x, target = torch.empty(512, V, dtype=getattr(torch, dtype)), torch.zeros(512, dtype=torch.int64)
    options = RowOptions(-100, softcap, 1e-4, *((0.1, torch.empty(V)) if labels else ()))
    loss, lse = row_losses(x, target, options)
    row_gradients(loss, x, target, lse, options, x)


def fp8(format: str, dtype: str) -> None:
    import torch

    from rooflight.kernels.fp8 import quantize

    quantize(torch.empty(4096, 1600, dtype=getattr(torch, dtype)), getattr(torch, format))


CASES: list[Case] = [
    (rms_norm, {"N": 64, "dtype": "bfloat16", "heads": True}),
    (rms_norm, {"N": 128, "dtype": "bfloat16", "heads": True}),
    (rms_norm, {"N": 2048, "dtype": "bfloat16", "residual": True}),
    (rms_norm, {"N": 2048, "dtype": "bfloat16", "residual": True, "rows": 4}),
    (rms_norm, {"N": 4096, "dtype": "bfloat16"}),
    (rms_norm, {"N": 4096, "dtype": "bfloat16", "residual": True}),
    (rms_norm, {"N": 4096, "dtype": "float32", "residual": True}),
    (rms_norm, {"N": 8192, "dtype": "bfloat16", "residual": True}),
    (rms_norm, {"N": 8192, "dtype": "float32", "residual": True}),
    (rms_norm, {"N": 16384, "dtype": "bfloat16"}),
    (rms_norm, {"N": 16384, "dtype": "bfloat16", "residual": True}),
    (rms_norm, {"N": 16384, "dtype": "float32", "residual": True}),
    (rms_norm, {"N": 32768, "dtype": "bfloat16"}),
    (rms_norm, {"N": 65536, "dtype": "bfloat16", "residual": True}),
    (rope, {"head_dim": 64, "dtype": "bfloat16"}),
    (rope, {"head_dim": 128, "dtype": "bfloat16"}),
    (rope, {"head_dim": 128, "dtype": "bfloat16", "interleaved": True}),
    (rope, {"head_dim": 64, "dtype": "bfloat16", "joined": True}),
    (rope, {"head_dim": 128, "dtype": "bfloat16", "joined": True}),
    (swiglu, {"N": 11008, "dtype": "bfloat16"}),
    (swiglu, {"N": 11008, "dtype": "float32"}),
    (gelu, {"N": 6400, "dtype": "bfloat16"}),
    (adamw, {"gradient": "bfloat16", "copy": "bfloat16"}),
    (adamw, {"gradient": "float32"}),
    (adamw, {"gradient": "float32", "size": 4095}),
    (cross_entropy, {"V": 128256, "dtype": "bfloat16"}),
    (cross_entropy, {"V": 50257, "dtype": "float32", "softcap": 30.0}),
    (cross_entropy, {"V": 128256, "dtype": "bfloat16", "labels": True}),
]


FP8_CASES: list[Case] = [
    (fp8, {"format": "float8_e4m3fn", "dtype": "bfloat16"}),
    (fp8, {"format": "float8_e4m3fn", "dtype": "float32"}),
    (fp8, {"format": "float8_e5m2", "dtype": "bfloat16"}),
]


def cases(target: str) -> list[Case]:
    """All but attention's; the older ones have no fp8, and AMD's have another."""
    return CASES + (FP8_CASES if target in ("sm_89", "sm_90", "sm_100", "sm_120") else [])


def _attention() -> Callable[..., None]:
    """Attention's own case function."""
    path = ROOT / "tests" / "kernels" / "attention" / "test_attention_compiled.py"
    spec = importlib.util.spec_from_file_location("attention_compiled", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attention


def hopper(head_dim: int, dtype: str = "bfloat16", packed: bool = False) -> None:
    """The Gluon kernels; 256 has no backward of its own."""
    _attention()(head_dim, dtype, packed=packed, backward=head_dim <= 128, path="hopper")


def attention_cases(target: str) -> list[Case]:
    """Attention over the head sizes that models use, on every path that the target has."""
    cases: list[Case] = [(_attention(), {"head_dim": size, "dtype": "bfloat16"}) for size in (64, 128, 256)]
    if target == "sm_90":
        cases += [(hopper, {"head_dim": size}) for size in (64, 128, 256)]
        cases += [(hopper, {"head_dim": 128, "packed": True})]
    return cases


def _name(case: Case, artifact: Artifact) -> tuple[str, str]:
    return artifact.kernel.strip("_").removesuffix("_kernel"), " ".join(f"{k}={v}" for k, v in case[1].items())


def row(case: Case, artifact: Artifact) -> str:
    """One line of the table."""
    tile = " ".join(f"{k}={v}" for k, v in artifact.constexprs.items() if k.startswith(("ROWS", "BLOCK")))
    cells = (
        *_name(case, artifact), tile, artifact.num_warps, artifact.num_stages, artifact.registers, artifact.spills,
        artifact.shared, artifact.count(TENSOR_CORES),
    )  # fmt: skip
    return _line(cells)


def loop_row(case: Case, artifact: Artifact) -> str | None:
    """One line of the table of inner loops; None for a kernel that has no bound."""
    loop = artifact.loop
    if loop is None:
        return None
    cells = (
        *_name(case, artifact), *(round(loop.cycles[r]) for r in RESOURCES), loop.limit, f"{loop.ideal:.2f}",
        f"{loop.in_turn:.2f}", f"{loop.overlapped} of {loop.exponentials}", loop.serialised, loop.spills,
    )  # fmt: skip
    return _line(cells)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def rows(target: str, cases: list[Case]) -> tuple[list[str], list[str]]:
    """The lines of both tables."""
    compiled = compile_cases(cases, target, timeout=3600)
    pairs = [(case, artifact) for case, artifacts in zip(cases, compiled, strict=True) for artifact in artifacts]
    loops = (loop_row(*pair) for pair in pairs)
    return list(dict.fromkeys(row(*pair) for pair in pairs)), list(dict.fromkeys(line for line in loops if line))


def committed() -> dict[str, list[str]]:
    """The tables' rows by heading, and the triton version under ""."""
    sections: dict[str, list[str]] = {"": []}
    heading = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []:
        if line.startswith("## "):
            heading = line.removeprefix("## ")
            sections[heading] = []
        elif line.startswith("Compiled with triton "):
            sections[""] = [line.removeprefix("Compiled with triton ").split(" ")[0]]
        elif heading and line.startswith("| ") and not line.startswith("| kernel"):
            sections[heading].append(line)
    return sections


def check_committed(target: str, case: Case, artifact: Artifact) -> None:
    """Assert that the artifact's lines stand in the table; another version of triton generates other code."""
    table = committed()
    if target in table and table[""] == [version("triton")]:
        assert row(case, artifact) in table[target], "run: python tests/support/artifacts.py"
        line = loop_row(case, artifact)
        assert line is None or line in table[LOOPS + target], "run: python tests/support/artifacts.py"


INTRODUCTION = f"""# Compiled kernels

Compiled with triton {version("triton")} ahead of time, each kernel as its launcher launches it; written by
`python tests/support/artifacts.py`. Registers are per thread, shared memory is in bytes, spills and tensor
count instructions (stores and loads of spilled registers; HMMA, HGMMA, UTCMMA or MFMA).

The second table of a GPU bounds what the hot inner loop of each attention kernel can reach there, from its machine
code (tests/support/sass.py): cycles of one multiprocessor for one iteration, for the tensor cores, the exponentials,
the FP32 and the integer pipes, shared memory and the issue slots, each as if it were alone. Then the share of the
tensor cores' peak that is left when everything overlaps and when products and all else take turns; how many of the
exponentials stand where a product is in flight; the products that ptxas cut into single instructions; and the spills
inside the loop. Nothing here was measured on hardware."""


def write(targets: tuple[str, ...]) -> None:
    compiled = {}
    for target in targets:
        print(f"compiling for {target}", flush=True)
        compiled[target], compiled[LOOPS + target] = rows(target, cases(target) + attention_cases(target))
    sections = committed() | compiled
    lines = [INTRODUCTION]
    for target in TARGETS:
        for heading, columns in ((target, COLUMNS), (LOOPS + target, LOOP_COLUMNS)):
            if sections.get(heading):
                lines += ["", f"## {heading}", "", _line(columns), "|" + "---|" * len(columns), *sections[heading]]
    temporary = TABLE.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(TABLE)


if __name__ == "__main__":
    write(tuple(sys.argv[1:]) or TARGETS)
