"""What a training step costs, component by component, from the configuration alone.

FLOPs are those of the matrix products, as the field counts them, in three ledgers that are never mixed:

    full       model FLOPs: every query against every key, T² pairs, whatever the mask (Chowdhery et al. 2022, app. B)
    exact      only the pairs that the mask leaves visible: T (T + 1) / 2 when causal
    executed   what the kernels run: whole tiles along the mask's edge, the scores once more in attention's backward
               pass, the loss's gradients in its forward (in fp16 the logits once more in its backward), and with
               checkpointing every block's forward once more

MFU quotes the full or the exact ledger against the machine's rate, HFU the executed one. Backward is 2x the forward in
the first two. Bytes are the least that the fused kernels move, and beside them what the same work moves unfused,
operator by operator (kernels/cost.py).

Seconds need measured ceilings: each kernel takes its own measured rate at the nearest sizes, or where it has none the
longest of its FLOPs, its bytes and its exponentials at the machine's rates (Williams et al. 2009); the step is their
sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..kernels.cost import Cost, itemsize
from .ceilings import Ceilings
from .communication import PARALLEL, Communication, Overlap, communication, sentences
from .config import ModelConfig
from .fp8 import IMITATED, NATIVE, InFp8, check_fp8
from .memory import OPS, OPTIMIZERS, Memory, in_low_precision, largest, largest_batch, memory, saved_activations
from .parts import LEDGERS, Work, in_fp8, parts, roofline
from .quantities import duration, figures, in_unit, quantity
from .typed import typed

__all__ = ["Ceilings", "Component", "Estimate", "Memory", "Pass", "estimate", "largest_batch"]


@dataclass(frozen=True)
class Pass:
    """One pass through a component. FLOPs are matrix products; elementwise_flops everything else's."""

    flops: int = 0  # in the estimate's ledger
    full_flops: int = 0
    exact_flops: int = 0
    executed_flops: int = 0
    elementwise_flops: int = 0
    bytes: int = 0
    unfused_bytes: int = 0
    exps: int = 0
    seconds: float | None = None
    bound_by: str = ""


@dataclass(frozen=True)
class Component:
    """One row: all of the model's layers together, for one step."""

    name: str
    parameters: int
    forward: Pass
    backward: Pass
    update: Pass
    saved_bytes: int  # activations kept from the forward for the backward pass

    @property
    def passes(self) -> tuple[Pass, Pass, Pass]:
        return self.forward, self.backward, self.update

    @property
    def flops(self) -> int:
        """Matrix-product FLOPs of forward and backward, in the estimate's ledger."""
        return sum(p.flops for p in self.passes)

    @property
    def elementwise_flops(self) -> int:
        return sum(p.elementwise_flops for p in self.passes)

    @property
    def bytes(self) -> int:
        """Bytes to and from memory, the least that fused kernels move."""
        return sum(p.bytes for p in self.passes)

    @property
    def unfused_bytes(self) -> int:
        """The same operator by operator."""
        return sum(p.unfused_bytes for p in self.passes)

    @property
    def seconds(self) -> float | None:
        """Predicted time; None without ceilings."""
        times = [p.seconds for p in self.passes if p.seconds is not None]
        return sum(times) if times else None

    @property
    def bound_by(self) -> str:
        """The limit of the longest pass; "" without ceilings."""
        return max(self.passes, key=lambda p: p.seconds or 0.0).bound_by


