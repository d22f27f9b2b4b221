"""The one rule that judges every kernel, forward and each gradient.

The largest error against the oracle in fp64 may be at most twice that of eager PyTorch in the same dtype (three times
for a gradient), plus a few units in the last place of the oracle's largest value. The root-mean-square error obeys the
same rule with half a unit, so that a small bias, which hides below the largest rounding error in bf16, shows too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
ULPS = 2.0
RMS_ULPS = 0.5
RMS_ELEMENTS = 64  # over fewer the mean is not one: eager's may be small by luck

Op = Callable[..., Any]


def assert_as_accurate(name: str, actual: Tensor, eager: Tensor, exact: Tensor, factor: float = FORWARD_FACTOR) -> None:
    """Fail unless `actual` obeys the rule: `eager` has the same dtype, `exact` is the fp64 truth."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, expected {eager.dtype}"
    if actual.numel() == 0:
        return
    truth, ours = exact.double(), actual.double()
    finite = truth.isfinite()
    assert torch.equal(ours[~finite], truth[~finite]), f"{name}: infinities differ from the oracle's"
    truth, ours, theirs = truth[finite], ours[finite], eager.double()[finite]
    if truth.numel() == 0:
        return
    error, eager_error = (ours - truth).abs(), (theirs - truth).abs().nan_to_num(0.0, 0.0)
    assert error.isfinite().all(), f"{name}: {int((~error.isfinite()).sum())} of {error.numel()} elements not finite"
    eps = torch.finfo(actual.dtype).eps
    for measure, size, ulps in (("largest", _largest, ULPS), ("rms", _rms, RMS_ULPS)):
        bound = factor * size(eager_error) + ulps * eps * size(truth)
        assert size(error) <= bound or (size is _rms and truth.numel() < RMS_ELEMENTS), (
            f"{name}: {measure} error {size(error):.3e} > {bound:.3e} = {factor:g} x {size(eager_error):.3e}"
            f" (eager {actual.dtype}) + {ulps:g} ulps at scale {size(truth):.3e}"
        )


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def gaussian(output: Tensor, generator: torch.Generator) -> Tensor:
    """A dense random gradient for an output."""
    noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return noise.to(output.device, output.dtype)


def run(
    op: Op, inputs: Mapping[str, Any], grads: Callable[[tuple[Tensor, ...]], list[Tensor]] | None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs of op(**inputs), and the gradient of each of its floating inputs that require one."""
    given = {n: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    result = op(**given)
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    if grads is None or not leaves:
        return outputs, {}
    given_grads = [(out, g) for out, g in zip(outputs, grads(outputs), strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in given_grads], list(leaves.values()), [g for _, g in given_grads], allow_unused=True
    )
    gradients = dict(zip(leaves, found, strict=True))
    missing = [name for name, g in gradients.items() if g is None]
    assert not missing, f"no gradient for {missing}"
    return outputs, gradients


def judge(
    op: Op,
    oracle: Op,
    inputs: Mapping[str, Any],
    *,
    eager: Op | None = None,
    frozen: tuple[str, ...] = (),
    backward: bool = True,
    grad: Callable[[Tensor, torch.Generator], Tensor] = gaussian,
    seed: int = 0,
    **options: Any,
) -> None:
    """Judge op(**inputs, **options) and its gradients against oracle in fp64.

    inputs: tensors by parameter name (None and non-tensors pass through), every floating one differentiated unless
    named in `frozen`; strides are kept.  eager: what shows PyTorch's own error in the inputs' dtype, the oracle by
    default.  grad: makes the gradient of an output, to try layouts.
    """

    def prepare(convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        prepared = {}
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                x = convert(x.detach()).requires_grad_(backward and name not in frozen)
            prepared[name] = x
        return prepared

    grad_outputs: list[Tensor] = []

    def draw(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        grad_outputs.extend(grad(out, generator) for out in outputs)
        return grad_outputs

    def reuse(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [g.to(out.dtype) for g, out in zip(grad_outputs, outputs, strict=True)]

    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    ours, our_grads = run(lambda **k: op(**k, **options), prepare(lambda x: x), draw)
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name}: the caller's tensor was written"
    theirs, their_grads = run(lambda **k: (eager or oracle)(**k, **options), prepare(lambda x: x), reuse)
    exact, exact_grads = run(lambda **k: oracle(**k, **options), prepare(lambda x: x.double()), reuse)
    assert len(ours) == len(exact)
    for i, (a, e, t) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_as_accurate(f"output {i}", a.detach(), e.detach(), t.detach())
    for name, g in our_grads.items():
        assert_as_accurate(f"d{name}", g, their_grads[name], exact_grads[name], GRADIENT_FACTOR)
