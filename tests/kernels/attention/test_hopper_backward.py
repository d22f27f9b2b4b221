"""The Hopper attention backward, run from its own source by the Gluon emulator, and bugs that must not pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.kernels import reference
from rooflight.kernels.attention import checks
from rooflight.kernels.attention.hopper import backward as hopper_backward
from rooflight.kernels.attention.hopper import gradients as hopper_gradients
from rooflight.kernels.attention.hopper import place as hopper_place
from rooflight.kernels.attention.hopper import turns as hopper_turns
from support.attention import DTYPES, LAYOUTS, draw, draw_packed, draw_past_longest, lay_out_grad
from support.gluon_emulator import DeadlockError, EmulationError, emulated, from_sources
from support.tolerance import judge

pytestmark = pytest.mark.cpu

BF16, FP16 = torch.bfloat16, torch.float16


class Hopper(torch.autograd.Function):
    """The oracle's forward, rounded as a kernel rounds it, with launch_backward in the emulator behind it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[Any, ...], options: dict[str, Any], run: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        exact = (x.double() for x in (q, k, v))
        forward = reference.flash_attention_varlen if ends else reference.flash_attention
        out, lse = forward(*exact, *ends, return_lse=True, **options)
        out, lse = torch.empty_like(q).copy_(out), lse.float()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ends, ctx.options, ctx.run = ends, options, run
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = (x.detach() for x in ctx.saved_tensors)
        grads = dq, dk, dv = tuple(torch.empty_like(x) for x in (q, k, v))
        cu_q, cu_k, T, S = ctx.ends or (None, None, q.shape[2], k.shape[2])
        assert hopper_backward.supports(q, k, v, dout, cu_q) is None
        left, right = checks.reach(ctx.options["causal"], ctx.options.get("window"))
        scale, _ = checks.score_numbers(ctx.options.get("scale"), 0.0, q.shape[-1])
        run = {"module": hopper_backward, "seed": 0, "resident": 3, "ordered": True} | ctx.run
        module = run.pop("module")
        options = {name: run.pop(name) for name in ("ordered",) if name in run}
        with emulated(module, hopper_gradients, **run):
            module.launch_backward(
                q, k, v, out, dout, lse, dlse, dq, dk, dv, None, cu_q, cu_k, T, S, left, right, scale, **options
            )
        return *grads, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, *ends: Any, run: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    return Hopper.apply(q, k, v, ends, options, run or {})


def judge_backward(inputs: dict[str, Any], *, run: Any = None, grad: Any = None, **options: Any) -> None:
    """Every gradient, of the output and of the log-sum-exp, against the oracle in fp64."""
    varlen = "cu_seqlens_q" in inputs
    oracle = reference.flash_attention_varlen if varlen else reference.flash_attention

    def ours(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        ends = [rest.pop(f"{x}_{side}") for x in ("cu_seqlens", "max_seqlen") for side in "qk"] if varlen else []
        return attend(q, k, v, *ends, run=run, **rest)

    judge(
        ours,
        lambda **k: oracle(return_lse=True, **k),
        inputs,
        **({"grad": grad} if grad else {}),
        **options,
    )


# (B, H, K, T, S, D), dtype, options
DENSE: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "one query, one key": ((1, 1, 1, 1, 1, 64), BF16, {"causal": True}),
    "causal, ragged ends, grouped queries": ((1, 4, 2, 150, 150, 64), BF16, {"causal": True}),
    "causal, three tiles of keys, D 128": ((1, 1, 1, 320, 320, 128), BF16, {"causal": True}),
    "full, whole tiles": ((2, 1, 1, 128, 256, 64), FP16, {"causal": False}),
    "full, ragged, D 128": ((1, 2, 1, 70, 190, 128), FP16, {"causal": False}),
    "more keys than queries": ((1, 1, 1, 100, 300, 64), BF16, {"causal": True}),
    "rows that see no key": ((1, 2, 2, 300, 100, 64), BF16, {"causal": True}),
    "window": ((1, 2, 1, 400, 400, 64), BF16, {"causal": True, "window": 100}),
    "window of one key": ((1, 1, 1, 300, 300, 64), BF16, {"causal": True, "window": 0}),
    "window on both sides": ((1, 1, 1, 330, 270, 64), FP16, {"causal": False, "window": (40, 90)}),
    "window wider than 32 bits": ((1, 1, 1, 100, 140, 64), BF16, {"causal": True, "window": 1 << 40}),
    "another scale": ((1, 1, 1, 90, 90, 64), BF16, {"causal": True, "scale": 0.3}),
}


