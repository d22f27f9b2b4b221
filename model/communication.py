"""What devices send one another in a training step, and what a link between them makes of it.

Bytes are those that one device sends; as many reach it. A ring of N devices sends the least there is: (N - 1) / N of a
tensor that is gathered, or reduced and scattered, and twice that of one that is all-reduced, which is one after the
other (Patarasuk & Yuan 2009).

    ddp     parameters are whole on each device; their gradients are all-reduced, fp32, in the backward pass
    fsdp    parameters are sharded: in the products' dtype each block's are gathered for the forward pass and, as they
            are resharded after it, once more for the backward pass, the embedding's, the last norm's and the output
            matrix's once for both; all gradients are reduced and scattered, fp32

Of Muon's matrices each is orthogonalized by one device, which sends the result, in the products' dtype, to the others:
by ddp all of it, by fsdp to each its rows, after they have sent it theirs of the update, fp32. Devices have unlike
numbers of matrices where these do not divide; told is the mean.

A step's scalars (the norm of the gradients, the loss) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cost import itemsize
from .config import ModelConfig, hidden_matrices
from .memory import FP32
from .quantities import duration, quantity

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Communication:
    """Bytes that each device sends in a step's forward and backward pass, and in the optimizer's update (Muon's).

    start: once, before the first step: the parameters of one device, passed on from each to the next (ddp).
    """

    forward: int = 0
    backward: int = 0
    update: int = 0
    start: int = 0

    @property
    def step(self) -> int:
        return self.forward + self.backward + self.update


def communication(
    c: ModelConfig, parameters: int, *, gpus: int, dtype: str, parallel: str, reshard: bool, optimizer: str
) -> Communication:
    """What a model with that many parameters sends; `reshard` is fsdp's."""
    matrices = hidden_matrices(c) if optimizer == "muon" else {}
    turned = sum(short * long * n for (short, long), n in matrices.items())
    if parallel == "ddp":
        forward, backward, update = 0, 2 * parameters * FP32, turned * itemsize(dtype)
        start = parameters * FP32 * (gpus > 1)
    else:
        # the outermost module's: FSDP2 does not reshard them
        outermost = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2) + c.d_model
        again = (parameters - outermost) * itemsize(dtype) * reshard
        forward, backward = parameters * itemsize(dtype), again + parameters * FP32
        update, start = turned * (FP32 + itemsize(dtype)) // gpus, 0
    forward, backward, update = (sent * (gpus - 1) // gpus for sent in (forward, backward, update))
    return Communication(forward, backward, update, start)


@dataclass(frozen=True)
class Overlap:
    """A step's seconds: forward, backward and update of its computation beside those of a link.

    The link works while the same pass computes, at best during all of it: what a pass needs before it begins and sends
    after it has ended is hidden too, so `overlapped` is the least that a step can take and `apart` the most. What the
    update sends nothing hides: Muon waits for it.
    """

    compute: tuple[float, float, float]
    link: tuple[float, float, float]

    @property
    def apart(self) -> float:
        return sum(self.compute) + sum(self.link)

    @property
    def overlapped(self) -> float:
        return sum(map(max, self.compute[:2], self.link[:2])) + self.compute[2] + self.link[2]

    @property
    def bound_by(self) -> str:
        """The passes ("forward", "backward" or both) in which the link takes longer than what it could hide behind."""
        longer = (n for n, c, sent in zip(("forward", "backward"), self.compute, self.link, strict=False) if sent > c)
        return " and ".join(longer)


def sentences(
    sent: Communication, gpus: int, parallel: str, reshard: bool, link: float | None, step: Overlap | None
) -> list[str]:
    """What is sent and, given a link in bytes per second, which of it and the computation bounds the step."""
    how = "ddp" if parallel == "ddp" else "fsdp" if reshard else "fsdp without resharding"
    passes = {"forward pass": sent.forward, "backward pass": sent.backward, "update": sent.update}
    told = ", ".join(f"{quantity(size, 'B')} in the {name}" for name, size in passes.items() if size)
    before = f"; once before the first {quantity(sent.start, 'B')}" if sent.start else ""
    lines = [f"{how} over {gpus} GPUs: each sends {quantity(sent.step, 'B')} a step, {told}{before}"]
    if link is None:
        return [*lines, "no time is given to that; --link GB/s says what each sends in a second"]
    takes = f"at {quantity(link, 'B/s')} that takes {duration(sent.step / link)}"
    if step is None:
        return [*lines, f"{takes}: the link is the bound where the passes that it could hide behind take less"]
    bound = f"the link is the bound in the {step.bound_by} pass" if step.bound_by else "compute is the bound"
    lines.append(
        f"{takes}, beside {duration(sum(step.compute))} of compute: {bound}; the step {duration(step.apart)} one after "
        f"the other, {duration(step.overlapped)} overlapped"
    )
    return lines
