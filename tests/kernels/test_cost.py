"""The closed forms against brute force: masks counted, tensors weighed, matrix products seen by torch's counter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import cost, fp8, reference
from support.traffic import Traffic

WINDOWS = [None, 0, 1, 3, 20, (0, 0), (1, 2), (2, 1), (0, 5), (5, 0)]
# no query, no key, one of each, more queries than keys (rows that see nothing), more keys (a cache), equal
LENGTHS = [(0, 3), (3, 0), (1, 1), (1, 7), (7, 1), (4, 9), (9, 4), (8, 8), (13, 13)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_visible_pairs_counts_the_mask(causal: bool, window: cost.Window) -> None:
    for T, S in LENGTHS:
        mask = reference.visible_mask(T, S, causal, window)
        assert cost.visible_pairs(T, S, causal, window) == int(mask.sum()), (T, S)


def test_visible_pairs_of_known_shapes() -> None:
    T, w = 1000, 64
    assert cost.visible_pairs(T, T, causal=True) == T * (T + 1) // 2
    assert cost.visible_pairs(T, T, causal=False) == T * T
    assert cost.visible_pairs(T, T, causal=True, window=w - 1) == T * w - w * (w - 1) // 2  # w keys, itself included


@pytest.mark.parametrize("window", [-1, (-1, 0), (0, -2)])
def test_a_negative_window_is_refused(window: cost.Window) -> None:
    with pytest.raises(ValueError, match="window: expected sizes >= 0"):
        cost.visible_pairs(4, 4, True, window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tiled_pairs_counts_the_tiles_that_the_mask_touches(causal: bool, window: cost.Window) -> None:
    block_q, block_k = 4, 2
    for T, S in LENGTHS:
        mask = reference.visible_mask(T, S, causal, window)
        tiles = [t for rows in mask.split(block_q) for t in rows.split(block_k, dim=1)]
        # a kernel walks from the first tile that is touched to the last, which is all of them for these masks
        touched = sum(bool(tile.any()) for tile in tiles)
        assert cost.tiled_pairs(T, S, causal, window, block_q=block_q, block_k=block_k) == touched * block_q * block_k


def _weigh(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestUnfusedBytesAreWhatEagerOperatorsMove:
    """The oracles run with every operator's operands weighed; rows' own values and the mask are within the 1 %."""

    def _hold(self, price: Callable[[bool], cost.Cost], call: Callable[..., Any], *leaves: Tensor) -> None:
        for leaf in leaves:
            leaf.requires_grad_()
        with Traffic() as forward:
            outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(y) for y in outputs]
        with Traffic() as backward:
            torch.autograd.grad(outputs, leaves, upstream)
        assert forward.total == pytest.approx(price(False).unfused_bytes, rel=0.01)
        assert backward.total == pytest.approx(price(True).unfused_bytes, rel=0.01)

    def test_products_in_fp8(self, dtype: torch.dtype) -> None:
        M, N, K = 64, 96, 128
        x, weight = torch.ones(M, K, dtype=dtype), torch.ones(N, K)

        def price(backward: bool) -> cost.Cost:
            if not backward:
                casts = cost.fp8_cast_cost(M, K, dtype) + cost.fp8_cast_cost(N, K, torch.float32)
                return casts + cost.fp8_matmul_cost(M, N, K, dtype)
            products = cost.fp8_matmul_cost(M, K, N, dtype) + cost.fp8_matmul_cost(N, K, M, torch.float32)
            return cost.fp8_cast_cost(M, N, dtype) + products

        self._hold(price, lambda: reference.fp8_linear(x, weight), x, weight)

    @pytest.mark.parametrize("weight", [True, False])
    @pytest.mark.parametrize("residual", [True, False])
    def test_rms_norm(self, dtype: torch.dtype, residual: bool, weight: bool) -> None:
        M, N = 512, 512
        x, r, w = (torch.ones(shape, dtype=dtype) for shape in ((M, N), (M, N), (N,)))
        leaves = [x, *([r] if residual else []), *([w] if weight else [])]
        self._hold(
            lambda backward: cost.rms_norm_cost(M, N, dtype, residual=residual, weight=weight, backward=backward),
            lambda: reference.rms_norm(x, w if weight else None, residual=r if residual else None),
            *leaves,
        )

    def test_rope(self, dtype: torch.dtype) -> None:
        B, H, K, T, D = 8, 16, 8, 32, 32
        q, k = (torch.ones(B, heads, T, D, dtype=dtype) for heads in (H, K))
        table = torch.ones(T, D // 2)
        self._hold(
            lambda backward: cost.rope_cost(B, H, K, T, D, dtype, backward=backward),
            lambda: reference.rope(q, k, table, table),
            q,
            k,
        )
        qkv = torch.ones(B, T, (H + 2 * K) * D, dtype=dtype)
        self._hold(
            lambda backward: cost.rope_qkv_cost(B, H, K, T, D, dtype, backward=backward),
            lambda: reference.rope_qkv(qkv, table, table, H, K),
            qkv,
        )

    @pytest.mark.parametrize("K", [16, 4])
    def test_attention(self, dtype: torch.dtype, K: int) -> None:
        B, H, T, S, D = 2, 16, 96, 128, 32
        q, k, v = (torch.ones(B, heads, rows, D, dtype=dtype) for heads, rows in ((H, T), (K, S), (K, S)))
        self._hold(
            lambda backward: cost.flash_attention_cost(B, H, K, T, S, D, True, None, dtype, backward=backward),
            lambda: reference.flash_attention(q, k, v),
            q,
            k,
            v,
        )

    def test_swiglu(self, dtype: torch.dtype) -> None:
        gate, up = torch.ones(8, 64, dtype=dtype), torch.ones(8, 64, dtype=dtype)
        price = functools.partial(cost.swiglu_cost, 8, 64, dtype)
        self._hold(lambda backward: price(backward=backward), lambda: reference.swiglu(gate, up), gate, up)

    def test_gelu(self, dtype: torch.dtype) -> None:
        x = torch.ones(8, 64, dtype=dtype)
        self._hold(lambda backward: cost.gelu_cost(8, 64, dtype, backward=backward), lambda: F.gelu(x), x)

    def test_losses(self, dtype: torch.dtype) -> None:
        M, N, V = 64, 96, 8192
        x, weight = torch.ones(M, N, dtype=dtype), torch.ones(V, N, dtype=dtype)
        logits, target = torch.ones(M, V, dtype=dtype), torch.zeros(M, dtype=torch.long)
        for smoothed, weights in ((0.0, None), (0.1, None), (0.1, torch.ones(V))):
            options = {"label_smoothing": smoothed > 0, "class_weight": weights is not None}
            self._hold(
                lambda backward, o=options: cost.cross_entropy_cost(M, V, dtype, backward=backward, **o),
                lambda e=smoothed, w=weights: reference.cross_entropy(
                    logits, target, label_smoothing=e, class_weight=w
                ),
                logits,
            )
        self._hold(
            lambda backward: cost.linear_cross_entropy_cost(M, N, V, dtype, backward=backward),
            lambda: reference.linear_cross_entropy(x, weight, target),
            x,
            weight,
        )


def test_unfused_bytes_of_adamw_are_what_its_operators_move() -> None:
    parameter = torch.nn.Parameter(torch.ones(100, 100))
    parameter.grad = torch.ones(100, 100)
    optimizer = torch.optim.AdamW([parameter], foreach=False, fused=False)
    optimizer.step()  # makes the moments
    with Traffic() as step:
        optimizer.step()
    assert step.total == pytest.approx(cost.adamw_cost(10_000).unfused_bytes, rel=0.01)


def test_costs_add_up_fused_and_not() -> None:
    product, norm = cost.matmul_cost(2, 3, 4), cost.rms_norm_cost(2, 3)
    assert product.unfused_bytes == product.bytes
    both = product + 2 * norm
    assert (both.bytes, both.unfused_bytes) == (
        product.bytes + 2 * norm.bytes,
        product.bytes + 2 * norm.unfused_bytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestBytesAreTheInputsAndTheOutputs:
    """Each op runs on real tensors; what it reads and writes is weighed."""

    def test_rms_norm(self, dtype: torch.dtype) -> None:
        M, N = 6, 20
        x, r, w, rstd = (torch.ones(s, dtype=dtype) for s in ((M, N), (M, N), (N,), (M,)))
        rstd = rstd.float()
        y = reference.rms_norm(x, w)
        assert cost.rms_norm_cost(M, N, dtype).bytes == _weigh(x, w, y, rstd)
        assert cost.rms_norm_cost(M, N, dtype, weight=False).bytes == _weigh(x, y, rstd)
        assert cost.rms_norm_cost(M, N, dtype, backward=True).bytes == _weigh(y, x, w, rstd, x, w)
        y, total = reference.rms_norm(x, w, residual=r)
        assert cost.rms_norm_cost(M, N, dtype, residual=True).bytes == _weigh(x, r, w, y, total, rstd)
        backward = cost.rms_norm_cost(M, N, dtype, residual=True, backward=True)
        assert backward.bytes == _weigh(y, total, x, w, rstd, x, w)

    def test_attention(self, dtype: torch.dtype) -> None:
        B, H, K, T, S, D = 2, 4, 2, 5, 9, 8
        q, k, v = (torch.ones(B, h, n, D, dtype=dtype) for h, n in ((H, T), (K, S), (K, S)))
        out, lse = reference.flash_attention(q, k, v, return_lse=True)
        args = B, H, K, T, S, D, True, None, dtype
        statistics = [lse] * (2 if dtype == torch.float32 else 1)
        assert cost.flash_attention_cost(*args).bytes == _weigh(q, k, v, out, *statistics)
        backward = cost.flash_attention_cost(*args, backward=True)
        assert backward.bytes == _weigh(q, k, v, out, out, *statistics) + _weigh(q, k, v)

    def test_attention_does_not_read_keys_that_no_query_sees(self, dtype: torch.dtype) -> None:
        one, many = ((1, 4, 2, 1, S, 8, True, 3, dtype) for S in (4, 900))
        assert cost.flash_attention_cost(*one).bytes == cost.flash_attention_cost(*many).bytes

    def test_rope(self, dtype: torch.dtype) -> None:
        B, H, K, T, D = 2, 4, 2, 5, 8
        q, k = torch.ones(B, H, T, D, dtype=dtype), torch.ones(B, K, T, D, dtype=dtype)
        cos = torch.ones(T, D // 2)
        assert cost.rope_cost(B, H, K, T, D, dtype).bytes == _weigh(q, k, cos, cos, *reference.rope(q, k, cos, cos))
        for backward in (False, True):
            moved = cost.rope_qkv_cost(B, H, K, T, D, dtype, backward=backward).bytes
            assert moved == _weigh(q, k, k, cos, cos, q, k, k)

    def test_swiglu_gelu_and_matmul(self, dtype: torch.dtype) -> None:
        M, N, K = 6, 10, 4
        x, w = torch.ones(M, K, dtype=dtype), torch.ones(K, N, dtype=dtype)
        y = x @ w
        assert cost.matmul_cost(M, N, K, dtype).bytes == _weigh(x, w, y)
        assert cost.matmul_cost(M, N, K, dtype, backward=True).bytes == _weigh(y, w, x) + _weigh(x, y, w)
        assert cost.swiglu_cost(M, N, dtype).bytes == _weigh(y, y, reference.swiglu(y, y))
        assert cost.swiglu_cost(M, N, dtype, backward=True).bytes == _weigh(y, y, y, y, y)
        assert cost.gelu_cost(M, N, dtype).bytes == _weigh(y, y)
        assert cost.gelu_cost(M, N, dtype, backward=True).bytes == _weigh(y, y, y)

    def test_products_in_fp8(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """What each launch of kernels/fp8.py is given, and each product; but the maxima and the scales."""
        M, N, K = 48, 32, 16
        moved = 0

        def weigh(*tensors: Any) -> None:
            nonlocal moved
            moved += sum(t.nbytes for t in tensors if isinstance(t, Tensor) and t.numel() > 16)

        def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool = False):
            y = reference.fp8_product(a, b, scale_a, scale_b, dtype)
            weigh(a, b, y)
            return y

        monkeypatch.setattr(fp8, "launch", lambda kernel, grid, *args, **options: weigh(*args))
        monkeypatch.setattr(fp8, "product", product)
        x, dy = torch.ones(M, K, dtype=dtype), torch.ones(M, N, dtype=dtype)
        for weight in (torch.ones(N, K), torch.ones(N, K, dtype=dtype)):
            moved = 0
            _, *kept = fp8.fp8_linear_fwd(x, weight, True, True)
            casts = cost.fp8_cast_cost(M, K, dtype) + cost.fp8_cast_cost(N, K, weight.dtype)
            assert moved == (casts + cost.fp8_matmul_cost(M, N, K, dtype)).bytes
            moved = 0
            fp8.fp8_linear_bwd(dy, *kept, weight.dtype != dtype)
            products = cost.fp8_matmul_cost(M, K, N, dtype) + cost.fp8_matmul_cost(N, K, M, weight.dtype)
            assert moved == (cost.fp8_cast_cost(M, N, dtype) + products).bytes

    def test_losses(self, dtype: torch.dtype) -> None:
        M, N, V = 6, 10, 40
        x, w, target = torch.ones(M, N, dtype=dtype), torch.ones(V, N, dtype=dtype), torch.zeros(M, dtype=torch.long)
        logits = x @ w.T
        loss = reference.cross_entropy(logits, target, reduction="none")
        lse = loss
        assert cost.cross_entropy_cost(M, V, dtype).bytes == _weigh(logits, target, loss, lse)
        assert cost.cross_entropy_cost(M, V, dtype, backward=True).bytes == _weigh(logits, target, lse, logits)
        assert cost.linear_cross_entropy_cost(M, N, V, dtype).bytes == _weigh(x, w, target, loss, lse)
        backward = cost.linear_cross_entropy_cost(M, N, V, dtype, backward=True)
        assert backward.bytes == _weigh(x, w, target, lse, x, w)
        kept = [cost.linear_cross_entropy_cost(M, N, V, dtype, backward=b, keep_gradients=True) for b in (False, True)]
        assert [k.bytes for k in kept] == [_weigh(x, w, target, loss[0], x, w), _weigh(loss[0], x, w, x, w)]
        own, every = loss, torch.ones(V)  # what is read of the classes' weights
        for smoothed, read in ((False, own), (True, every)):
            options = {"label_smoothing": smoothed, "class_weight": True}
            weighted = cost.cross_entropy_cost(M, V, dtype, backward=True, **options)
            assert weighted.bytes == _weigh(logits, target, lse, logits, read)
            weighted = cost.linear_cross_entropy_cost(M, N, V, dtype, keep_gradients=True, **options)
            assert weighted.bytes == _weigh(x, w, target, loss[0], x, w, read)

    def test_embedding(self, dtype: torch.dtype) -> None:
        M, N, V = 6, 10, 40
        table, rows, ids = (
            torch.ones(V, N, dtype=dtype),
            torch.ones(M, N, dtype=dtype),
            torch.zeros(M, dtype=torch.long),
        )
        assert cost.embedding_cost(M, N, V, dtype).bytes == _weigh(ids, rows, rows)
        assert cost.embedding_cost(M, N, V, dtype, backward=True).bytes == _weigh(ids, rows, table)


def _counted(*tensors: Tensor, run) -> tuple[int, int]:
    """Matrix-product FLOPs of run(*tensors), forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as forward:
        out = run(*(t.requires_grad_() for t in tensors))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_of_the_products_are_those_that_torch_counts() -> None:
    M, N, K, V = 6, 10, 4, 40
    x, w, table = torch.ones(M, K), torch.ones(K, N), torch.ones(V, K)
    expected = tuple(cost.matmul_cost(M, N, K, backward=b).flops for b in (False, True))
    assert _counted(x, w, run=torch.matmul) == expected

    target = torch.zeros(M, dtype=torch.long)
    kept = tuple(cost.linear_cross_entropy_cost(M, K, V, backward=b, recompute=False).flops for b in (False, True))
    assert _counted(x, table, run=lambda x, w: reference.linear_cross_entropy(x, w, target)) == kept

    B, H, T, S, D = 2, 3, 5, 7, 8
    q, k = torch.ones(B, H, T, D), torch.ones(B, H, S, D)
    args = B, H, H, T, S, D, False, None
    kept = tuple(cost.flash_attention_cost(*args, backward=b, recompute=False).flops for b in (False, True))
    run = lambda q, k, v: reference.flash_attention(q, k, v, causal=False)  # noqa: E731
    assert _counted(q, k, k.clone(), run=run) == kept