@pytest.mark.parametrize("case", DENSE)
def test_gradients(case: str) -> None:
    sizes, dtype, options = DENSE[case]
    judge_backward(draw(*sizes, dtype), **options)


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("case", DENSE)
def test_gradients_of_many_schedules(case: str, seed: int, ordered: bool) -> None:
    sizes, dtype, options = DENSE[case]
    run = {"seed": seed, "resident": 1 + seed % 5, "ordered": ordered}
    judge_backward(draw(*sizes, dtype, seed=seed), run=run, **options)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False}, {"causal": True, "window": 30}])
def test_packed_sequences(options: dict[str, Any], D: int) -> None:
    """Empty ones on either side, and ends inside tiles that hold a neighbour's rows."""
    judge_backward(draw_packed([70, 0, 1, 130, 40], [130, 5, 0, 64, 200], 2, 1, D, BF16), **options)


@pytest.mark.parametrize("layout", ["(B, T, H, D)", "(T, B, H, D)", "fused"])
def test_layouts(layout: str) -> None:
    inputs = {name: LAYOUTS[layout](x) for name, x in draw(2, 2, 2, 70, 70, 64, BF16).items()}
    judge_backward(inputs, grad=lay_out_grad(layout), causal=True)


@pytest.mark.parametrize("D", [64, 128])
def test_without_turns(D: int) -> None:
    judge_backward(draw(1, 2, 1, 300, 300, D, BF16), run={"ordered": False}, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_drawn_problems(seed: int) -> None:
    """Lengths around the tiles' edges, windows of any reach, packed or not."""
    draws = random.Random(seed)
    K, D, dtype = draws.choice([1, 2]), draws.choice([64, 64, 128]), draws.choice([BF16, FP16])
    H = K * draws.choice([1, 2, 3])
    options: dict[str, Any] = {"causal": draws.random() < 0.5}
    if draws.random() < 0.6:
        options["window"] = draws.choice([0, 1, 5, 63, 64, 100, 200, 300]), draws.choice([0, 3, 64, 128, 150])
    run = {"seed": seed, "resident": draws.choice([1, 2, 3, 5]), "ordered": draws.random() < 0.8}
    lengths = 1, 50, 63, 64, 65, 127, 128, 129, 200, 260, 330
    if draws.random() < 0.5:
        n = draws.choice([1, 2, 4])
        lengths_q, lengths_k = ([draws.choice((0, *lengths)) for _ in range(n)] + [7] for _ in "qk")
        inputs = draw_packed(lengths_q, lengths_k, H, K, D, dtype, seed=seed)
    else:
        inputs = draw(draws.choice([1, 2]), H, K, draws.choice(lengths), draws.choice(lengths), D, dtype, seed=seed)
    judge_backward(inputs, run=run, **options)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [17, 130, 513])
def test_lengths_that_are_no_multiple_of_four(T: int, D: int) -> None:
    judge_backward(draw(1, 2, 1, T, T, D, BF16), causal=True)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("lengths", [[300, 129], [1, 7, 128]], ids=str)
def test_packed_lengths_that_are_no_multiple_of_four(lengths: list[int], D: int) -> None:
    judge_backward(draw_packed(lengths, lengths, 2, 1, D, BF16), causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 128])
