"""One table of inputs for every path: plain CPU and interpreter or GPU, eager and compiled.

A case is a call of a public function that one path once answered otherwise than the docstring. `check` judges it
against the oracle in fp64, output and gradients, by the one rule of tolerance.py, and looks at the memory layout. Run
as a script, outside the interpreter, it does so on the plain CPU. docs/semantics.md shows the table.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from rooflight import kernels
from rooflight.kernels import dispatch, reference
from support.tolerance import judge

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """name: what is special of the call.  build(size): its inputs; one compiled function serves all sizes in turn.

    plain: what serves it on a plain CPU: "sdpa", "operator" (rooflight's own, in eager products) or "torch" (the
    oracle, operation by operation).  layout: the input in whose layout each output is, None for contiguous, "any".
    """

    function: str
    name: str
    build: Callable[[int], Inputs]
    plain: str
    sizes: tuple[int, ...] = (5,)
    layout: tuple[str | None, ...] = (None,)
    options: Inputs = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    fast: bool = False  # compiled in the fast suite too

    @property
    def id(self) -> str:
        return f"{self.function}: {self.name}"


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def _tokens_first(x: Tensor) -> Tensor:
    """(B, heads, T, D) over memory in the order (B, T, heads, D), as a projection gives it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _dense(T: int, S: int, *, B: int = 1, H: int = 2, K: int = 1, D: int = 8) -> Inputs:
    q, k, v = _draw(B, H, T, D), _draw(B, K, S, D, seed=1), _draw(B, K, S, D, seed=2)
    return {"q": _tokens_first(q), "k": _tokens_first(k), "v": _tokens_first(v)}


def _huge(T: int, S: int) -> Inputs:
    """q k^T = 40 * 40 * 64 passes fp16's 65,504; with the scale it is 12,800."""
    full = [torch.full((1, 1, n, 64), 40.0, dtype=torch.float16) for n in (T, S)]
    return {"q": full[0], "k": full[1], "v": _draw(1, 1, S, 64, dtype=torch.float16)}


def _packed(lengths: Sequence[int], padding: int) -> Inputs:
    total, ends = sum(lengths) + padding, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "q": _draw(total, 2, 8), "k": _draw(total, 1, 8, seed=1), "v": _draw(total, 1, 8, seed=2),
        "cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 9, "max_seqlen_k": 9,
    }  # fmt: skip


def _slopes(*shape: int) -> Inputs:
    return {"alibi_slopes": _draw(*shape).abs()}


def _turned(B: int, H: int, K: int, T: int, D: int = 8) -> Inputs:
    angle = torch.arange(float(T))[:, None] / torch.arange(1.0, 4.0)
    q, k = _tokens_first(_draw(B, H, T, D)), _tokens_first(_draw(B, K, T, D, seed=1))
    return {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin()}


def _joined(n: int) -> Inputs:
    rotation = {name: x for name, x in _turned(1, 1, 1, n).items() if name in ("cos", "sin")}
    return {"qkv": _draw(2, n, 40), **rotation, "n_head": 3, "n_kv_head": 1}


def _labelled(x: Tensor, *, V: int = 9, **more: Any) -> Inputs:
    target = torch.arange(x.shape[:-1].numel()).view(x.shape[:-1]) % V
    target.view(-1)[1::3] = -100
    return {**more, "target": target}


def _logits(*shape: int) -> Inputs:
    x = _draw(*shape, 9)
    return {"logits": x, **_labelled(x)}


def _classes() -> Inputs:
    return {"class_weight": torch.arange(9.0)}


def _projected(*shape: int) -> Inputs:
    x = _draw(*shape, 6)
    return {"x": x, "weight": _draw(9, 6, seed=1), **_labelled(x)}


def _transposed(*shape: int, names: tuple[str, ...]) -> Inputs:
    return {name: _draw(*shape, seed=i).transpose(0, 1) for i, name in enumerate(names)}


