"""Linear layers that multiply by a copy of their weight in autocast's dtype."""

from __future__ import annotations

import copy

import pytest
import torch

from rooflight.kernels import fp8_linear, reference
from rooflight.model import ModelConfig, Transformer
from rooflight.model.layers import Linear, WeightCopy, use_fp8

LOW = torch.bfloat16


def layer(copied: bool) -> Linear:
    torch.manual_seed(0)
    linear = Linear(12, 20)
    if copied:
        linear.copy = WeightCopy(linear.weight, LOW)
    return linear


def both_passes(linear: Linear, times: int = 1) -> list[torch.Tensor]:
    linear.weight.grad = None
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).to(LOW).requires_grad_()
    for _ in range(times):
        with torch.autocast("cpu", LOW):
            y = linear(x)
        y.float().square().sum().backward()
    assert linear.weight.grad is not None
    assert x.grad is not None
    return [y.detach(), x.grad, linear.weight.grad]


@pytest.mark.parametrize("times", [1, 3])
def test_a_copy_changes_no_bit(times: int) -> None:
    """The weight accumulates in fp32, as through autocast's cast; told to keep LOW, it has the product's own bits."""
    plain, copied = both_passes(layer(False), times), layer(True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(both_passes(copied, times), plain, strict=True))
    if times == 1:
        copied.weight.grad = None
        copied.weight.grad_dtype = LOW
        gradient = both_passes(copied)[-1]
        assert gradient.dtype == LOW
        assert torch.equal(gradient.float(), plain[-1])


def test_without_autocast_to_its_dtype_the_weight_itself_is_used() -> None:
    linear = layer(True)
    assert linear.copy is not None
    linear.copy.tensor.zero_()
    x = torch.ones(1, 12)
    assert torch.equal(linear(x), layer(False)(x))
    with torch.autocast("cpu", torch.float16):
        assert linear(x).any()
    with torch.autocast("cpu", LOW):
        assert not linear(x).any()  # so the copy is what the other tests see


def add_in_place(linear: Linear) -> None:
    with torch.no_grad():
        linear.weight.add_(1.0)


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        lambda linear: linear.load_state_dict({"weight": torch.ones(20, 12)}),
        lambda linear: setattr(linear.weight, "data", torch.ones(20, 12)),
        lambda linear: setattr(linear, "weight", torch.nn.Parameter(torch.ones(20, 8))),
        lambda linear: linear.reset_parameters(),
        lambda linear: linear.double(),
    ],
    ids=["in place", "a state dict", "its data", "another parameter", "drawn anew", "cast"],
)
def test_a_copy_follows_its_weight(change) -> None:
    linear = layer(True)
    change(linear)
    x = torch.ones(1, linear.weight.shape[1], dtype=LOW)
    with torch.autocast("cpu", LOW):
        assert torch.equal(linear(x), x @ linear.weight.detach().to(LOW).T)


def test_a_duplicate_has_a_copy_of_its_own() -> None:
    linear = layer(True)
    twin = copy.deepcopy(linear)
    add_in_place(twin)
    x = torch.ones(1, 12, dtype=LOW)
    with torch.autocast("cpu", LOW):
        assert not torch.equal(twin(x), linear(x))
        assert torch.equal(linear(x), layer(False)(x))


def test_a_change_between_the_passes_is_noticed() -> None:
    """Autograd's own guard: the copy that the backward needs was overwritten."""
    linear, x = layer(True), torch.ones(1, 12, dtype=LOW, requires_grad=True)
    with torch.autocast("cpu", LOW):
        y = linear(x)
        add_in_place(linear)
        linear(x)
    with pytest.raises(RuntimeError, match=r"modified .*inplace"):
        y.sum().backward()


class TestFP8:
    def layer(self, bias: bool = False, copied: bool = False) -> Linear:
        torch.manual_seed(0)
        linear = Linear(32, 16, bias)
        if bias:
            torch.nn.init.normal_(linear.bias)
        if copied:
            linear.copy = WeightCopy(linear.weight, LOW)
        linear.fp8 = fp8_linear
        return linear

    @pytest.mark.parametrize("bias", [False, True])
    def test_it_multiplies_where_gradients_are_wanted(self, bias: bool) -> None:
        linear, x = self.layer(bias), torch.randn(48, 32)
        y = linear(x)
        expected = reference.fp8_linear(x, linear.weight) + (linear.bias if bias else 0)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            plain = linear(x)
        assert torch.equal(plain, torch.nn.functional.linear(x, linear.weight, linear.bias))
        assert not torch.allclose(plain, y, rtol=1e-3)
        with torch.autocast("cpu", LOW):
            assert linear(x.to(LOW)).dtype == LOW
        y.sum().backward()
        assert all(p.grad is not None for p in linear.parameters())

    def test_the_optimizers_copy_is_what_it_rounds(self) -> None:
        """And the weight's gradient leaves the product in the copy's dtype."""
        linear, x = self.layer(copied=True), torch.randn(48, 32).to(LOW)
        linear.weight.grad_dtype = LOW
        assert linear.copy is not None
        with torch.autocast("cpu", LOW):
            y = linear(x)
            linear.copy.tensor.mul_(2)  # an optimizer writes both: none but this test writes one alone
            twice = linear(x)
        assert torch.equal(twice, 2 * y)
        y.float().sum().backward()
        assert linear.weight.grad is not None
        assert linear.weight.grad.dtype == LOW

    def test_blocks_whose_matrices_fit(self) -> None:
        model = Transformer(ModelConfig(16, 8, 2, 2, d_model=32, d_ff=40), reference)
        taken, left = use_fp8(model.layers, fp8_linear)
        assert taken == ["attention.qkv_proj", "attention.o_proj", "ffn.gate_up_proj"]
        assert left == ["ffn.down_proj (32 x 40)"]
        chosen = {name for name, m in model.named_modules() if getattr(m, "fp8", None) is not None}
        assert chosen == {f"layers.{i}.{name}" for i in range(2) for name in taken}

    def test_a_model_without_one_is_refused(self) -> None:
        model = Transformer(ModelConfig(16, 8, 1, 2, d_model=24, d_ff=40), reference)
        with pytest.raises(ValueError, match=r"fp8: expected a matrix .* multiples of 16, got attention.qkv_proj \(72"):
            use_fp8(model.layers, fp8_linear)