def test_a_max_seqlen_below_the_longest_leaves_the_rest_alone(D: int, causal: bool) -> None:
    """A GPU's values are not checked: what lies past it is neither read, NaN that it is, nor written."""
    long, short, kept = draw_past_longest([130, 40, 200], [140, 7, 90], 100, 80, 2, 1, D, BF16)
    q, k, v = (short[name] for name in "qkv")
    args = (*(short[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),)
    out, lse = reference.flash_attention_varlen(q, k, v, *args, causal=causal, return_lse=True)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def widened(x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-3], len(kept["q"]), *x.shape[-2:]), torch.nan).index_put((kept["q"],), x)

    def gradients(inputs: dict[str, Any], out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        grads = tuple(torch.full_like(inputs[name], torch.nan) for name in "qkv")
        bounds = (inputs[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
        with emulated(hopper_backward, hopper_gradients):
            hopper_backward.launch_backward(
                *(inputs[name] for name in "qkv"), out, dout, lse, None, *grads, None, *bounds, None,
                0 if causal else None, D**-0.5,
            )  # fmt: skip
        return grads

    ours = gradients(long, widened(out), widened(dout), widened(lse.T[..., None])[..., 0].T)
    for name, long_grad, grad in zip("qkv", ours, gradients(short, out, dout, lse), strict=True):
        assert torch.equal(long_grad[kept[name]], grad), name
        assert long_grad[~kept[name]].isnan().all(), name


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("options", "lengths_k"),
    [
        ({"causal": True}, [70, 150, 33]),
        ({"causal": False}, [200, 41, 90]),
        ({"causal": True, "window": 20}, [70, 150, 33]),
    ],
    ids=str,
)
def test_what_is_no_number_stays_in_its_sequence(options: dict[str, Any], lengths_k: list[int], D: int) -> None:
    """Tiles that cross an end hold rows of the next sequence, and 0 x NaN is NaN."""
    inputs = draw_packed([70, 150, 33], lengths_k, 2, 1, D, BF16)
    tensors, ends = [inputs.pop(name) for name in "qkv"], inputs

    def gradients(bad: float | None) -> tuple[Tensor, ...]:
        q, k, v = (x.clone() for x in tensors)
        dout = torch.ones_like(q)
        if bad is not None:
            for x, bounds in ((q, "q"), (k, "k"), (v, "k"), (dout, "q")):
                x[ends[f"cu_seqlens_{bounds}"][1] : ends[f"cu_seqlens_{bounds}"][2]] = bad
        leaves = [x.requires_grad_() for x in (q, k, v)]
        bounds = [ends[f"{x}_{side}"] for x in ("cu_seqlens", "max_seqlen") for side in "qk"]
        return torch.autograd.grad(attend(*leaves, *bounds, **options)[0], leaves, dout)

    expected = gradients(None)
    for bad in (math.nan, math.inf):
        for name, before, after in zip("qkk", expected, gradients(bad), strict=True):
            _, start, stop, _ = ends[f"cu_seqlens_{name}"].tolist()
            assert torch.equal(before[:start], after[:start])
            assert torch.equal(before[stop:], after[stop:])
            assert not after[start:stop].isfinite().all()


# ---------------------------------------------------------------- one order


def gradients(module: ModuleType = hopper_backward, head_dim: int = 64, **run: Any) -> tuple[Tensor, ...]:
    inputs = draw(1, 1, 1, 400 if head_dim == 64 else 200, 400, head_dim, BF16)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, _ = attend(*leaves, run={"module": module, "resident": 3} | run, causal=False)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad(out, leaves, dout)


@cache
def correct(head_dim: int = 64) -> tuple[Tensor, ...]:
    return gradients(head_dim=head_dim, resident=1)


@pytest.mark.parametrize("resident", [1, 2, 8])
def test_dq_is_bitwise_the_same_in_every_schedule(resident: int) -> None:
    expected = correct()
    for seed in range(1, 4):
        for name, grad, other in zip("qkv", expected, gradients(seed=seed, resident=resident), strict=True):
            assert torch.equal(grad, other), f"d{name} of seed {seed}"


def test_dq_depends_on_the_schedule_without_turns() -> None:
    """What the test above would see: the schedules do differ in who adds first."""
    grads = [gradients(seed=seed, resident=8, ordered=False)[0] for seed in range(10)]
    assert not all(torch.equal(grad, grads[0]) for grad in grads)


# ---------------------------------------------------------------- bugs that must not pass


@pytest.fixture
def mutate(tmp_path: Path) -> Callable[..., ModuleType]:
    """A copy of the kernel's modules with some of their text replaced, everywhere it stands."""

    def load(*replacements: tuple[str, str]) -> ModuleType:
        modules = (hopper_place, hopper_turns, hopper_backward)
        sources = {m.__name__: Path(str(m.__file__)).read_text() for m in modules}
        for old, new in replacements:
            assert any(old in source for source in sources.values())
            sources = {name: source.replace(old, new) for name, source in sources.items()}
        return from_sources(tmp_path, sources)

    return load


def caught(module: ModuleType, head_dim: int = 64, seeds: int = 8) -> BaseException | None:
    """What the first of some schedules raises, a wrong gradient included."""
    expected = correct(head_dim)
    for seed in range(seeds):
        try:
            found = gradients(module, head_dim, seed=seed)
            assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True)), "other bits"
        except (EmulationError, AssertionError) as error:
            return error
    return None


RELEASE = "            mbarrier.arrive(empty.index(s), count=1)\n"
RETIRE = "            dk = warpgroup_mma_wait(0, [dk])\n"
WRITTEN = "                tma_written()\n"

