"""Operations of a plain CPU: as accurate as the oracle in both passes, and in what the oracle alone can do, the oracle.

The table of test_promises.py has every function on a plain CPU too; here are the layouts and derivatives of plain.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.kernels import plain, reference
from rooflight.kernels.cross_entropy import RowOptions

Outputs = Tensor | tuple[Tensor, ...]


def _norm(x: Tensor, weight: Tensor | None, residual: Tensor | None = None, offset: float = 0.0) -> Outputs:
    return plain.rms_norm(x, weight, 1e-3, residual=residual, weight_offset=offset)


def _oracle_norm(x: Tensor, weight: Tensor | None, residual: Tensor | None = None, offset: float = 0.0) -> Outputs:
    return reference.rms_norm(x, weight, 1e-3, residual=residual, weight_offset=offset)


def _cosines(shape: tuple[int, ...]) -> Tensor:
    return torch.cos(torch.arange(math.prod(shape)).view(shape) / 7)


def _rope(**options: Any) -> tuple[Callable[..., Outputs], Callable[..., Outputs]]:
    options = {"interleaved": False, "positions": None} | options
    cos, sin = _cosines((12, 6)), _cosines((13, 6))[1:]

    def turned(rope: Callable[..., Outputs]) -> Callable[..., Outputs]:
        return lambda q, k: rope(q, k, cos, sin, **options)

    return turned(plain.rope), turned(reference.rope)


def _strided_heads(*shape: int) -> Tensor:
    """(B, H, T, D), a part of a product's rows."""
    B, H, T, D = shape
    return torch.randn(B, T, 2 * H * D)[..., H * D :].unflatten(-1, (H, D)).transpose(1, 2)


# what each is there for: a row alone, rows of heads that are strided, a norm's sum that is read again, one that is not,
# no weight, tables for each sequence, features that are not turned, more heads than keys' heads, both layouts of heads
CASES: dict[str, tuple[Callable[..., Outputs], Callable[..., Outputs], tuple[Any, ...]]] = {
    "norm": (_norm, _oracle_norm, (torch.randn(3, 5, 24), torch.randn(24))),
    "norm of a row": (_norm, _oracle_norm, (torch.randn(24), torch.randn(24))),
    "norm of strided heads": (_norm, _oracle_norm, (_strided_heads(2, 3, 4, 8), torch.randn(8))),
    "norm without a weight": (lambda x: _norm(x, None), lambda x: _oracle_norm(x, None), (torch.randn(7, 10),)),
    "norm of a sum": (
        lambda x, w, r: _norm(x, w, r, 1.0),
        lambda x, w, r: _oracle_norm(x, w, r, 1.0),
        (torch.randn(3, 5, 24), torch.randn(24), torch.randn(3, 5, 24)),
    ),
    "norm of a sum, y alone": (
        lambda x, w, r: _norm(x, w, r)[0],
        lambda x, w, r: _oracle_norm(x, w, r)[0],
        (torch.randn(5, 24), torch.randn(24), torch.randn(24, 5).T),
    ),
    "norm of a sum, the sum alone": (
        lambda x, r: _norm(x, None, r)[1],
        lambda x, r: _oracle_norm(x, None, r)[1],
        (torch.randn(5, 24), torch.randn(5, 24)),
    ),
    "rope": (*_rope(), (_strided_heads(3, 4, 9, 16), torch.randn(3, 2, 9, 16))),
    "rope, one sequence": (*_rope(), (_strided_heads(1, 4, 9, 12), _strided_heads(1, 1, 9, 12))),
    "rope, interleaved, by positions": (
        *_rope(interleaved=True, positions=torch.tensor([3, 1, 11, 0])),
        (_strided_heads(2, 2, 4, 16), _strided_heads(2, 2, 4, 16)),
    ),
    "rope, positions by sequence": (
        *_rope(positions=torch.tensor([[3, 1, 11], [0, 1, 2]])),
        (_strided_heads(2, 3, 3, 16), torch.randn(2, 3, 3, 16)),
    ),
}


