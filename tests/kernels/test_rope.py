"""RoPE against the oracle in fp64."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels import reference, rope, rope_qkv
from rooflight.kernels.rope import HEADS
from support.tolerance import judge


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def tables(positions, half, device):
    angles = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(half) / max(half, 1))
    return angles.cos().to(device), angles.sin().to(device)


def check(device, dtype=torch.float32, shape=(2, 3, 2, 9, 40), half=20, tables_of=9, layout=lambda x: x, **options):
    B, H, K, T, D = shape
    cos, sin = tables(tables_of, half, device)
    inputs = {
        "q": layout(draw(B, H, T, D, dtype=dtype, device=device)),
        "k": layout(draw(B, K, T, D, dtype=dtype, device=device, seed=1)),
    }

    def turn(op):
        return lambda q, k, **options: op(q, k, cos, sin, **options)

    judge(turn(rope), turn(reference.rope), inputs, **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "half"),
    [
        ((1, 1, 1, 1, 2), 1),  # the smallest
        ((2, 3, 2, 9, 40), 20),  # no power of two
        ((1, HEADS + 1, 1, 5, 64), 32),  # a group of heads in part
        ((2, 2, 1, 7, 10), 3),  # a part of the features turns
        ((1, 2, 2, 70, 16), 8),  # tokens beyond a tile's
        ((1, 2, 1, 3, 5), 0),  # nothing turns
    ],
    ids=str,
)
def test_shapes(device, dtype, shape, half, interleaved):
    check(device, dtype, shape, half, tables_of=70, interleaved=interleaved)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8), (2, 2, 1, 0, 8), (2, 0, 1, 3, 8)], ids=str)
def test_empty(device, shape):
    check(device, shape=shape, half=4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["shared", "per sequence", "strided", "expanded"])
def test_positions(device, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    positions = {
        "shared": torch.randint(0, 30, (9,), generator=generator),
        "per sequence": torch.randint(0, 30, (2, 9), generator=generator),
        "strided": torch.randint(0, 30, (9, 2), generator=generator).T,
        "expanded": torch.randint(0, 30, (1, 9), generator=generator).expand(2, 9),
    }[kind]
    check(device, tables_of=30, positions=positions.to(device, dtype))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # (B, T, H, D) stored
        lambda x: torch.cat([x, x], -1)[..., ::2],
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["heads", "every second feature", "reversed", "expanded"],
)
def test_layouts(device, layout):
    def grad(out, generator):
        return layout(torch.randn(out.shape, generator=generator).to(out))

    check(device, torch.bfloat16, layout=layout)
    check(device, torch.bfloat16, grad=grad)


def test_tables_may_be_strided(device):
    q, k = draw(1, 2, 5, 8, device=device), draw(1, 1, 5, 8, device=device)
    cos, sin = tables(5, 4, device)
    turned = rope(q, k, cos.T.contiguous().T, torch.cat([sin, sin], 1)[:, :4])
    assert all(map(torch.equal, turned, rope(q, k, cos, sin)))


def test_turning_back_gives_the_input(device):
    """The backward of the rotation is its inverse, so it takes the outputs back to the inputs."""
    q, k = (draw(1, 2, 5, 8, device=device, seed=i).requires_grad_() for i in (0, 1))
    outputs = rope(q, k, *tables(5, 4, device))
    for back, x in zip(torch.autograd.grad(outputs, (q, k), [o.detach() for o in outputs]), (q, k), strict=True):
        torch.testing.assert_close(back, x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "T", "D", "half"),
    [
        ((1, 1), 1, 2, 1),  # the smallest
        ((HEADS + 2, 3), 7, 40, 20),  # groups of heads in part, grouped queries, no power of two
        ((2, 1), 70, 10, 3),  # tokens beyond a tile's, a part of the features turns
        ((2, 1), 0, 8, 4),  # nothing
    ],
    ids=str,
)
def test_rows_of_one_product(device, dtype, heads, T, D, half):
    cos, sin = tables(70, half, device)
    qkv = draw(2, T, (heads[0] + 2 * heads[1]) * D, dtype=dtype, device=device)
    positions = torch.arange(T).flip(0).to(device)

    def turn(op):
        return lambda qkv: op(qkv, cos, sin, *heads, positions=positions)

    def grad(out, generator):  # as attention's backward hands them over: heads first, or tokens first
        return torch.randn(out.shape, generator=generator).to(out)

    if dtype == torch.float32:
        judge(turn(rope_qkv), turn(reference.rope_qkv), {"qkv": qkv})
    else:
        judge(turn(rope_qkv), turn(reference.rope_qkv), {"qkv": torch.cat([qkv, qkv], -1)[..., ::2]}, grad=grad)
    q, k, v = turn(rope_qkv)(qkv)
    ours = qkv.unflatten(-1, (-1, D)).transpose(1, 2)
    expected = rope(ours[:, : heads[0]], ours[:, heads[0] : sum(heads)], cos, sin, positions=positions)
    assert all(map(torch.equal, (q, k, v), (*expected, ours[:, sum(heads) :])))


def test_what_is_copied_may_be_anything(device):
    """v passes unchanged where a product with cos and sin would make NaN of it."""
    qkv = torch.full((1, 2, 3 * 4), float("inf"), device=device)
    assert rope_qkv(qkv, *tables(2, 2, device), 1, 1)[2].isinf().all()


Q, K, C = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(4, 3, 8)}, r"q: expected shape \(B, H, T, D\), got \(4, 3, 8\)"),
        ({"k": torch.ones(2, 2, 4, 8)}, r"k: expected shape \(2, K, 3, 8\), as q, got \(2, 2, 4, 8\)"),
        ({"cos": torch.ones(3, 5), "sin": torch.ones(3, 5)}, r"cos: expected shape .* R <= 8, got \(3, 5\)"),
        ({"sin": torch.ones(3, 3)}, r"sin: expected cos's shape \(3, 4\), got \(3, 3\)"),
        ({"cos": C[:2], "sin": C[:2]}, "cos: expected at least T = 3 positions, got 2"),
        ({"cos": C.clone().requires_grad_()}, "cos, sin: expected tables that need no gradient"),
        ({"q": Q.int()}, "q: expected dtype .* got int32"),
        ({"k": K.to("meta")}, "k: expected device cpu, as q, got meta"),
        ({"positions": torch.zeros(3)}, "positions: expected dtype int32 or int64, got torch.float32"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions: expected shape \(3,\) or \(2, 3\), got \(4,\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope(**({"q": Q, "k": K, "cos": C, "sin": C} | arguments))


@pytest.mark.parametrize("heads", [(2, 1), (0, 1)])
def test_rows_that_are_no_heads_are_refused(heads):
    with pytest.raises(ValueError, match=r"qkv: expected shape \(B, T, \(. \+ 2 \* 1\) D\), got \(1, 3, 7\)"):
        rope_qkv(torch.ones(1, 3, 7), C, C, *heads)