# by head size: the two have loop bodies of their own
BUGS: dict[str, tuple[int, list[tuple[str, str]]]] = {
    "q and dout released while they are read": (64, [(RELEASE, ""), (RETIRE, RELEASE + RETIRE)]),
    "no fence between ds and its wgmma": (64, [("                fence_async_shared()\n", "")]),
    "no fence between ds and its wgmma, D 128": (128, [("                fence_async_shared()\n", "")]),
    "ds read before the other warpgroup has stored it": (
        64,
        [("            mbarrier.wait(ds_full.index(0), g % 2)\n", "")],
    ),
    "ds stored where the other warpgroup still reads": (64, [("ds_buf.index(g % 2)", "ds_buf.index(0)")]),
    "scores used in flight": (64, [("warpgroup_mma_wait(3, [z1])", "warpgroup_mma_wait(4, [z1])")]),
    "scores used in flight, D 128": (128, [("warpgroup_mma_wait(1, [z])", "warpgroup_mma_wait(2, [z])")]),
    "dp used in flight": (64, [("warpgroup_mma_wait(1, [dp0])", "warpgroup_mma_wait(2, [dp0])")]),
    "dp used in flight, D 128": (128, [("warpgroup_mma_wait(1, [dp])", "warpgroup_mma_wait(2, [dp])")]),
    "no phase flip of full": (64, [("mbarrier.wait(full.index(s), parity)", "mbarrier.wait(full.index(s), 0)")]),
    "no phase flip of empty": (
        64,
        [("mbarrier.wait(empty.index(s), parity ^ 1)", "mbarrier.wait(empty.index(s), 1)")],
    ),
    "keys used before they land": (64, [("    mbarrier.wait(full.index(STAGES + 1), 0, pred=n_block > 0)\n", "")]),
    "one warpgroup releases for both": (64, [("empty = new_barriers(STAGES, 2)", "empty = new_barriers(STAGES, 1)")]),
    "statistics not counted": (64, [(" + rows_desc.block_type.nbytes", "")]),
    "dq stored where the last one is still read": (
        64,
        [("            mbarrier.wait(dq_empty.index(0), (g & 1) ^ 1)\n", "")],
    ),
    "dq's buffer freed before it is read": (64, [(WRITTEN, WRITTEN.replace("tma_written()", "pass"))]),
    "dq sent before both have stored it": (64, [("dq_full = new_barriers(1, 2)", "dq_full = new_barriers(1, 1)")]),
    "no fence between dq and its addition": (
        64,
        [
            (
                "            fence_async_shared()\n            mbarrier.arrive(dq_full",
                "            mbarrier.arrive(dq_full",
            )
        ],
    ),
    "the first to add does not overwrite what was there": (
        64,
        [("ORDERED and last_before == 0", "ORDERED and last_before < 0")],
    ),
    "nobody waits for an earlier program": (64, [("while n_in != before:", "while n_in < 0:")]),
    "the turn ends before dq is written": (64, [(WRITTEN, WRITTEN.replace("tma_written()", "tma.store_wait(0)"))]),
    "dk stored where the other warpgroup still reads q": (
        64,
        [("    mbarrier.wait(done.index(0), 0)", "    pass")],
    ),
    "no fence between dk and its store": (
        128,
        [("        fence_async_shared()\n        tma_store(dv", "        tma_store(dv")],
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug: str, mutate: Any) -> None:
    head_dim, replacements = BUGS[bug]
    assert caught(mutate(*replacements), head_dim) is not None


def test_turns_against_the_order_in_which_programs_start(mutate: Any) -> None:
    with pytest.raises(DeadlockError):
        gradients(mutate(("first = (n_tile - 1 - n) * BLOCK_N", "first = n * BLOCK_N")))


def test_no_bug_is_not_caught(mutate: Any) -> None:
    assert caught(mutate(), seeds=4) is None


# ---------------------------------------------------------------- what it serves


def test_supports() -> None:
    def reason(D: int = 64, dtype: torch.dtype = BF16, S: int = 8, **changes: Any) -> str | None:
        tensors = draw(1, 2, 1, 8, S, D, dtype)
        tensors["dout"] = tensors["q"]
        options = {name: changes.pop(name) for name in ("softcap",) if name in changes}
        return hopper_backward.supports(*(tensors | changes).values(), None, **options)

    assert reason() is None
    assert reason(dtype=FP16, D=128) is None
    assert "float32" in str(reason(dtype=DTYPES[0]))
    assert "80" in str(reason(D=80))
    assert "softcap" in str(reason(softcap=1.0))
    assert "no keys" in str(reason(S=0))
    assert "dout" in str(reason(dout=torch.zeros(1, 2, 8, 1, dtype=BF16).expand(1, 2, 8, 64)))
    assert "q" in str(reason(q=torch.zeros(1, 2, 8, 66, dtype=BF16)[..., 1:-1]))
