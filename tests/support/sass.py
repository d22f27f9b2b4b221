"""What an inner loop costs, read from cuobjdump's listing of a kernel: a bound on its speed without running it.

    bounds = inner_loops(listing, "sm_90", num_warps=8)      # one Bound for each partition of warps that multiplies

Cycles are those of one multiprocessor for one iteration by all the warps that run the loop, for each resource as if it
were alone: the tensor cores, the exponentials (MUFU), the FP32 and the integer pipes, shared memory, the issue slots.
With ideal overlap the largest of them bounds the loop; with none, products and everything else add up. Bank conflicts,
latencies and memory beyond the multiprocessor are not seen: a bound is what cannot be beaten, not a prediction.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Cycles that one warp's instruction holds a pipe of its quarter of a multiprocessor: 32 lanes over the lanes there are.
# CUDA C++ Programming Guide, "Throughput of native arithmetic instructions": per multiprocessor and cycle 16
# exponentials, 64 integer operations, comparisons, conversions and integer multiplications; 128 FP32 operations, 64 on
# sm_80.
MUFU, INTEGER = 8, 2
FP32 = {"sm_80": 2, "sm_86": 1, "sm_89": 1, "sm_90": 1}
# 16 x 8 x 16 products of 2-byte numbers (HMMA): at the rate of the data sheet's dense bf16 peak, and as executed. On
# sm_90 the warp-wide instruction reaches 0.63 of that peak, which only HGMMA does (Luo et al. 2024, arXiv 2402.13499).
HMMA_PEAK = {"sm_80": 8.0, "sm_86": 16.0, "sm_89": 16.0, "sm_90": 4.0}
HMMA_COST = HMMA_PEAK | {"sm_90": 4.0 / 0.63}
SHARED_BYTES = 128  # that a multiprocessor's shared memory moves in a cycle

FMA_PIPE = {"FFMA", "FMUL", "FADD"}
ALU_PIPE = {
    "F2FP", "FMNMX", "FSEL", "FSETP", "I2FP", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL",
    "SHF", "VIADD", "VIMNMX",
}  # fmt: skip
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Bound:
    """One loop's cycles by resource, and what it makes of the tensor cores.

    peak: the cycles its products would take at the data sheet's rate.  exponentials: how many, and how many of them
    stand where a product is in flight.  serialised: products cut by a wait between two of their own instructions.
    spills: loads and stores of spilled registers.
    """

    warps: int
    instructions: int
    cycles: dict[str, float]
    peak: float
    exponentials: int
    overlapped: int
    serialised: int
    spills: int = 0
    address: int = field(compare=False, default=0)

    @property
    def limit(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def ideal(self) -> float:
        """The share of the tensor cores' peak when everything overlaps."""
        return self.peak / max(self.cycles.values())

    @property
    def in_turn(self) -> float:
        """The share when no product overlaps anything else."""
        products = {"tensor", "shared"}
        rest = max(cycles for name, cycles in self.cycles.items() if name not in products)
        return self.peak / (max(self.cycles[name] for name in products) + rest)


def parse(listing: str) -> list[Instruction]:
    found = (LINE.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in found if m]


def opcodes(listing: str) -> Counter[str]:
    """How often each opcode, with its modifiers, stands in the listing."""
    return Counter(i.opcode for i in parse(listing))


def inner_loops(listing: str, target: str, num_warps: int) -> list[Bound]:
    """The hot loop's bound; of a kernel whose warps specialise, the hot loop of each partition that multiplies.

    Of several innermost loops with products (whole and masked blocks) the hot one has the most products and, among
    equals, the fewest instructions. num_warps: of a kernel whose warps all run the same code. Empty for a kernel
    without products, and for targets whose listing does not tell their shapes.
    """
    code = parse(listing)
    borders = [i.address for i in code if i.opcode.startswith("USETMAXREG")]
    hot: dict[int, Bound] = {}
    for body in _tensor_loops(code) if target in FP32 else ():
        partition = sum(border < body[0].address for border in borders)
        warps = _partition_warps(code, borders, partition) if borders else num_warps
        bound = _bound(body, target, warps)
        best = hot.get(partition)
        if best is None or (-bound.peak, bound.instructions) < (-best.peak, best.instructions):
            hot[partition] = bound
    return [hot[partition] for partition in sorted(hot)]