@dataclass(frozen=True)
class Estimate:
    """A training step's cost. Totals are over `components`; flops are matrix products in the ledger `causal` names."""

    config: ModelConfig
    batch_size: int
    context_length: int
    dtype: str
    causal: str
    checkpointing: bool
    gpus: int
    parallel: str
    reshard: bool
    ops: str
    optimizer: str
    components: tuple[Component, ...]
    memory: Memory
    ceilings: Ceilings | None = None
    link: float | None = None
    in_fp8: InFp8 | None = None

    @property
    def parameters(self) -> int:
        return sum(c.parameters for c in self.components)

    @property
    def forward_flops(self) -> int:
        return sum(c.forward.flops for c in self.components)

    @property
    def backward_flops(self) -> int:
        return sum(c.backward.flops for c in self.components)

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def ledgers(self) -> dict[str, dict[str, int]]:
        """{"full" | "exact" | "executed": {"forward": FLOPs, "backward": FLOPs}}."""
        return {
            ledger: {
                name: sum(getattr(getattr(c, name), f"{ledger}_flops") for c in self.components)
                for name in ("forward", "backward")
            }
            for ledger in LEDGERS
        }

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the training step, per device."""
        return self.memory.peak

    @property
    def tokens(self) -> int:
        """Tokens per step and device."""
        return self.batch_size * self.context_length

    @property
    def seconds(self) -> float | None:
        """Predicted time of one step's computation, forward, backward and update; None without ceilings."""
        return sum(c.seconds or 0.0 for c in self.components) if self.ceilings else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over all devices; None without ceilings."""
        return self.gpus * self.tokens / self.seconds if self.seconds else None

    @property
    def utilization(self) -> dict[str, float] | None:
        """Each ledger's FLOPs over the GEMM rate's in that time: MFU ("full", "exact") and HFU ("executed")."""
        if self.ceilings is None or not self.seconds:
            return None
        possible = self.seconds * self.ceilings.gemm_rate(self.dtype)
        return {ledger: sum(flops.values()) / possible for ledger, flops in self.ledgers.items()}

    @property
    def communication(self) -> Communication:
        return communication(
            self.config, self.parameters, gpus=self.gpus, dtype=self.dtype, parallel=self.parallel,
            reshard=self.reshard, optimizer=self.optimizer,
        )  # fmt: skip

    @property
    def communication_bytes(self) -> int:
        """What each device sends in a step."""
        return self.communication.step

    @property
    def overlap(self) -> Overlap | None:
        """The link's time beside the computation's; None without either rate."""
        if self.ceilings is None or self.link is None:
            return None
        forward, backward, update = (
            sum(p.seconds or 0.0 for p in passes) for passes in zip(*(c.passes for c in self.components), strict=True)
        )
        sent = self.communication
        link = sent.forward / self.link, sent.backward / self.link, sent.update / self.link
        return Overlap((forward, backward, update), link)

    def covering_batch(self) -> int | None:
        """The fewest sequences per device whose computation can hide the link; None without either rate."""
        if self.overlap is None:
            return None

        def bound(batch_size: int) -> bool:
            other = estimate(
                self.config, batch_size=batch_size, ceilings=self.ceilings, link=self.link, **self._settings()
            )
            return other.overlap is not None and other.overlap.bound_by != ""

        return largest(bound) + 1

    def _settings(self) -> dict[str, Any]:
        names = ("context_length", "dtype", "checkpointing", "gpus", "parallel", "reshard", "ops", "optimizer")
        return {name: getattr(self, name) for name in names} | {"fp8": self.in_fp8 is not None}

    def table(self) -> Table:
        """For rich.print: components, totals and what follows from them, a column in the unit that its head names."""
        rows, shares = self.components, [c.flops / self.flops for c in self.components]
        work = [c.flops or c.elementwise_flops or c.update.executed_flops for c in rows]
        columns: list[tuple[str, list[str]]] = [
            ("component", [*(c.name for c in rows), "total"]),
            in_unit("params", [*(c.parameters for c in rows), self.parameters], ""),
            in_unit("forward", [*(c.forward.flops for c in rows), self.forward_flops], "FLOP", self.backward_flops),
            in_unit("backward", [*(c.backward.flops for c in rows), self.backward_flops], "FLOP", self.backward_flops),
            ("share", [*(f"{share:.1%}" if share else "" for share in shares), "100%"]),
        ]
        if self.ceilings is not None:  # beside the FLOPs: narrow terminals show a few columns at a time
            columns.append(in_unit("time", [*(c.seconds or 0.0 for c in rows), self.seconds or 0.0], "s"))
            columns.append(("bound by", [*(c.bound_by for c in rows), ""]))
        columns += [
            in_unit("bytes", [*(c.bytes for c in rows), sum(c.bytes for c in rows)], "B"),
            in_unit("unfused", [*(c.unfused_bytes for c in rows), sum(c.unfused_bytes for c in rows)], "B"),
            ("FLOP/B", [*(figures(w / c.bytes) if c.bytes else "" for w, c in zip(work, rows, strict=True)), ""]),
            in_unit("saved", [*(c.saved_bytes for c in rows), self.memory.activations], "B"),
        ]
        table = Table(title=self._title(), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for head, _ in columns:
            table.add_column(head, justify="left" if head in ("component", "bound by") else "right")
        *components, total = zip(*(cells for _, cells in columns), strict=True)
        for row in components:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total, style="bold")
        table.caption = "\n".join(self.summary())
        table.caption_justify = "left"
        return table

    def _title(self) -> str:
        c = self.config
        return (
            f"{c.n_layer} layers, d_model {c.d_model}, {c.n_head}/{c.n_kv_head} heads of {c.head_dim}, {c.ffn} "
            f"{c.d_ff}; batch {self.batch_size} x {self.context_length}, {self.dtype}, {self.causal} ledger"
        )

    def summary(self) -> list[str]:
        """Ledgers, memory, and with ceilings the step's time and the batch that fits, a line each."""
        ledgers = (
            f"{name} {quantity(flops['forward'], digits=4)} + {quantity(flops['backward'], digits=4)}"
            for name, flops in self.ledgers.items()
        )
        m = self.memory
        held = {"parameters": m.parameters, "gradients": m.gradients, "moments": m.optimizer, "casts": m.casts}
        held |= {"activations": m.activations}
        parts = ", ".join(f"{name} {quantity(size, 'B')}" for name, size in held.items() if size)
        lines = [
            f"{self.parameters:,} parameters",
            f"FLOPs, forward + backward: {'; '.join(ledgers)}",
            f"peak memory {quantity(m.peak, 'B')}, at {m.peak_at}: {parts}",
        ]
        if self.in_fp8 is not None:
            lines += self.in_fp8.sentences(self.flops, self.dtype, self.ceilings)
        if self.gpus > 1:
            lines += sentences(self.communication, self.gpus, self.parallel, self.reshard, self.link, self.overlap)
        if self.ceilings is None or self.utilization is None:
            command = f"`rooflight bench ceilings --dtype {self.dtype}` measures them"
            return [*lines, f"no times: this machine's {self.dtype} ceilings are not measured yet; {command}"]
        used, peak = self.utilization, quantity(self.ceilings.gemm_rate(self.dtype), "FLOP/s")
        without = " without communication" if self.gpus > 1 else ""
        lines.append(
            f"step{without} {duration(self.seconds)}, {self.tokens_per_second:,.0f} tokens/s; of {peak}: MFU "
            f"{used['full']:.1%} (full) or {used['exact']:.1%} (exact), HFU {used['executed']:.1%}"
        )
        if (covering := self.covering_batch()) is not None:
            lines.append(f"smallest batch per GPU at which compute can hide the link: {covering}")
        if self.ceilings.memory_bytes is not None:
            fits = largest_batch(self.config, self.ceilings.memory_bytes, **self._settings())
            lines.append(f"largest batch in the device's {quantity(self.ceilings.memory_bytes, 'B')}: {fits}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the inputs, every component's passes, and the totals."""
        fields = asdict(self)
        fields["config"] = self.config.to_dict()
        fields["ceilings"] = self.ceilings.to_dict() if self.ceilings else None
        totals = ("parameters", "forward_flops", "backward_flops", "ledgers", "memory_bytes", "tokens", "seconds")
        rates = ("tokens_per_second", "utilization", "communication_bytes")
        fields |= {name: getattr(self, name) for name in (*totals, *rates)}
        fields["communication"] = asdict(self.communication)
        if self.overlap is not None:
            times = {"apart": self.overlap.apart, "overlapped": self.overlap.overlapped}
            fields["overlap"] = asdict(self.overlap) | times | {"bound_by": self.overlap.bound_by}
            fields["covering_batch"] = self.covering_batch()
        return fields


@typed
def estimate(
    config: ModelConfig,
    *,
    batch_size: int,
    context_length: int | None = None,
    dtype: str = "bfloat16",
    causal: str = "exact",
    checkpointing: bool = False,
    ceilings: Ceilings | None = None,
    gpus: int = 1,
    parallel: str = "fsdp",
    reshard: bool = True,
    link: float | None = None,
    ops: str = "triton",
    optimizer: str = "adamw",
    fp8: bool = False,
) -> Estimate:
    """What one training step of `config` costs per device.

    batch_size: sequences per device.  context_length: tokens in each; None: the configuration's.  dtype: of
    products and activations; parameters, gradients and moments are fp32.  causal: the ledger of the totals,
    "exact" or "full".  checkpointing: blocks keep their input only.  ceilings: measured rates; without them no time is
    predicted.
    gpus: devices, each with a batch of its own.  parallel: "fsdp", parameters, gradients and moments are sharded over
    them, or "ddp", each has all.  reshard: fsdp frees a block's weights after its forward pass.  link: bytes per second
    that each device can send; with ceilings, its time stands beside the computation's.
    ops: whose memory and casts they are, "triton" (rooflight.kernels on a GPU), "cpu" (the same on a plain CPU) or
    "eager" (the oracles).
    optimizer: "adamw" for every parameter, or "muon" for the blocks' matrices beside it.
    fp8: the blocks' products are in fp8, as TrainConfig.fp8 has it; on one device alone.
    Raises ValueError naming the argument.
    """
    T = config.context_length if context_length is None else context_length
    for name, value in (("batch_size", batch_size), ("context_length", T), ("gpus", gpus)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    if config.context_length < T:
        raise ValueError(f"context_length: expected at most the model's {config.context_length} positions, got {T}")
    if causal not in ("exact", "full"):
        raise ValueError(f"causal: expected 'exact' or 'full', got {causal!r}")
    if ops not in OPS:
        raise ValueError(f"ops: expected one of {', '.join(OPS)}, got {ops!r}")
    if parallel not in PARALLEL:
        raise ValueError(f"parallel: expected one of {', '.join(PARALLEL)}, got {parallel!r}")
    if link is not None and not (0 < link < math.inf and gpus > 1):
        raise ValueError(f"link: expected bytes per second > 0, between 2 gpus or more, got {link:g} and gpus {gpus}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    itemsize(dtype)
    if fp8:
        check_fp8(config, batch_size * T, gpus)
    how = "" if not fp8 else NATIVE if ops == "triton" else IMITATED
    copies, low = in_low_precision(dtype, ops, optimizer, gpus, parallel)
    rows = parts(
        config, batch_size, T, dtype, checkpointing=checkpointing, gpus=gpus, parallel=parallel, optimizer=optimizer,
        copies=copies, low_gradients=low, fp8=how,
    )  # fmt: skip
    parameters = sum(row.parameters for row in rows)
    saved = saved_activations(config, batch_size * T, T, dtype, ops, fp8)

    def total(works: Sequence[Work]) -> Pass:
        ledger = {name: sum(work.flops(name) for work in works) for name in LEDGERS}
        cost = sum((work.cost for work in works), Cost(0, 0))
        other = sum(work.cost.flops for work in works if not work.executed)
        seconds, bound_by = roofline(works, ceilings, dtype) if ceilings and works else (None, "")
        ledgers = ledger["full"], ledger["exact"], ledger["executed"]
        moved = cost.bytes, cost.unfused_bytes
        return Pass(ledger[causal], *ledgers, other, *moved, cost.exps, seconds, bound_by)

    components = tuple(
        Component(r.name, r.parameters, total(r.forward), total(r.backward), total(r.update), saved.get(r.name, 0))
        for r in rows
    )
    held = memory(
        config, parameters, batch_size=batch_size, context_length=T, dtype=dtype, checkpointing=checkpointing,
        gpus=gpus, parallel=parallel, reshard=reshard, ops=ops, optimizer=optimizer, fp8=fp8,
    )  # fmt: skip
    return Estimate(
        config, batch_size, T, dtype, causal, checkpointing, gpus, parallel, reshard, ops, optimizer, components, held,
        ceilings, link, in_fp8(rows, how, ceilings, dtype) if how else None,
    )  # fmt: skip
