"""Products in fp8 as the estimate knows them: which matrices have them, what they need, how fast they are.

native     tensor cores multiply what kernels/fp8.py has cast
imitated   the oracle multiplies the same operands in fp32, on a CPU
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.reference import FP8_MULTIPLE
from .ceilings import FP8_RATIO, Ceilings
from .config import ModelConfig
from .quantities import duration, quantity

NATIVE, IMITATED = "native", "imitated"
SCALES = 2 * 4  # bytes that each product keeps for its backward pass: of its input and its weight


class Matrix(NamedTuple):
    """One of a block's matrices as it is multiplied; fp8: whether fp8 can have it."""

    rows: int
    columns: int

    @property
    def fp8(self) -> bool:
        return self.rows % FP8_MULTIPLE == 0 and self.columns % FP8_MULTIPLE == 0

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def block_matrices(c: ModelConfig) -> dict[str, Matrix]:
    """A block's matrices: "qkv", "o", "up" (with the gate, where there is one) and "down"."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    return {
        "qkv": Matrix(q + 2 * kv, c.d_model),
        "o": Matrix(c.d_model, q),
        "up": Matrix(c.d_ff * (1 if c.ffn == "gelu" else 2), c.d_model),
        "down": Matrix(c.d_model, c.d_ff),
    }


def check_fp8(c: ModelConfig, n_token: int, gpus: int) -> None:
    """Raise ValueError naming fp8 where a run with these sizes would be refused."""
    if gpus > 1:
        raise ValueError(f"fp8: expected False over several gpus, of which training has none in fp8, got {gpus} gpus")
    if n_token % FP8_MULTIPLE:
        raise ValueError(f"fp8: expected a multiple of {FP8_MULTIPLE} tokens, got {n_token}")
    shapes = block_matrices(c).values()
    if not any(matrix.fp8 for matrix in shapes):
        told = ", ".join(f"{rows} x {columns}" for rows, columns in shapes)
        raise ValueError(f"fp8: expected a matrix whose sides are multiples of {FP8_MULTIPLE}, got {told}")


@dataclass(frozen=True)
class InFp8:
    """What of a step is in fp8.

    how          NATIVE or IMITATED
    flops        of the products, which every ledger but the executed one counts alike
    cast_bytes   what the casts move: of inputs, weights and gradients
    product_seconds, cast_seconds   None without ceilings
    """

    how: str
    flops: int
    cast_bytes: int
    product_seconds: float | None
    cast_seconds: float | None

    def sentences(self, flops: int, dtype: str, ceilings: Ceilings | None) -> list[str]:
        """How much that is of the step's FLOPs, and on which rate its time stands."""
        times = [f", {duration(t)}" if t else "" for t in (self.product_seconds, self.cast_seconds)]
        share = f"{quantity(self.flops, 'FLOP')} ({self.flops / flops:.0%})"
        lines = [f"in fp8: products of {share}{times[0]}; casts of {quantity(self.cast_bytes, 'B')}{times[1]}"]
        if ceilings is None:
            return lines
        if self.how == IMITATED:
            return [*lines, "a CPU imitates them: products in fp32, casts operator by operator"]
        rates = {pass_: ceilings.fp8_rate(dtype, pass_) for pass_ in ("forward", "backward")}
        if ceilings.fp8_flops:
            told = ", ".join(f"{pass_} {quantity(rate, 'FLOP/s')}" for pass_, (rate, _) in rates.items())
            return [*lines, f"fp8's rate, measured: {told}"]
        rate, alike = rates["forward"]
        return [
            *lines,
            f"fp8's rate is not measured on this machine: {quantity(rate, 'FLOP/s')} is {FP8_RATIO:g} times {alike}'s, "
            "as an H100's data sheet has it",
        ]