def together(bounds: Sequence[Bound]) -> Bound:
    """The bound of partitions that run at once on one multiprocessor."""
    names = bounds[0].cycles
    return Bound(
        warps=sum(b.warps for b in bounds),
        instructions=max(b.instructions for b in bounds),
        cycles={name: sum(b.cycles[name] for b in bounds) for name in names},
        peak=sum(b.peak for b in bounds),
        exponentials=sum(b.exponentials for b in bounds),
        overlapped=sum(b.overlapped for b in bounds),
        serialised=sum(b.serialised for b in bounds),
        spills=sum(b.spills for b in bounds),
        address=bounds[0].address,
    )


# ---------------------------------------------------------------- loops


def blocks_of(code: list[Instruction]) -> tuple[list[list[Instruction]], list[set[int]]]:
    """Basic blocks in the order of addresses, and the successors of each."""
    leaders = {at.address for at in code[:1]}
    for n, at in enumerate(code):
        if at.name in ("BRA", "BRX", "EXIT", "RET"):
            leaders |= {after.address for after in code[n + 1 : n + 2]}
            if (to := _destination(at)) is not None:
                leaders.add(to)
    blocks: list[list[Instruction]] = []
    for at in code:
        if at.address in leaders:
            blocks.append([])
        blocks[-1].append(at)
    index = {block[0].address: n for n, block in enumerate(blocks)}
    successors: list[set[int]] = []
    for n, block in enumerate(blocks):
        last = block[-1]
        to = _destination(last)
        successors.append({index[to]} if to in index else set())
        conditional = last.predicated or last.operands.startswith(("P", "!P", "UP", "!UP"))  # BRA UP0, 0x100
        if (conditional or last.name not in ("BRA", "BRX", "EXIT", "RET")) and n + 1 < len(blocks):
            successors[n].add(n + 1)
    return blocks, successors


def _destination(at: Instruction) -> int | None:
    found = re.search(r"0x([0-9a-f]+)", at.operands) if at.name == "BRA" else None
    return int(found[1], 16) if found else None


def _dominators(successors: list[set[int]]) -> list[set[int]]:
    """For each block the blocks that every path to it passes. An indirect branch may lead to whatever no other does."""
    roots, reached = set(), set()
    for n in range(len(successors)):
        if n not in reached:
            roots.add(n)
            todo = [n]
            while todo:
                block = todo.pop()
                if block not in reached:
                    reached.add(block)
                    todo += successors[block]
    predecessors = _predecessors(successors)
    everything = set(range(len(successors)))
    dominators = [{n} if n in roots else everything for n in range(len(successors))]
    changed = True
    while changed:
        changed = False
        for n in everything - roots:
            new = set.intersection(*(dominators[m] for m in predecessors[n])) | {n}
            changed |= new != dominators[n]
            dominators[n] = new
    return dominators


def _predecessors(successors: list[set[int]]) -> list[set[int]]:
    predecessors: list[set[int]] = [set() for _ in successors]
    for n, following in enumerate(successors):
        for m in following:
            predecessors[m].add(n)
    return predecessors


def _tensor_loops(code: list[Instruction]) -> Iterable[list[Instruction]]:
    """The innermost loops with products, without the loops inside them in which a barrier is waited for."""
    blocks, successors = blocks_of(code)
    dominators = _dominators(successors)
    predecessors = _predecessors(successors)
    loops: dict[int, set[int]] = {}  # header: its natural loop
    for n, following in enumerate(successors):
        for header in following & dominators[n]:
            body, todo = {header}, [n]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += predecessors[block]
            loops[header] = loops.get(header, set()) | body
    multiplies = {n for n, block in enumerate(blocks) if any(i.name in ("HGMMA", "HMMA") for i in block)}
    for header, body in loops.items():
        inside = [other for h, other in loops.items() if h != header and other < body]
        if not body & multiplies or any(other & multiplies for other in inside):
            continue
        waiting: set[int] = set().union(*inside)
        waiting |= {n for n in body if predecessors[n] <= waiting}  # the way back to the loop
        yield [i for n in sorted(body - waiting) for i in blocks[n]]


