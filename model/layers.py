"""What the transformer's blocks are made of: linear layers, norms, the embedding, and how each starts.

Matrices that read the same input are one matrix here (q, k and v; gate and up): one product with more columns instead
of three or two. In a state dict, and so in every checkpoint, they stand apart under their own names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import autocast_dtype
from ..kernels.reference import FP8_MULTIPLE
from .config import ModelConfig

# A tied table is both: as the embedding its scale is free (a norm follows), as the output matrix N(0, 1) would start
# the loss near sqrt(d_model) instead of ln(vocab_size). GPT-2 and Llama both start theirs at 0.02.
TIED_STD = 0.02


def _truncated_normal(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class WeightCopy:
    """A weight in the products' dtype, true to it whoever changes it.

    An optimizer that writes both says so (`written`). Any other change shows in the weight's version or address, and
    `of` copies again; only one made through weight.data does not.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.tensor = weight.detach().to(dtype, copy=True)
        self.written(weight)

    def written(self, weight: Tensor) -> None:
        """Both tensors hold the same numbers now."""
        self._known = weight._version, weight.data_ptr()

    def of(self, weight: Tensor) -> Tensor:
        """The copy of this weight as it is now."""
        if self._known != (weight._version, weight.data_ptr()):
            if self.tensor.shape != weight.shape or self.tensor.device != weight.device:
                self.tensor = torch.empty_like(weight, dtype=self.tensor.dtype, requires_grad=False)
            with torch.no_grad():
                self.tensor.copy_(weight)
            self.written(weight)
        return self.tensor


class _InPlaceOf(torch.autograd.Function):
    """apply(weight, copy): the copy, whose gradient is the weight's, in the copy's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Linear(nn.Linear):
    """N(0, 2 / (d_in + d_out)) truncated at three standard deviations (CS336, §3.4.1); a bias, if any, starts at 0.

    With a `copy` of its weight in autocast's dtype, it multiplies by that where autocast would cast the weight. The
    gradient leaves the product in that dtype; what the weight accumulates is its grad_dtype's to say, fp32 by itself.
    With `fp8`, kernels.fp8_linear or its oracle, it multiplies by that where gradients are wanted.
    """

    copy: WeightCopy | None = None
    fp8: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._multiplier(x.device.type)
        if self.fp8 is None or not torch.is_grad_enabled():
            return F.linear(x, weight, self.bias)
        y = self.fp8(x, weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _multiplier(self, device: str) -> Tensor:
        copy = self.copy
        if copy is None or torch.compiler.is_compiling() or autocast_dtype(device) != copy.tensor.dtype:
            return self.weight
        return _InPlaceOf.apply(self.weight, copy.of(self.weight))

    def reset_parameters(self) -> None:
        self._draw(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _draw(self, weight: Tensor) -> None:
        _truncated_normal(weight, math.sqrt(2 / sum(weight.shape)))


class JoinedLinear(Linear):
    """Matrices of one input, one below the other; each starts, and is saved and loaded, as a Linear of its name.

    parts: their names and numbers of rows. What makes a matrix out of a module belongs into a Sublayer, which joins
    the parts of a state dict.
    """

    def __init__(self, d_in: int, bias: bool = False, **parts: int) -> None:
        self.parts = parts
        super().__init__(d_in, sum(parts.values()), bias)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self.parts.values())

    def _draw(self, weight: Tensor) -> None:
        for part in weight.detach().split(self.rows):
            super()._draw(part)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        outer = prefix[: prefix.rstrip(".").rfind(".") + 1]
        for kind, tensor in self.named_parameters():
            whole = tensor if keep_vars else tensor.detach()
            for name, part in zip(self.parts, whole.split(self.rows), strict=True):
                destination[f"{outer}{name}.{kind}"] = part

    def join(self, state_dict: dict[str, Any], outer: str, name: str) -> list[str]:
        """Put one matrix in the place of the parts that a state dict holds; returns what is wrong with them."""
        wrong: list[str] = []
        for kind, whole in self.named_parameters():
            keys = [f"{outer}{part}.{kind}" for part in self.parts]
            shapes = [(rows, *whole.shape[1:]) for rows in self.rows]
            found = [
                f"size mismatch for {key}: expected {shape}, got {tuple(state_dict[key].shape)}"
                for key, shape in zip(keys, shapes, strict=True)
                if key in state_dict and state_dict[key].shape != shape
            ]
            wrong += found
            if not found and all(key in state_dict for key in keys):
                state_dict[f"{outer}{name}.{kind}"] = torch.cat([state_dict.pop(key) for key in keys])
        return wrong


def use_fp8(blocks: nn.ModuleList, product: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[str], list[str]]:
    """Have the linear layers of the blocks multiply by `product`, as Linear.fp8; (names in a block, those left out).

    A matrix is left out unless its sides are multiples of 16. Raises ValueError where all are.
    """
    taken: dict[str, None] = {}  # as sets, in their order
    left: dict[str, None] = {}
    for block in blocks:
        for name, layer in block.named_modules():
            if not isinstance(layer, Linear):
                continue
            rows, columns = layer.weight.shape
            if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
                left[f"{name} ({rows} x {columns})"] = None
            else:
                layer.fp8 = product
                taken[name] = None
    if not taken:
        raise ValueError(f"fp8: expected a matrix whose sides are multiples of {FP8_MULTIPLE}, got {', '.join(left)}")
    return list(taken), list(left)


class Sublayer(nn.Module):
    """A module whose JoinedLinears load from their parts."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name, module in self.named_children():
            if isinstance(module, JoinedLinear):
                error_msgs += module.join(state_dict, prefix, name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Embedding(nn.Embedding):
    """N(0, 1) truncated at three standard deviations (CS336, §3.4.1), or TIED_STD when it is the output matrix too."""

    def __init__(self, config: ModelConfig) -> None:
        self.std = TIED_STD if config.tie_embeddings else 1.0
        super().__init__(config.vocab_size, config.d_model)

    def reset_parameters(self) -> None:
        _truncated_normal(self.weight, self.std)


class RMSNorm(nn.Module):
    """Multiplies by weight + offset, which starts at 1."""

    def __init__(self, size: int, config: ModelConfig, ops: SimpleNamespace) -> None:
        super().__init__()
        self.eps, self.offset, self.ops = config.norm_eps, config.norm_offset, ops
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, weight_offset=self.offset)

    def of_sum(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + h, and x + h, in one pass over memory; of x alone where h is None."""
        if h is None:
            return self(x), x
        return self.ops.rms_norm(h, self.weight, self.eps, residual=x, weight_offset=self.offset)
