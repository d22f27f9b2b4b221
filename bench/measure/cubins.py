"""One compiler's machine code, launched by another's Triton on a GPU: what users' triton compiles, checked on hardware.

    python -m rooflight.bench.measure.cubins build DIR            # no GPU: compile CASES for sm_90 with this triton
    python -m rooflight.bench.measure.cubins check DIR [SECONDS]  # on a GPU, with the triton that is there

A case is a call and its gradients. `check` runs each with the kernels compiled there, then gives one of these after the
other the function of the other code, and at last all, through Triton and through launch handles; results are compared
with the former ones, bitwise, and with torch in fp32. A case has a process of its own: a kernel that loses the context
costs its row, and the process is started again without it. The exit status tells whether all was right.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .absent import AbsentGPU, compile_launches
from .cubin_cases import CASES, passes

SECONDS = 60.0
# A kernel's code is right if no result's error to fp32 is this much larger than that of the code made here.
ALLOWED = 1.5

# ---------------------------------------------------------------- what tells compiled kernels apart


def plain(x: Any) -> str:
    """As text that is the same in every version of triton."""
    if type(x).__name__ == "constexpr":
        x = x.value
    if isinstance(x, list | tuple):
        return "(" + ", ".join(map(plain, x)) + ")"
    if isinstance(x, float) and x.is_integer() and abs(x) < 2**31:
        x = int(x)
    name = getattr(x, "name", None) if type(x).__module__.startswith("triton.language.core") else None
    return name if isinstance(name, str) else re.sub(r"constexpr\[(.*?)\]", r"\1", repr(x))


def key(compiled: Any) -> str:
    """The kernel, its arguments' types, its constants and divisibilities."""
    source = compiled.src
    signature = ", ".join(f"{k}: {plain(v)}" for k, v in source.signature.items())
    constants = sorted(f"{k} = {plain(v)}" for k, v in source.constants.items())
    attributes = sorted(f"{k}: {plain(v)}" for k, v in source.attrs.items() if v)
    return "\n".join([source.fn.__name__, signature, *constants, *attributes])


def parameters(compiled: Any) -> list[str]:
    """The .param list of the kernel's PTX, without names."""
    entry = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    found = [re.sub(r"\s+", " ", line).strip() for line in entry.splitlines() if ".param" in line]
    return [re.sub(r"\w+_param_(\d+)|/\*.*?\*/|//.*", "", line).strip().rstrip(",").strip() for line in found]


def fields(compiled: Any) -> list[Any]:
    """What TMA descriptors are encoded by, as JSON has it."""
    return json.loads(json.dumps(getattr(compiled.metadata, "tensordesc_meta", None) or []))


# ---------------------------------------------------------------- build


def build(directory: Path, names: list[str]) -> int:
    """Compile what these cases launch into DIR/*.cubin and DIR/index.json. For a process without the interpreter."""
    import triton

    assert not triton.knobs.runtime.interpret, "expected no TRITON_INTERPRET"
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.cubin"):
        old.unlink()
    entries: dict[str, dict[str, Any]] = {}

    def keep(kernel: Any, args: Any, kwargs: Any, compiled: Any) -> None:
        metadata, what = compiled.metadata, key(compiled)
        file = directory / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.cubin"
        file.write_bytes(compiled.asm["cubin"])
        entries[what] = {
            "key": what, "file": file.name, "name": metadata.name, "shared": metadata.shared,
            "num_warps": metadata.num_warps, "num_ctas": metadata.num_ctas,
            "descriptors": fields(compiled), "parameters": parameters(compiled),
            "scratch": metadata.global_scratch_size + metadata.profile_scratch_size,
        }  # fmt: skip

    compile_launches(AbsentGPU(), keep)
    for name in names:
        passes(name, "cpu")[0]()
        print(f"{name}: {len(entries)} kernels by now", flush=True)
    index = {"triton": triton.__version__, "kernels": list(entries.values())}
    (directory / "index.json").write_text(json.dumps(index, indent=1))
    return 0


# ---------------------------------------------------------------- check: a child, one case


class Swap:
    """A compiled kernel that can have the machine code of either compiler. Raises ValueError where it cannot."""

    def __init__(self, compiled: Any, entry: dict[str, Any] | None, directory: Path) -> None:
        from triton.runtime import driver

        if entry is None:
            raise ValueError("not among the cubins")
        if parameters(compiled) != entry["parameters"] or entry["scratch"]:
            raise ValueError(f"other parameters: {parameters(compiled)} here, {entry['parameters']} there")
        packed = entry["num_warps"], entry["num_ctas"], entry["shared"]
        if len(compiled.packed_metadata) != len(packed):
            raise ValueError(f"a launcher that is not known: {compiled.packed_metadata}")
        self.compiled = compiled
        self.ours = compiled.function, compiled.packed_metadata, compiled._run
        device = driver.active.get_current_device()
        code = (directory / entry["file"]).read_bytes()
        self.module, function, *_ = driver.active.utils.load_binary(entry["name"], code, entry["shared"], device)
        launcher = compiled._run
        if fields(compiled) != entry["descriptors"]:  # encode the descriptors as the other code wants them
            meta = compiled.metadata._replace(tensordesc_meta=entry["descriptors"])
            launcher = driver.active.launcher_cls(compiled.src, meta)
        self.theirs = function, packed, launcher

    def to(self, theirs: bool) -> None:
        self.compiled.function, self.compiled.packed_metadata, self.compiled._run = self.theirs if theirs else self.ours


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """For each result the largest difference to b's, relative to the largest of b."""
    return {name: ((a[name].float() - y.float()).abs().max() / y.float().abs().max()).item() for name, y in b.items()}