def test_recomputation_adds_one_product() -> None:
    args = 2, 4, 2, 64, 64, 16
    forward = cost.flash_attention_cost(*args).flops
    assert cost.flash_attention_cost(*args, backward=True).flops == 2.5 * forward
    assert cost.flash_attention_cost(*args, backward=True, recompute=False).flops == 2 * forward
    forward = cost.linear_cross_entropy_cost(8, 16, 100).flops
    assert cost.linear_cross_entropy_cost(8, 16, 100, backward=True).flops == 3 * forward
    assert cost.linear_cross_entropy_cost(8, 16, 100, backward=True, recompute=False).flops == 2 * forward
    kept = [cost.linear_cross_entropy_cost(8, 16, 100, backward=b, keep_gradients=True).flops for b in (False, True)]
    assert kept == [3 * forward, 0]


def test_exponentials_are_one_for_each_visible_pair_or_element() -> None:
    B, H, T = 2, 4, 33
    pairs = B * H * T * (T + 1) // 2
    assert [cost.flash_attention_cost(B, H, 2, T, T, 8, backward=b).exps for b in (False, True)] == [pairs, pairs]
    assert [cost.swiglu_cost(3, 5, backward=b).exps for b in (False, True)] == [15, 15]
    assert [cost.cross_entropy_cost(3, 5, backward=b).exps for b in (False, True)] == [15, 15]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_sequences_cost_what_they_cost_alone(causal: bool, window: int | None) -> None:
    lengths = [(5, 5), (1, 9), (0, 3), (17, 17)]
    queries, keys = zip(*lengths, strict=True)
    for backward in (False, True):
        alone = [
            cost.flash_attention_cost(1, 4, 2, T, S, 8, causal, window, "float32", backward=backward)
            for T, S in lengths
        ]
        packed = cost.flash_attention_varlen_cost(queries, keys, 4, 2, 8, causal, window, "float32", backward=backward)
        assert packed == sum(alone, cost.Cost(0, 0))
    with pytest.raises(ValueError, match="seqlens_k: expected 2 lengths"):
        cost.flash_attention_varlen_cost([1, 2], [1], 4, 2, 8)


def test_costs_add_and_scale() -> None:
    a, b = cost.Cost(6, 4, 2), cost.Cost(1, 2, 3)
    assert a + b == cost.Cost(7, 6, 5)
    assert 3 * a == a * 3 == cost.Cost(18, 12, 6)
    assert a.intensity == 1.5
    assert cost.Cost(6, 0).intensity == 0


def test_adamw_moves_28_bytes_for_a_parameter() -> None:
    assert cost.adamw_cost(10).bytes == 280
    assert cost.adamw_cost(10, gradient_dtype="bfloat16", copy_dtype="bfloat16").bytes == 10 * (4 * 6 + 2 * 2)
    assert cost.adamw_cost(10, "bfloat16").bytes == 3 * 20 + 4 * 40


@pytest.mark.parametrize("dtype", ["int64", "no such", "nn", torch.int8])
def test_a_dtype_that_is_no_float_is_refused(dtype: cost.DType) -> None:
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype"):
        cost.rms_norm_cost(2, 2, dtype)