ATTENTION = ("flash_attention", "flash_attention_varlen")
LSE = {"return_lse": True}
DENSE: dict[str, Any] = {"function": "flash_attention", "layout": ("q",)}
PACKED: dict[str, Any] = {"function": "flash_attention_varlen", "plain": "operator"}
WITH_LSE = {"layout": ("q", "any")}

CASES = (
    Case(**DENSE, name="causal, several lengths", build=lambda n: _dense(n, n), plain="sdpa", sizes=(5, 8, 1),
         fast=True),
    Case(**DENSE, name="not causal", build=lambda n: _dense(n, n + 2), plain="sdpa", options={"causal": False}),
    Case(**DENSE, name="one query", build=lambda n: _dense(1, n), plain="sdpa"),
    Case(**DENSE, name="more keys than queries", build=lambda n: _dense(n, n + 4), plain="operator", sizes=(5, 8)),
    Case(**DENSE, name="more queries than keys", build=lambda n: _dense(n + 4, n), plain="operator"),
    Case(**DENSE, name="window", build=lambda n: _dense(n, n), plain="operator", options={"window": 3}),
    Case(**DENSE, name="window open on one side", build=lambda n: _dense(n, n), plain="operator",
         options={"causal": False, "window": (None, 2)}),
    Case(**DENSE, name="softcap", build=lambda n: _dense(n, n), plain="operator", options={"softcap": 2.0}),
    Case(**DENSE | WITH_LSE, name="sinks, log-sum-exp", plain="operator", options=LSE, sizes=(5, 8, 1),
         build=lambda n: _dense(n, n) | {"sinks": _draw(2)}),
    Case(**DENSE, name="ALiBi", build=lambda n: _dense(n, n + 2) | _slopes(2), plain="operator", sizes=(5, 8, 1),
         frozen=("alibi_slopes",)),
    Case(**DENSE, name="scores past fp16, window", build=lambda n: _huge(n, n), plain="operator",
         options={"window": 3}),
    Case(**DENSE, name="scores past fp16, more keys", build=lambda n: _huge(n, n + 3), plain="operator"),
    Case(**DENSE | WITH_LSE, name="scores past fp16, log-sum-exp", build=lambda n: _huge(n, n), plain="operator",
         options=LSE),
    Case(**DENSE, name="scores past fp16", build=lambda n: _huge(n, n), plain="sdpa"),
    Case(**DENSE | {"layout": ("any",)}, name="values of another width", plain="operator", options={"window": 3},
         build=lambda n: _dense(n, n) | {"v": _draw(1, 1, n, 12)}),
    Case(**DENSE, name="mask", build=lambda n: _dense(n, n) | {"mask": _draw(n, n) > 0}, plain="torch"),
    Case(**DENSE, name="no batch", build=lambda n: _dense(n, n, B=0), plain="sdpa"),
    Case(**DENSE, name="no tokens", build=lambda n: _dense(0, 0), plain="operator"),
    Case(**DENSE | WITH_LSE, name="no queries", build=lambda n: _dense(0, n), plain="operator", options=LSE),
    Case(**DENSE | WITH_LSE, name="no keys", build=lambda n: _dense(n, 0), plain="operator", options=LSE),
    Case(**PACKED, name="padding past the last sequence", build=lambda n: _packed((n, 0, 4), 7), sizes=(5, 8),
         options=LSE, layout=("q", "any"), fast=True),
    Case(**PACKED, name="padding, sinks, window", build=lambda n: _packed((n, 4), 3) | {"sinks": _draw(2)},
         options={"window": 3}),
    Case(**PACKED, name="padding, ALiBi by sequence", build=lambda n: _packed((n, 4), 3) | _slopes(2, 2),
         frozen=("alibi_slopes",)),
    Case(**PACKED, name="no sequence, padding alone", build=lambda n: _packed((), n),
         frozen=("q", "k", "v")),  # the oracle has nothing to differentiate
    Case(**PACKED, name="no tokens", build=lambda n: _packed((0, 0), 0)),
    Case("rope", "heads by token", lambda n: _turned(2, 3, 1, n), "torch", (5, 8), ("q", "k"), frozen=("cos", "sin")),
    Case("rope", "no batch", lambda n: _turned(0, 3, 1, n), "torch", layout=("q", "k"), frozen=("cos", "sin")),
    Case("rope", "no tokens", lambda n: _turned(2, 3, 1, 0), "torch", layout=("q", "k"), frozen=("cos", "sin")),
    Case("rope", "no key heads", lambda n: _turned(2, 3, 0, n), "torch", layout=("q", "k"), frozen=("cos", "sin")),
    Case("rope_qkv", "several lengths", _joined, "torch", (5, 8), ("any",) * 3, frozen=("cos", "sin")),
    Case("rms_norm", "transposed, residual", lambda n: _transposed(n, 3, 8, names=("x", "residual"))
         | {"weight": _draw(8)}, "torch", (5, 8), (None, None)),
    Case("rms_norm", "no rows", lambda n: {"x": _draw(0, 8), "weight": _draw(8)}, "torch"),
    Case("swiglu", "transposed", lambda n: _transposed(n, 3, 8, names=("gate", "up")), "torch", (5, 8)),
    Case("swiglu", "joined, transposed", lambda n: _transposed(n, 3, 8, names=("gate",)), "torch"),
    Case("swiglu", "no rows", lambda n: {"gate": _draw(0, 8), "up": _draw(0, 8)}, "torch"),
    Case("swiglu", "no columns", lambda n: {"gate": _draw(n, 0), "up": _draw(n, 0)}, "torch"),
    Case("gelu", "transposed", lambda n: _transposed(n, 3, 8, names=("x",)), "torch", (5, 8)),
    Case("gelu", "no rows", lambda n: {"x": _draw(0, 8)}, "torch"),
    Case("fp8_linear", "several lengths", lambda n: {"x": _draw(n, 16, 32), "weight": _draw(48, 32)}, "torch", (5, 8)),
    Case("fp8_linear", "transposed", lambda n: _transposed(16, n, 32, names=("x",)) | {"weight": _draw(32, 16).T},
         "torch"),
    Case("fp8_linear", "no rows", lambda n: {"x": _draw(0, 32), "weight": _draw(16, 32)}, "torch"),
    Case("cross_entropy", "several lengths", _logits, "torch", (5, 8, 1), options={"z_loss": 0.1}),
    Case("cross_entropy", "smoothed labels, weighted classes", lambda n: _logits(n) | _classes(), "torch", (5, 8),
         options={"label_smoothing": 0.1, "z_loss": 0.1}, frozen=("class_weight",)),
    Case("cross_entropy", "no rows", lambda n: _logits(0), "torch"),
    Case("cross_entropy", "no rows, none", lambda n: _logits(2, 0), "torch", options={"reduction": "none"}),
    Case("linear_cross_entropy", "several lengths", _projected, "operator", (5, 8, 1), options={"softcap": 3.0}),
    Case("linear_cross_entropy", "smoothed labels, weighted classes", lambda n: _projected(n) | _classes(), "operator",
         (5, 8), options={"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}, frozen=("class_weight",)),
    Case("linear_cross_entropy", "smoothed labels, none", lambda n: _projected(n, 2), "operator", (5, 8),
         options={"label_smoothing": 0.1, "reduction": "none"}),
    Case("linear_cross_entropy", "weighted classes, recomputed", lambda n: _projected(n) | _classes(), "operator",
         options={"keep_gradients": False}, frozen=("class_weight",)),
    Case("linear_cross_entropy", "no rows", lambda n: _projected(0), "operator"),
    Case("linear_cross_entropy", "no rows, sum, recomputed", lambda n: _projected(0), "operator",
         options={"reduction": "sum", "keep_gradients": False}),
    Case("linear_cross_entropy", "no rows, none", lambda n: _projected(0, 3), "operator",
         options={"reduction": "none"}),
)  # fmt: skip


class _Operators(TorchDispatchMode):
    """Whether one of rooflight's ran."""

    ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran |= func.namespace == "rooflight"
        return func(*args, **(kwargs or {}))


def served(case: Case) -> str:
    """Which of Case.plain's ways computes on this path."""
    functional = torch.nn.functional
    sdpa = mock.patch.object(functional, "scaled_dot_product_attention", wraps=functional.scaled_dot_product_attention)
    with sdpa as called, _Operators() as operators, torch.no_grad():
        getattr(kernels, case.function)(**case.build(case.sizes[0]), **case.options)
    return "operator" if operators.ran else "sdpa" if called.called else "torch"


def _without_overflow(q: Tensor, **rest: Any) -> Any:
    """The oracle for _huge's inputs: eager PyTorch would pass fp16's range, and show no error of its own."""
    return reference.flash_attention(q / 16, scale=16 * q.shape[-1] ** -0.5, **rest)


CONSTANT = ("cos", "sin", "class_weight", "alibi_slopes")


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(case: Case, device: Any = "cpu", *, compiled: bool = False, dynamic: bool | None = None) -> None:
    """Raise AssertionError unless this path keeps the promise for every size of the case.

    dynamic: torch.compile's; True makes every size of the first call a symbol, heads and features too.
    """
    op = getattr(kernels, case.function)
    if compiled:
        torch._dynamo.reset()
        op = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    oracle = getattr(reference, case.function)
    for size in case.sizes if compiled else case.sizes[:1]:
        inputs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in case.build(size).items()}
        huge = case.function == "flash_attention" and inputs["q"].dtype == torch.float16
        if not (huge and compiled) and size > 1:
            # where all keys are alike dq and dk are exactly 0, against which no rounding is to be measured
            frozen = (*case.frozen, "q", "k") if huge else case.frozen
            judge(op, oracle, inputs, eager=_without_overflow if huge else None, frozen=frozen, **case.options)
        leaves = [x.requires_grad_() for n, x in inputs.items() if is_float(x) and n not in CONSTANT]
        outputs, expected = (as_tuple(f(**inputs, **case.options)) for f in (op, oracle))
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
        assert all(g.isfinite().all() for g in gradients), f"{size}: a gradient is not finite"
        if size == 1:  # nor where there is one key alone
            torch.testing.assert_close(outputs, expected)
            torch.testing.assert_close(gradients, torch.autograd.grad(sum(e.sum() for e in expected), leaves))
        for out, of in zip(outputs, case.layout, strict=True):
            if of != "any" and out.numel():
                alike = torch.empty_like(inputs[of]) if of else torch.empty(out.shape)
                assert out.stride() == alike.stride(), f"{size}: strides {out.stride()}, expected {alike.stride()}"


def _inputs_of(function: str) -> Inputs:
    return next(case for case in CASES if case.function == function).build(5)


PARAMETER = torch.nn.Parameter(torch.tensor(0.5))
NO_NUMBERS = (PARAMETER, torch.tensor(0.5), True, None, "1")
NUMBERS = {
    "flash_attention": ("scale", "softcap"), "flash_attention_varlen": ("scale", "softcap"),
    "rms_norm": ("eps", "weight_offset"), "cross_entropy": ("z_loss", "label_smoothing"),
    "linear_cross_entropy": ("z_loss", "softcap", "label_smoothing"),
}  # fmt: skip
INTEGERS = {
    "flash_attention_varlen": ("max_seqlen_q", "max_seqlen_k"), "cross_entropy": ("ignore_index",),
    "linear_cross_entropy": ("ignore_index",),
}  # fmt: skip
FLAGS = {
    "flash_attention": ("causal", "return_lse"), "flash_attention_varlen": ("causal", "return_lse"),
    "rope": ("interleaved",), "linear_cross_entropy": ("keep_gradients",),
}  # fmt: skip
OPTIONAL = {
    "scale",
    "weight",
    "up",
    "mask",
    "residual",
    "sinks",
    "positions",
    "keep_gradients",
    "class_weight",
    "alibi_slopes",
}  # None is a choice
TENSORS = {
    "flash_attention": ("q", "k", "v", "sinks", "mask", "alibi_slopes"),
    "flash_attention_varlen": ("q", "k", "v", "sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k"),
    "rope": ("q", "k", "cos", "sin", "positions"), "rope_qkv": ("qkv", "cos", "sin", "positions"),
    "rms_norm": ("x", "weight", "residual"), "swiglu": ("gate", "up"),
    "gelu": ("x",), "fp8_linear": ("x", "weight"), "cross_entropy": ("logits", "target", "class_weight"),
    "linear_cross_entropy": ("x", "weight", "target", "class_weight"),
}  # fmt: skip
WINDOWS = (2.0, True, "3", torch.tensor(3), (3, -1), (True, 2), (1.5, 2), (1, 2, 3), -1)


def refusals() -> list[tuple[str, str, Any]]:
    """(function, argument, value) of what every path refuses with a ValueError that begins with the argument's name."""
    found: list[tuple[str, str, Any]] = []
    for table, values in (
        (NUMBERS, NO_NUMBERS), (INTEGERS, (*NO_NUMBERS, 1.0)), (FLAGS, ("yes", 1, None, torch.tensor(True))),
        (TENSORS, ([1.0, 2.0], None, b"x")),
    ):  # fmt: skip
        for function, names in table.items():
            found += [(function, n, x) for n in names for x in values if not (x is None and n in OPTIONAL)]
    return found + [(f, "window", w) for f in ATTENTION for w in WINDOWS]


def check_refusals() -> None:
    """Raise AssertionError where a function takes what it ought to refuse, or says so without the argument's name."""
    for function, name, value in refusals():
        try:
            getattr(kernels, function)(**_inputs_of(function) | {name: value})
        except ValueError as error:
            said = str(error)
        else:
            said = "nothing"
        assert said.startswith(f"{name}: expected"), f"{function}({name}={value!r}) says {said}"


def check_numpy_numbers() -> None:
    """Raise AssertionError where a numpy scalar is not the number that it is."""
    import numpy as np

    dense, packed = _dense(5, 5), _packed((5, 4), 0)
    for number in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(kernels.flash_attention(**dense, scale=number), kernels.flash_attention(**dense, scale=0.5))
    windowed = kernels.flash_attention(**dense, window=(np.int64(2), np.int32(0)))
    assert torch.equal(windowed, kernels.flash_attention(**dense, window=2))
    longest = {"max_seqlen_q": np.int64(9)}
    assert torch.equal(kernels.flash_attention_varlen(**packed | longest), kernels.flash_attention_varlen(**packed))


def table() -> str:
    """The table of docs/semantics.md."""
    plain = {"sdpa": "torch's `scaled_dot_product_attention`", "operator": "the operator, eager products",
             "torch": "eager operations"}  # fmt: skip
    lines = ["| function | call | on a plain CPU |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| `{c.function}` | {c.name} | {plain[c.plain]} |" for c in CASES]) + "\n"


def main(what: str) -> None:
    """what: "table" prints it; "eager" checks all, and compiles the fast cases; "compiled" compiles the others."""
    if what == "table":
        print(table(), end="")
        return
    from support.interpreter import poisoned_empty

    assert not dispatch.INTERPRETED
    torch.set_num_threads(1)
    # torch's own, of tracing the autograd.Function of an eager path
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    with poisoned_empty():
        if what == "eager":
            check_refusals()
            check_numpy_numbers()
        for case in CASES:
            try:
                if what == "eager":
                    check(case)
                    assert served(case) == case.plain, f"served by {served(case)}, expected {case.plain}"
                if case.fast == (what == "eager"):
                    check(case, compiled=True)
                    check(case, compiled=True, dynamic=True)
            except Exception as error:
                raise AssertionError(case.id) from error


if __name__ == "__main__":
    main(sys.argv[1])
