"""What each public function promises whatever the call, as docs/semantics.md shows it, and the checks of it.

`check` holds a function to its row on one path, on the first of its cases in promises.py: the dtype of what it returns,
the same bits twice, and one torch.export that serves every length. Run as a script, outside the interpreter, it does so
on the plain CPU, and holds the model to the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from rooflight import kernels
from rooflight.kernels import dispatch
from rooflight.kernels.attention import paths
from rooflight.model import ModelConfig, Transformer
from support.promises import ATTENTION, CASES, CONSTANT, Case, Inputs, as_tuple, is_float, served

IEEE = "inputs' dtype in, fp32 out; fp32 in IEEE, or TF32 by torch's switch"
GLUON = "yes; Gluon backward: see `rooflight bench paths`"


@dataclass(frozen=True)
class Promise:
    """products, sums, layout: text.  result: for each output of the first case whose dtype it has, or "fp32".

    export: where torch.export serves every length: "yes", or "plain CPU" alone.
    """

    products: str
    sums: str
    result: tuple[str, ...]
    layout: str
    repeats: str = "yes"
    export: str = "yes"

    @property
    def text(self) -> str:
        dtypes = dict.fromkeys(f"{of}'s dtype" for of in self.result if of != "fp32")
        return ", ".join((*dtypes, self.layout)) if dtypes else "fp32"


FUNCTIONS = {
    "flash_attention": Promise(IEEE, "fp32", ("q",), "in q's memory layout; log-sum-exp fp32", GLUON, "plain CPU"),
    "flash_attention_varlen": Promise(IEEE, "fp32", ("q", "fp32"), "in q's memory layout; log-sum-exp fp32", GLUON,
                                      "plain CPU"),
    "rope": Promise("fp32", "none", ("q", "k"), "in their memory layouts"),
    "rope_qkv": Promise("fp32", "none", ("qkv",) * 3, "no layout promised"),
    "rms_norm": Promise("fp32", "fp32", ("x", "x"), "contiguous; x + residual in the promoted dtype"),
    "swiglu": Promise("fp32", "none", ("gate",), "contiguous"),
    "gelu": Promise("fp32", "none", ("x",), "contiguous"),
    "fp8_linear": Promise("e4m3 or e5m2 in, fp32 sums", "fp32", ("x",), "contiguous", "as `torch.matmul`"),
    "cross_entropy": Promise("fp32", "fp32", ("fp32",), ""),
    "linear_cross_entropy": Promise("`torch.matmul`'s: inputs' dtype in, fp32 sums", "fp32", ("fp32",), "",
                                    "as `torch.matmul`"),
}  # fmt: skip


def table() -> str:
    """The first table of docs/semantics.md."""
    titles = ("function", "products", "sums and statistics", "result", "twice the same to the bit",
              "`torch.export`, dynamic length")  # fmt: skip
    rows = [(f"`{f}`", p.products, p.sums, p.text, p.repeats, p.export) for f, p in FUNCTIONS.items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, ("---",) * len(titles), *rows)]
    return "\n".join(lines) + "\n"


def _case(function: str) -> Case:
    return next(case for case in CASES if case.function == function)


def _on(inputs: Inputs, device: Any, dtype: torch.dtype | None = None) -> Inputs:
    def move(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if is_float(x) and name not in CONSTANT else x.dtype)

    return {name: move(name, x) for name, x in inputs.items()}


def check(function: str, device: Any = "cpu") -> None:
    """Raise AssertionError unless this path keeps the function's row of the table; its export apart."""
    case, op = _case(function), getattr(kernels, function)
    inputs = _on(case.build(5), device, torch.bfloat16)
    leaves = [x.requires_grad_() for n, x in inputs.items() if is_float(x) and n not in CONSTANT]
    runs = []
    for _ in range(2):
        outputs = as_tuple(op(**inputs, **case.options))
        runs.append((*outputs, *torch.autograd.grad(sum(o.float().sum() for o in outputs), leaves)))
    found = tuple(o.dtype for o in outputs)
    expected = tuple(torch.float32 if of == "fp32" else inputs[of].dtype for of in FUNCTIONS[function].result)
    assert found == expected, f"{function}: returns {found}, promises {expected}"
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), f"{function}: other bits the second time"


class _Called(nn.Module):
    """A function of a dictionary of inputs, as a module: torch.export takes no function."""

    def __init__(self, call: Callable[[Inputs], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, inputs: Inputs) -> Any:
        return self.call(inputs)


def check_export(build: Callable[[int], Inputs], call: Callable[[Inputs], Any], sizes: tuple[int, ...]) -> None:
    """Raise unless one torch.export of call(build(n)) serves every n of `sizes`, at least two, none of them 1."""
    shortest, longer = build(sizes[0]), build(sizes[1])

    def dynamic(x: Any, y: Any) -> Any:
        return {i: Dim.AUTO for i in range(x.dim()) if x.shape[i] != y.shape[i]} if isinstance(x, Tensor) else None

    shapes = {name: dynamic(x, longer[name]) for name, x in shortest.items()}
    exported = torch.export.export(_Called(call), (shortest,), dynamic_shapes=(shapes,)).module()
    for n in sizes:
        torch.testing.assert_close(exported(build(n)), call(build(n)))


def check_function_exports(function: str, device: Any = "cpu") -> None:
    """check_export of the function's first case."""
    case = _case(function)
    op = getattr(kernels, function)
    sizes = tuple(n for n in case.sizes if n > 1)
    check_export(lambda n: _on(case.build(n), device), lambda inputs: op(**inputs, **case.options), sizes)


def check_paths() -> None:
    """Raise AssertionError where `rooflight bench paths` says otherwise than what serves a call on the plain CPU."""
    for case in CASES:
        inputs = case.build(5)
        if case.function not in ATTENTION or "mask" in inputs:
            continue
        used = {"packed": "cu_seqlens_q" in inputs, "sinks": "sinks" in inputs, "alibi": "alibi_slopes" in inputs}
        used |= dict.fromkeys(case.options, True)
        options = frozenset(name for name, is_used in used.items() if is_used and name in paths.OPTIONS)
        path = paths.decide(paths.Call("forward", "cpu", 8, torch.float32, options)).path
        T, S = inputs["q"].shape[-2], inputs["k"].shape[-2]  # no Call knows them, nor of the log-sum-exp
        apart = case.options.get("return_lse") or S == 0 or (case.options.get("causal", True) and T not in (1, S))
        expected = "sdpa" if path == "sdpa" and not apart else "operator"
        assert served(case) == expected, f"{case.id}: served by {served(case)}, paths.py says {path}"


def check_model() -> None:
    """Logits and loss of one exported model, and of one compiled model with its gradients, at several lengths."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(61, 24, 1, 4, n_kv_head=2, d_model=32, d_ff=48, window=5))

    def build(n: int) -> Inputs:
        tokens = torch.arange(2 * n).view(2, n) % 61
        return {"tokens": tokens, "targets": tokens.flip(1)}

    check_export(build, lambda inputs: (model(inputs["tokens"]), model(**inputs)), (5, 9, 24))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (5, 9, 1, 24):
        losses = [forward(**build(n)) for forward in (compiled, model)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
        torch.testing.assert_close(*gradients)


def main() -> None:
    assert not dispatch.INTERPRETED
    torch.set_num_threads(1)
    for function in FUNCTIONS:
        check(function)
        check_function_exports(function)
    check_paths()
    check_model()


if __name__ == "__main__":
    print(table(), end="") if sys.argv[1:] == ["table"] else main()