def compare(found: dict[str, Any], base: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What to say of results beside those of the code made here; "wrong" begins it where they are."""
    import torch

    if all(torch.equal(found[name], base[name]) for name in base):
        return "bitwise the same"
    errors, allowed = differences(found, wanted), differences(base, wanted)
    wrong = [name for name, error in errors.items() if not error <= ALLOWED * allowed[name] + 1e-6]  # NaN too
    if wrong:
        return "wrong: " + ", ".join(f"{name} off by {errors[name]:.1e}, not {allowed[name]:.1e}" for name in wrong)
    return f"the same to rounding, {max(differences(found, base).values()):.1e}"


def say(*what: str) -> None:
    print(json.dumps(what), flush=True)


def child(name: str, directory: Path, skipped: list[str], device: str = "cuda") -> None:
    """Run a case; lines of JSON: ("begin", kernel), (kernel, verdict)."""
    from triton.runtime.jit import JITFunction

    from ...kernels import launching

    index = {entry["key"]: entry for entry in json.loads((directory / "index.json").read_text())["kernels"]}
    made: list[Any] = []
    run = JITFunction.run

    def recording(fn: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(fn, *args, **kwargs)
        if all(compiled is not known for known in made):
            made.append(compiled)
        return compiled

    JITFunction.run = recording
    call, truth = passes(name, device)
    with launching.direct(False):
        base, wanted = call(), truth()
        swaps = []
        labels: Counter[str] = Counter()
        for compiled in list(made):
            label = compiled.src.fn.__name__.strip("_").removesuffix("_kernel")
            labels[label] += 1
            label += f" #{labels[label]}" if labels[label] > 1 else ""
            if label in skipped:
                continue
            try:
                swaps.append((label, Swap(compiled, index.get(key(compiled)), directory)))
            except ValueError as error:
                say(label, f"not run: {error}")
        for label, swap in swaps:
            say("begin", label)
            swap.to(True)
            verdict = compare(call(), base, wanted)
            swap.to(False)
            say(label, verdict)
    say("begin", "all")
    for _, swap in swaps:
        swap.to(True)
    with launching.direct(True):
        call()  # makes the handles
        say("all, by handle", compare(call(), base, wanted))


# ---------------------------------------------------------------- check: the parent


def rows(name: str, command: Callable[[list[str]], list[str]], deadline: float) -> Iterator[tuple[str, str]]:
    """(kernel, verdict) of a case's children, each without the kernels that ended those before it."""
    skipped: list[str] = []
    shown: set[str] = set()
    while True:
        process = subprocess.Popen(command(skipped), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += "\nno time left"
        begun, last = None, ""
        for line in output.splitlines():
            try:
                label, verdict = json.loads(line)
            except (ValueError, TypeError):  # of the kernels' own output
                last = line.strip() or last
                continue
            begun = verdict if label == "begin" else None
            if label != "begin" and label not in shown:
                shown.add(label)
                yield label, verdict
        if process.returncode == 0:
            return
        yield begun or "the case", f"ended {process.returncode}: {last[-100:]}"
        if begun is None or begun in ("all", *skipped) or time.monotonic() > deadline:
            return
        skipped.append(begun)


def check(directory: Path, seconds: float, names: list[str]) -> int:
    """How many kernels, or cases, were not right."""
    deadline = time.monotonic() + seconds
    index = json.loads((directory / "index.json").read_text())
    print(f"{len(index['kernels'])} kernels by triton {index['triton']}", flush=True)
    module = [sys.executable, "-P", "-m", __spec__.name if __spec__ else __name__]
    n_bad = 0
    for name in names:

        def command(skipped: list[str], name: str = name) -> list[str]:
            return [*module, "child", str(directory), name, json.dumps(skipped)]

        for label, verdict in rows(name, command, deadline):
            n_bad += not verdict.startswith(("bitwise", "the same"))
            print(f"{name:20} {label:36} {verdict}", flush=True)
    return n_bad


def main() -> int:
    what, directory, *rest = sys.argv[1:]
    if what == "build":
        return build(Path(directory).resolve(), rest or list(CASES))
    if what == "child":
        child(rest[0], Path(directory), json.loads(rest[1]))
        return 0
    return check(Path(directory).resolve(), float(rest[0]) if rest else SECONDS, list(CASES)) > 0


if __name__ == "__main__":
    sys.exit(main())
