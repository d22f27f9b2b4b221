"""AdamW on many tensors in one launch, with a low-precision copy of each weight (Loshchilov & Hutter 2019, alg. 2).

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)        copy <- w

Nothing is stored in between: 28 bytes a parameter where gradient and copy have two each, 28 with a gradient of four and
no copy. The learning rate and the steps t are read from the device, so that a captured graph follows both.

The tensors stand in a table in memory: their addresses, their sizes and the tiles that they take. Program p of P takes
tiles p, p + P, p + 2 P, ... of all tensors together and steps through the table as it goes; no tensor is a launch of
its own, and none is too short to fill the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .rows import multiprocessors

__all__ = ["AdamWTables", "adamw_update"]

# Elements of a tile: 16 a thread over 4 warps, four 16-byte loads of each fp32 operand on their way.
TILE = 2048
WARPS = 4
# Programs of a multiprocessor: 126 registers a thread (docs/artifacts.md) leave room for 4, which have 115 KB on their
# way where 16 are needed (bench/NOTES.md).
PROGRAMS = 4

# A row of the table; `past` is the tile after the tensor's last.
FIELDS = ("weight", "gradient", "mean", "square", "copy", "step", "size", "first", "past")
WIDTH = tl.constexpr(len(FIELDS))


@triton.jit
def _pointer(entry, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["n_tile"])
def _adamw_kernel(
    table_ptr, lr_ptr, factor_ptr, n_tile, beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """rest: 1 - beta, rounded once.  COPY: the copies' dtype, None where there are none."""
    lr = tl.load(lr_ptr)
    factor = tl.load(factor_ptr) if factor_ptr is not None else 1.0
    entry = table_ptr
    for tile in tl.range(tl.program_id(0), n_tile, tl.num_programs(0)):
        while tile >= tl.load(entry + 8):
            entry += WIDTH
        size = tl.load(entry + 6)
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        at = (tile - tl.load(entry + 7)) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        w_ptr = _pointer(entry, tl.float32, ALIGNED) + at
        m_ptr = _pointer(entry + 2, tl.float32, ALIGNED) + at
        v_ptr = _pointer(entry + 3, tl.float32, ALIGNED) + at
        g = tl.load(_pointer(entry + 1, GRADIENT, ALIGNED) + at, mask=mask, other=0.0).to(tl.float32) * factor
        w = tl.load(w_ptr, mask=mask, other=0.0)
        m = tl.load(m_ptr, mask=mask, other=0.0)
        v = tl.load(v_ptr, mask=mask, other=0.0)
        # 1 - beta^t cancels for a small t: in fp64
        t = tl.load(tl.load(entry + 5).to(tl.pointer_type(tl.float32))).to(tl.float64)
        correction1 = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
        correction2 = (1.0 - tl.exp(t * log_beta2)).to(tl.float32)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w -= lr * weight_decay * w
        w -= lr / correction1 * (m / (tl.sqrt(v) / tl.sqrt(correction2) + eps))
        tl.store(w_ptr, w, mask=mask)
        tl.store(m_ptr, m, mask=mask)
        tl.store(v_ptr, v, mask=mask)
        if COPY is not None:
            tl.store(_pointer(entry + 4, COPY, ALIGNED) + at, w.to(COPY), mask=mask)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class AdamWTables:
    """Tables on the device, kept by what stands in them: gradients often come back to the same addresses.

    A capture cannot make one, for it allocates no pinned memory. It takes a spare that earlier steps have left, one for
    every table that they made, and the graph copies its rows from pinned memory in every replay.
    """

    KEPT = 16

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._spare: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # by length, device: pinned, on the device
        self._captured: list[tuple[Tensor, Tensor]] = []

    def of(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        where = device.index or 0
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not self._spare.get((len(rows), where)):
                raise RuntimeError("AdamW: expected a step with as many tensors before one is captured in a graph")
            pair = self._spare[len(rows), where].pop()
            self._captured.append(pair)  # the graph's for good
            pinned, table = pair
            pinned.copy_(torch.tensor(rows, dtype=torch.int64))
            return table.copy_(pinned, non_blocking=True)
        if (*rows, where) not in self._known:
            if len(self._known) >= self.KEPT:
                self._known.clear()
            host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._known[*rows, where] = host.to(device, non_blocking=True)
            spare = self._spare.setdefault((len(rows), where), [])
            if device.type == "cuda" and len(spare) < self.KEPT:
                spare.append((torch.empty_like(host, pin_memory=True), torch.empty_like(host, device=device)))
        return self._known[*rows, where]


def adamw_update(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
    steps: Sequence[Tensor], copies: Sequence[Tensor | None], tables: AdamWTables, *, lr: Tensor, beta1: float,
    beta2: float, eps: float, weight_decay: float, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of AdamW on every weight, in place; copies get the new weights.

    weights, means, squares: contiguous, fp32.  gradients: of any float dtype, contiguous.  copies: contiguous, or None.
    steps: fp32 scalars, this step counted.  lr: an fp32 scalar.  factor: another, which multiplies the gradients in the
    kernel, as clipping does. All on one device; nothing waits for it.
    Launches once for each pair of dtypes of gradient and copy that occurs. Version counters are the caller's.
    Raises ValueError on a tensor that is not contiguous or of another dtype.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype | None, bool], list[int]] = {}
    past: dict[tuple[torch.dtype, torch.dtype | None, bool], int] = {}
    for w, g, m, v, step, c in zip(weights, gradients, means, squares, steps, copies, strict=True):
        tensors = (w, g, m, v) if c is None else (w, g, m, v, c)
        if not all(x.is_contiguous() for x in tensors):
            raise ValueError(f"gradients: expected contiguous tensors beside contiguous weights, got {g.stride()}")
        if not (w.dtype == m.dtype == v.dtype == step.dtype == torch.float32 and g.dtype in _DTYPES):
            raise ValueError(f"weights: expected float32, its moments and step too, got {w.dtype}, {m.dtype}")
        size = w.numel()
        if size == 0:
            continue
        addresses = [x.data_ptr() for x in tensors]
        kind = g.dtype, None if c is None else c.dtype, not (size % 16 or any(a % 16 for a in addresses))
        rows, first = kinds.setdefault(kind, []), past.get(kind, 0)
        past[kind] = first + -(-size // TILE)
        rows += [*addresses[:4], 0 if c is None else addresses[4], step.data_ptr(), size, first, past[kind]]
    constants = (beta1, 1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2), eps, weight_decay)
    for (gradient, copy, aligned), rows in kinds.items():
        n_tile = past[gradient, copy, aligned]
        device = weights[0].device
        programs = min(n_tile, PROGRAMS * multiprocessors(device))
        launch(
            _adamw_kernel, (programs,),
            tables.of(tuple(rows), device), lr, factor, n_tile, *map(float, constants),
            BLOCK=TILE, GRADIENT=_DTYPES[gradient], COPY=None if copy is None else _DTYPES[copy], ALIGNED=aligned,
            num_warps=WARPS,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e30
