"""Each component of a training step by itself, on the model's own modules and in the layouts it hands over.

A component is timed as one layer's calls, taken in turn on several inputs that together are larger than the
caches; its time in the step is that of a layer times the layers. The names are those of the
estimate's rows, so that predicted and measured stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model import ModelConfig, Transformer
from ...model.fp8 import block_matrices
from ..measure.clock import Call, median_seconds, on_capture_stream
from ..rates.kernel_rates import Leaves, both_passes, ops_on

# Of a component's rotating inputs: twice a CPU's last cache; on a GPU the clock itself clears the L2.
COLD_BYTES = {"cpu": 2**26, "cuda": 0}
COMPONENTS = 12  # of a step, that share the seconds


@dataclass(frozen=True)
class Task:
    """A call that runs `times` in every step, for a component; forward, backward or update."""

    component: str
    pass_: str
    call: Call
    times: int


@dataclass(frozen=True)
class Timed:
    """A component's measured seconds in one step."""

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.update


class Bench:
    """Makes the tasks of a model's components, for B sequences of T tokens in `dtype`."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        optimizer: str = "adamw",
        fp8: bool = False,
    ) -> None:
        self.config, self.B, self.T, self.dtype, self.device = config, batch_size, context_length, dtype, device
        self.optimizer = optimizer
        with device:
            self.model = Transformer(config, ops_on(device)[1])
        self.in_fp8 = {name: fp8 and matrix.fp8 for name, matrix in block_matrices(config).items()}
        self.N = batch_size * context_length

    def tasks(self) -> Iterator[list[Task]]:
        """A component's tasks at a time: what they need is freed before the next component's is made."""
        c, B, T = self.config, self.B, self.T
        d, H, K, D = c.d_model, c.n_head, c.n_kv_head, c.head_dim
        cos, sin = self.model.cos, self.model.sin
        mask = {"window": c.window, "softcap": c.softcap}
        ops = self.model.ops

        yield self._once("embedding", self._embedding)

        yield [
            *self._layers("norms", d, self._norms),
            *self._once("norms", self._first_norm),
        ]
        yield self._layers("QKV", d, lambda make: self._products("qkv", make(B, T, d), make))

        def heads(make: Leaves, count: int) -> Tensor:
            return make(B, T, count, D).transpose(1, 2)

        def rotation(make: Leaves) -> Call:
            if not c.qk_norm:
                qkv = make(B, T, (H + 2 * K) * D)
                return lambda: ops.rope_qkv(qkv, cos, sin, H, K)
            q, k = heads(make, H), heads(make, K)
            return lambda: ops.rope(q, k, cos, sin)

        yield self._layers("RoPE", (H + 2 * K) * D, rotation)

        def attention(make: Leaves) -> Call:
            q, k, v = heads(make, H), heads(make, K), heads(make, K)
            return lambda: ops.flash_attention(q, k, v, causal=True, **mask)

        yield self._layers("scores and weighted sum", (H + 2 * K) * D, attention)
        yield self._layers("output projection", H * D, lambda make: self._products("o", make(B, T, H * D), make))
        yield self._layers("FFN", d + c.d_ff, self._ffn)
        yield self._sums()
        yield self._once("logits", self._loss)
        if self.dtype != torch.float32 and (matrices := self._cast_matrices()):
            yield self._casts(matrices)
        yield self._update()

    def _layers(self, component: str, width: int, make_call: Callable[[Leaves], Call]) -> list[Task]:
        """One layer's call on each of several sets of inputs, `width` numbers wide for every token."""
        size = self.N * width * self.dtype.itemsize
        copies = max(1, min(self.config.n_layer, -(-COLD_BYTES[self.device.type] // size)))
        passes = [self._both(make_call) for _ in range(copies)]
        turns = [_in_turn([both[i] for both in passes]) for i in (0, 1)]
        return self._pair(component, turns, self.config.n_layer)

    def _once(self, component: str, make_call: Callable[[Leaves], Call]) -> list[Task]:
        return self._pair(component, self._both(make_call), 1)

    def _pair(self, component: str, calls: Any, times: int) -> list[Task]:
        return [Task(component, name, call, times) for name, call in zip(("forward", "backward"), calls, strict=True)]

    def _both(self, make_call: Callable[[Leaves], Call]) -> tuple[Call, Call]:
        leaves = Leaves(self.dtype, self.device)
        call = make_call(leaves)
        return both_passes(call, leaves.made)

    def _embedding(self, make: Leaves) -> Call:
        weight, tokens = self.model.embedding.weight, self._tokens()
        make.made.append(weight)
        return lambda: F.embedding(tokens, weight).to(self.dtype)

    def _tokens(self) -> Tensor:
        return torch.randint(self.config.vocab_size, (self.B, self.T), device=self.device)

    def _first_norm(self, make: Leaves) -> Call:
        x, norm = make(self.B, self.T, self.config.d_model), cast(Any, self.model.layers[0]).attention_norm
        make.made.append(norm.weight)
        return lambda: norm(x)

    def _norms(self, make: Leaves) -> Call:
        c, block = self.config, cast(Any, self.model.layers[0])
        x, h = make(self.B, self.T, c.d_model), make(self.B, self.T, c.d_model)
        calls: list[Call] = [partial(norm.of_sum, x, h) for norm in (block.attention_norm, block.ffn_norm)]
        make.made += [block.attention_norm.weight, block.ffn_norm.weight]
        if c.qk_norm:
            q, k = (make(self.B, self.T, heads, c.head_dim) for heads in (c.n_head, c.n_kv_head))
            calls += [partial(block.attention.q_norm, q), partial(block.attention.k_norm, k)]
            make.made += [block.attention.q_norm.weight, block.attention.k_norm.weight]
        return lambda: tuple(y for call in calls for y in _as_tuple(call()))

    def _matrix(self, make: Leaves, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """A weight that keeps what it multiplies at unit size, as a model's does: exponentials then stay in range."""
        return make(rows, columns, dtype=dtype, scale=columns**-0.5)

    def _products(self, name: str, x: Tensor, make: Leaves) -> Call:
        """x times one of a block's matrices; that is already in the dtype (the casts are a row of their own)."""
        return partial(self._product(name, make), x)

    def _product(self, name: str, make: Leaves) -> Callable[[Tensor], Tensor]:
        """In fp8 on a CPU of the fp32 weight, as a model there has no other."""
        n, k = block_matrices(self.config)[name]
        fp8 = self.in_fp8[name]
        weight = self._matrix(make, n, k, torch.float32 if fp8 and self.device.type == "cpu" else None)
        multiply = ops_on(self.device)[1].fp8_linear if fp8 else F.linear
        return lambda x: multiply(x, weight)

    def _ffn(self, make: Leaves) -> Call:
        c, ops = self.config, self.model.ops
        x = make(self.B, self.T, c.d_model)
        up, down = self._product("up", make), self._product("down", make)
        activation = ops.gelu if c.ffn == "gelu" else ops.swiglu
        return lambda: down(activation(up(x)))

    def _sums(self) -> list[Task]:
        """The gradients of the first norm's input, which two have read; every other sum is a norm's own."""
        shape = self.B, self.T, self.config.d_model
        make = Leaves(self.dtype, self.device)
        copies = max(2, min(2 * self.config.n_layer, COLD_BYTES[self.device.type] // (self.N * shape[-1] * 2)))
        pairs = [(make(*shape).detach(), make(*shape).detach()) for _ in range(copies)]
        return [Task("residual sums", "backward", _in_turn([_sum(*pair) for pair in pairs]), 1)]

    def _loss(self, make: Leaves) -> Call:
        c = self.config
        x, target = make(self.N, c.d_model), self._tokens().flatten()
        weight = self._matrix(make, c.vocab_size, c.d_model, torch.float32)
        return lambda: self.model.ops.linear_cross_entropy(x, weight, target)

    def _cast_matrices(self) -> list[Tensor]:
        """The blocks' matrices that autocast casts, in fp8 none; on a GPU those whose gradients are, Muon's."""
        gpu = self.device.type != "cpu"
        if gpu and self.optimizer != "muon":
            return []
        matrices = [p for p in self.model.layers.parameters() if p.dim() == 2]
        taken = {tuple(m) for name, m in block_matrices(self.config).items() if self.in_fp8[name] and not gpu}
        return [p for p in matrices if tuple(p.shape) not in taken]

    def _casts(self, matrices: list[Tensor]) -> list[Task]:
        """What autocast casts: these matrices, and their gradients back; on a GPU the gradients alone."""
        low = [p.detach().to(self.dtype) for p in matrices]

        def forward() -> None:
            for p in matrices:
                p.detach().to(self.dtype)

        def backward() -> None:
            for p in low:
                p.to(torch.float32)

        both = self._pair("casts", (forward, backward), 1)
        return both[self.device.type != "cpu" :]

    def _update(self) -> list[Task]:
        from ...training.optim import build_optimizers, low_precision

        copies = low_precision(self.device, self.dtype)
        optimizers = build_optimizers(self.model, optimizer=self.optimizer, lr=1e-3, muon_dtype=self.dtype, **copies)
        for p in self.model.parameters():
            p.grad = torch.randn_like(p, dtype=getattr(p, "grad_dtype", p.dtype))
        return [Task(type(each).__name__, "update", each.step, 1) for each in optimizers]


def _as_tuple(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _sum(a: Tensor, b: Tensor) -> Call:
    return lambda: a + b


def _in_turn(calls: list[Call]) -> Call:
    """One call that runs the next of the list each time, round and round."""
    turn = cycle(calls)
    return lambda: next(turn)()


def measure_components(
    config: ModelConfig,
    batch_size: int,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    optimizer: str = "adamw",
    fp8: bool = False,
    seconds: float = 10.0,
    progress: Callable[[str], object] = lambda what: None,
) -> dict[str, Timed]:
    """Each component's seconds in one step, for about `seconds` in all; named as the rows of the estimate."""
    bench = Bench(config, batch_size, context_length, dtype, device, optimizer, fp8)
    times: dict[str, dict[str, float]] = {}
    with on_capture_stream(device):
        for tasks in bench.tasks():
            progress(tasks[0].component)
            medians = median_seconds([task.call for task in tasks], device, seconds=min(1.0, seconds / COMPONENTS))
            for task, median in zip(tasks, medians, strict=True):
                passes = times.setdefault(task.component, {})
                passes[task.pass_] = passes.get(task.pass_, 0.0) + task.times * median
    return {name: Timed(**passes) for name, passes in times.items()}
