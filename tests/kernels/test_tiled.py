"""FlashAttention's algorithms in plain PyTorch, and attention as courses and other libraries call it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.kernels import FlashAttentionFunction, TiledAttentionFunction, flash_attention, reference, tiled
from rooflight.kernels.attention import launch
from support.tolerance import GRADIENT_FACTOR, assert_as_accurate

FUNCTIONS = [FlashAttentionFunction, TiledAttentionFunction]


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: object = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def _both(op: object, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


# three dimensions, one and several tiles, no multiple of one, T != S both ways, a query that sees no key, grouped heads
CASES = {
    "3-D": [(2, 70, 16), (2, 70, 16), (2, 70, 16)],
    "one query": [(2, 1, 8), (2, 65, 8), (2, 65, 8)],
    "more queries than keys": [(1, 2, 80, 8), (1, 2, 66, 8), (1, 2, 66, 8)],
    "grouped": [(1, 4, 65, 8), (1, 2, 130, 8), (1, 2, 130, 8)],
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "case"),
    [(FlashAttentionFunction, case) for case in CASES]
    + [(TiledAttentionFunction, case) for case in CASES if case != "grouped"]  # its k and v have q's heads
    + [("on a plain CPU", "grouped")],
)
def test_apply_agrees_with_the_oracle(
    function: type | str,
    case: str,
    dtype: torch.dtype,
    is_causal: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isinstance(function, str):
        monkeypatch.setattr(launch, "runs_triton", lambda tensor: False)
        function = FlashAttentionFunction
    leaves = _leaves(*CASES[case], dtype=dtype, device=device)

    def oracle(*inputs: Tensor) -> Tensor:
        if inputs[0].dim() == 3:
            return reference.flash_attention(*(x[:, None] for x in inputs), causal=is_causal)[:, 0]
        return reference.flash_attention(*inputs, causal=is_causal)

    dout = torch.randn(CASES[case][0], generator=torch.Generator().manual_seed(1)).to(device)
    ours = _both(lambda *inputs: function.apply(*inputs, is_causal), leaves, dout)
    eager = _both(oracle, leaves, dout)
    exact = _both(oracle, [x.detach().double().requires_grad_() for x in leaves], dout.to(dtype))
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        assert_as_accurate(name, ours[i], eager[i], exact[i], GRADIENT_FACTOR if i else 2.0)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_one_log_sum_exp_is_saved_for_each_query(function: type, device: torch.device) -> None:
    q, k, v = _leaves((3, 20, 8), (3, 24, 8), (3, 24, 8), device=device)
    out = function.apply(q, k, v)  # not causal by default
    (lse,) = (x for x in out.grad_fn.saved_tensors if x.shape == (3, 20))
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / 8**0.5, -1))


def test_the_tiled_loops_are_right_in_fp64_and_run_the_same_twice() -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in _leaves((2, 5, 4), (1, 7, 4), (1, 7, 6)))
    assert torch.autograd.gradcheck(lambda *inputs: TiledAttentionFunction.apply(*inputs, True), (q, k, v))
    out, lse = tiled.tiled_attention(q[:, :0], k, v, True, 1.0)
    assert out.shape == (2, 0, 6)
    assert lse.shape == (2, 0)


@pytest.mark.parametrize("options", [{}, {"window": (9, 2)}, {"causal": False, "softcap": 3.0, "sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_boolean_mask(dtype: torch.dtype, options: dict, device: torch.device) -> None:
    q, k, v = _leaves((2, 4, 17, 8), (2, 2, 23, 8), (2, 2, 23, 8), dtype=dtype, device=device)
    options = options | ({"sinks": torch.ones(4, device=device, dtype=dtype)} if options.get("sinks") else {})
    mask = (torch.rand(2, 1, 17, 23, generator=torch.Generator().manual_seed(2)) < 0.5).to(device)
    mask[1, 0, 3] = False  # a row that sees nothing
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = _both(lambda *inputs: flash_attention(*inputs, mask=mask, **options), [q, k, v], dout)

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        s = q @ k.mT / 8**0.5
        s = 3 * torch.tanh(s / 3) if "softcap" in options else s
        causal, window = options.get("causal", True), options.get("window")
        s = s.masked_fill(~(mask & reference.visible_mask(17, 23, causal, window, q.device)), -1e30)
        s = torch.cat((s, s.new_full((*s.shape[:3], 1), 1.0 if "sinks" in options else -1e29)), -1)
        return s.softmax(-1)[..., :-1] @ v

    for a, b in zip(found, _both(written_out, exact, dout), strict=True):
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=2e-2 if dtype == torch.bfloat16 else 2e-6,
        )
    assert found[0].dtype == dtype


@pytest.mark.parametrize("width", [5, 24])
def test_values_of_another_head_size(width: int, device: torch.device) -> None:
    leaves = _leaves((2, 4, 17, 8), (2, 2, 23, 8), (2, 2, 23, width), device=device)
    dout = torch.randn((2, 4, 17, width), generator=torch.Generator().manual_seed(1)).to(device)
    exact = _both(reference.flash_attention, [x.detach().double().requires_grad_() for x in leaves], dout)
    for a, b in zip(_both(flash_attention, leaves, dout), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("mask", "got"),
    [(torch.ones(17, 22, dtype=torch.bool), r"torch.bool\(17, 22\)"), (torch.ones(17, 23), r"torch.float32\(17, 23\)")],
    ids=["shape", "dtype"],
)
def test_a_mask_that_is_none_is_refused(mask: Tensor, got: str) -> None:
    q, k, v = _leaves((2, 4, 17, 8), (2, 2, 23, 8), (2, 2, 23, 8))
    with pytest.raises(ValueError, match=rf"^mask: expected bool that broadcasts to \(2, 4, 17, 23\), got {got}"):
        flash_attention(q, k, v, mask=mask)