def _partition_warps(code: list[Instruction], borders: list[int], partition: int) -> int:
    """Warps of a partition, from the threads that its named barriers count; a warpgroup where there is none."""
    start = borders[partition - 1] if partition else 0
    end = borders[partition] if partition < len(borders) else code[-1].address
    threads = [
        int(found[1], 16)
        for i in code
        if start <= i.address < end and i.name == "BAR" and (found := re.search(r", 0x([0-9a-f]+)$", i.operands))
    ]
    return max(threads, default=128) // 32


# ---------------------------------------------------------------- costs


def _bound(body: list[Instruction], target: str, warps: int) -> Bound:
    quarter = warps / 4  # warps of each of the multiprocessor's four schedulers
    names = Counter(i.name for i in body)
    hmma = sum(_hmma(i) for i in body if i.name == "HMMA")
    hgmma = sum(_columns(i) / 2 for i in body if i.name == "HGMMA")  # 64 x N x 32 bytes, 1024 FMA a cycle and quarter
    operands = sum(_columns(i) * 32 + (64 * 32 if _both_shared(i) else 0) for i in body if i.name == "HGMMA")
    moved = sum(_lane_bytes(i) * 32 for i in body if i.name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"))
    cycles = {
        "tensor": hgmma * quarter + hmma * HMMA_COST[target] * quarter,
        "exp": names["MUFU"] * MUFU * quarter,
        "fma": (sum(names[n] for n in FMA_PIPE) * FP32[target] + names["IMAD"] * INTEGER) * quarter,
        "alu": sum(names[n] for n in ALU_PIPE) * INTEGER * quarter,
        "shared": (operands * quarter + moved * warps) / SHARED_BYTES,
        "issue": len(body) * quarter,
    }
    exponentials, overlapped = _overlap(body)
    peak = hgmma * quarter + hmma * HMMA_PEAK[target] * quarter
    spills = names["LDL"] + names["STL"]
    return Bound(
        warps, len(body), cycles, peak, exponentials, overlapped, _serialised(body), spills, body[0].address
    )  # fmt: skip


def _columns(hgmma: Instruction) -> int:
    return int(re.search(r"64x(\d+)x", hgmma.opcode)[1])  # type: ignore[index]


def _hmma(hmma: Instruction) -> float:
    """Products of this instruction, in those of 16 x 8 x 32 bytes."""
    return 1.0 if re.search(r"\.16816\b|\.1688\.F32\.TF32", hmma.opcode) else 0.5


def _both_shared(hgmma: Instruction) -> bool:
    """Whether the left operand too is read from shared memory: only the accumulator stands before the descriptor."""
    return re.match(r"R\d+, gdesc", hgmma.operands) is not None


def _lane_bytes(access: Instruction) -> int:
    """Bytes that each lane moves."""
    if access.name in ("LDSM", "STSM"):
        found = re.search(r"\.([24])$", access.opcode)
        return 4 * int(found[1]) if found else 4
    found = re.search(r"\.(64|128)\b", access.opcode)
    return int(found[1]) // 8 if found else 4


def _wait(at: Instruction) -> int | None:
    """How many groups of products may still be in flight after this wait; None for any other instruction."""
    found = re.search(r"0x([0-9a-f]+)$", at.operands) if at.opcode.startswith("WARPGROUP.DEPBAR") else None
    return int(found[1], 16) if found else None


def _overlap(body: list[Instruction]) -> tuple[int, int]:
    """Exponentials of one iteration, and those issued while a group of products is in flight, in the steady state."""
    flight = 0
    for _ in range(2):  # the first round leaves in flight what the second starts with
        total = overlapped = 0
        for at in body:
            if at.name == "HGMMA" and "gsb0" in at.operands:
                flight += 1
            elif (left := _wait(at)) is not None:
                flight = min(flight, left)
            elif at.opcode.startswith("MUFU.EX2"):
                total += 1
                overlapped += flight > 0
    return total, overlapped


def _serialised(body: list[Instruction]) -> int:
    """Groups beyond one for each product: where ptxas serialises HGMMA, every instruction is a group and waited for."""
    groups = products = 0
    before = None
    for at in body:
        if at.name != "HGMMA":
            continue
        accumulator = at.operands.partition(",")[0]
        fresh = accumulator != before or "RZ, !UPT" in at.operands
        products += fresh
        groups += "gsb0" in at.operands
        before = accumulator
    return max(0, groups - products)