def _leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In x's layout."""
    like = torch.empty_strided(x.shape, x.stride(), dtype=dtype) if x.is_contiguous() else x.to(dtype)
    return like.copy_(x).detach().requires_grad_()


def _run(function: Callable[..., Outputs], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [_cosines(y.shape).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_the_oracle(name: str, dtype: torch.dtype) -> None:
    function, oracle, given = CASES[name]
    inputs = [_leaf(x, dtype) for x in given]
    truth = _run(oracle, [_leaf(x, torch.float64) for x in (y.detach() for y in inputs)])
    for ours, eager, exact in zip(_run(function, inputs), _run(oracle, inputs), truth, strict=True):
        assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
        error, allowed = ((y.double() - exact).abs().max() for y in (ours, eager))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_its_second_derivatives_are_right(name: str) -> None:
    function, _, given = CASES[name]
    inputs = [_leaf(x[:1] if x.dim() == 4 and "positions by" not in name else x, torch.float64) for x in given]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_several_gradients_at_once(name: str) -> None:
    """As jacobian(vectorize=True) and gradcheck ask for them, and under vmap."""
    function, _, given = CASES[name]
    inputs = [_leaf(x, torch.float32) for x in given]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.stack([_cosines(y.shape), torch.ones(y.shape)]) for y in outputs]

    def gradients(dy: tuple[Tensor, ...], **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, dy, retain_graph=True, **options)

    apart = [gradients(tuple(dy[i] for dy in upstream)) for i in range(2)]
    batches = gradients(tuple(upstream), is_grads_batched=True), torch.func.vmap(gradients)(tuple(upstream))
    for batch in batches:
        torch.testing.assert_close(batch, tuple(torch.stack(pair) for pair in zip(*apart, strict=True)))


def test_a_sum_may_depend_on_what_is_added_to_it() -> None:
    """The second derivative must not find the way from one input to the other."""
    x, weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: _norm(x.sin(), weight, x.cos() * x.sin()), (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own forward-mode derivatives
def test_transforms_and_compilers_get_the_oracle() -> None:
    x, weight = torch.randn(3, 4, 8), torch.randn(8)
    torch.testing.assert_close(torch.func.vmap(lambda row: _norm(row, weight))(x), _oracle_norm(x, weight))
    _, tangent = torch.func.jvp(lambda x: _norm(x, weight), (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: _oracle_norm(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)
    traced = torch.compile(lambda x: _norm(x, weight), fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(traced, _oracle_norm(x, weight))


def test_rotated_heads_keep_their_layout() -> None:
    q, k = _strided_heads(3, 4, 5, 8), torch.randn(3, 4, 5, 8)
    turned = plain.rope(q, k, torch.ones(5, 4), torch.zeros(5, 4), interleaved=False, positions=None)
    assert [y.stride() for y in turned] == [torch.empty_like(y).stride() for y in (q, k)]
    assert all(map(torch.equal, turned, (q, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [(-100, 0.0, 0.0), (-100, 0.0, 0.1), (-100, 5.0, 0.0), (-100, 0.0, 0.0, 0.1), (-100, 0.0, 0.1, 0.1, torch.rand(9))],
    ids=["plain", "z", "softcap", "smoothed", "weighted"],
)
def test_losses_and_gradients_at_once_are_those_apart(options: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Written over the logits, with a row that does not count, and columns past V."""
    logits, target, dloss = torch.randn(6, 16).to(dtype), torch.tensor([3, 8, -100, 0, 1, 1]), torch.rand(6)
    logits[2, 4] = math.inf
    chosen = RowOptions(*options)
    losses, lse = plain.row_losses(logits[:, :9], target, chosen)
    apart = plain.row_gradients(dloss, logits[:, :9], target, lse, chosen, torch.empty_like(logits))
    together, gradients = plain.row_losses_and_gradients(dloss, logits[:, :9], target, chosen, logits)
    torch.testing.assert_close(together, losses)
    torch.testing.assert_close(gradients, apart)
    assert gradients.data_ptr() == logits.data_ptr()
    assert not gradients[:, 9:].any()
    assert not gradients[2].any()
