"""Whether every part of a product (HGMMA) reads its operands where the product's first part does, on every path.

    torn_products(listing)       # ["0x75d0: the left operand of the product at 0x7080", ...]; empty where all is well

A product of 64 x N x K is K / 16 instructions. Each takes the addresses of its operands from descriptors in uniform
registers, and these follow from the first instruction's by adding constants. ptxas 12.8 (triton 3.6 and 3.7) has been
seen to compute "the left operand's address + 32 bytes" once, in front of one of two loops that use it, and to read the
register in the other loop too, which can be reached without passing there (bench/NOTES.md, the Hopper forward).

So each uniform register has a value here, a symbol plus a constant: of an addition of a constant the symbol stays, any
other instruction makes one from its operands, and where paths meet with different values the meeting point is the
symbol. The instructions of a product must have the same symbols.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from support.sass import Instruction, blocks_of, parse

Value = tuple[object, int]  # a symbol and what was added to it: the low 32 bits
State = dict[str, Value]  # of the uniform registers

WORD = 1 << 32


def torn_products(listing: str) -> list[str]:
    code = parse(listing)
    if not any(at.name == "HGMMA" for at in code):
        return []
    found: list[str] = []
    first: Instruction | None = None
    before: dict[str, object] = {}
    for at, state in sorted(_states(code), key=lambda pair: pair[0].address):
        if first is None or at.operands.partition(",")[0] != first.operands.partition(",")[0]:
            first, before = at, {}
        for side, register in _descriptors(at).items():
            symbol, _ = _value(register, state)
            if before.setdefault(side, symbol) != symbol:
                found.append(f"{at.address:#x}: the {side} operand of the product at {first.address:#x}")
        if "gsb0" in at.operands:  # the product's last
            first = None
    return found


def _descriptors(hgmma: Instruction) -> dict[str, str]:
    """The registers with the low halves of the operands' descriptors; the left operand may be in registers."""
    n = int(re.search(r"gdesc\[UR(\d+)\]", hgmma.operands)[1])  # type: ignore[index]
    right = {"right": f"UR{n + 2}"}
    return {"left": f"UR{n}"} | right if re.match(r"R\d+, gdesc", hgmma.operands) else right


def _states(code: list[Instruction]) -> Iterator[tuple[Instruction, State]]:
    """Every HGMMA with the registers' values before it.

    First a value is taken to be the same in every round of a loop. Where it is not, its meeting point is noted, and all
    is worked out anew, until nothing is noted any more.
    """
    blocks, successors = blocks_of(code)
    order = _reverse_postorder(successors)
    position = {n: at for at, n in enumerate(order)}
    predecessors: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for m in successors[n]:
            predecessors[m].append(n)
    meetings: set[tuple[int, str]] = set()
    while True:
        entered: dict[int, State] = {}
        left: dict[int, State] = {}
        products: list[tuple[Instruction, State]] = []
        for n in order:
            known = [left[m] for m in predecessors[n] if position[m] < position[n]]
            names = {name for state in known for name in state} | {name for at, name in meetings if at == n}
            state: State = {}
            for name in names:
                values = {_value(name, other) for other in known}
                if (n, name) in meetings or len(values) > 1:
                    meetings.add((n, name))
                    state[name] = (("meeting", n, name), 0)
                else:
                    (state[name],) = values
            entered[n] = dict(state)
            for at in blocks[n]:
                if at.name == "HGMMA":
                    products.append((at, dict(state)))
                _execute(at, state)
            left[n] = state
        noted = len(meetings)
        for n in order:
            for m in predecessors[n]:
                names = entered[n].keys() | left[m].keys()
                meetings |= {(n, name) for name in names if _value(name, left[m]) != _value(name, entered[n])}
        if len(meetings) == noted:
            yield from products
            return


def _reverse_postorder(successors: list[set[int]]) -> list[int]:
    """Each block before its successors, but for the ways back of loops. An indirect branch may lead to any root."""
    done: list[int] = []
    seen: set[int] = set()
    for root in range(len(successors)):
        stack = [] if root in seen else [(root, iter(sorted(successors[root])))]
        seen.add(root)
        while stack:
            n, following = stack[-1]
            m = next((m for m in following if m not in seen), None)
            if m is None:
                done.append(n)
                stack.pop()
            else:
                seen.add(m)
                stack.append((m, iter(sorted(successors[m]))))
    return done[::-1]


def _value(operand: str, state: State) -> Value:
    operand = operand.removesuffix(".reuse")
    if operand == "URZ":
        return None, 0
    if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand):
        return None, int(operand, 0) % WORD
    return state.get(operand, (operand, 0))  # a register that nothing has written: what was there


def _execute(at: Instruction, state: State) -> None:
    """Give the uniform registers that the instruction writes their new values."""
    target, *operands = (part.strip() for part in at.operands.split(","))
    written = re.fullmatch(r"UR(\d+)", target)
    if not written:
        return
    n = int(written[1])
    value = _result(at, operands, state)
    if at.predicated:  # or not, and then what was there
        value = (("maybe", at.address), 0)
    state[target] = value
    if ".64" in at.opcode or ".WIDE" in at.opcode:
        state[f"UR{n + 1}"] = (("high", at.address), 0)


def _result(at: Instruction, operands: list[str], state: State) -> Value:
    sources = [part for part in operands if not re.fullmatch(r"!?UP(\d|T)", part)]
    uniform = all(re.fullmatch(r"URZ|UR\d+|-?0x[0-9a-f]+|-?\d+", part) for part in sources)
    if not uniform or len(sources) < len(operands) - 2 or re.search(r"UP\d", ",".join(operands[1:])):
        return ("written", at.address), 0
    values = [_value(part, state) for part in sources]
    if at.name == "UMOV":
        return values[0]
    # ULOP3 with 0xfc is "or": of a 14-bit address and bits above, which is the sum
    adds = at.opcode in ("UIADD3", "UIADD3.64") or (at.opcode == "ULOP3.LUT" and sources[3:4] == ["0xfc"])
    if adds:
        terms = [value for value in values[:3] if value[0] is not None]
        if len(terms) <= 1:
            return (terms[0][0] if terms else None), sum(constant for _, constant in values[:3]) % WORD
    return (at.opcode, *values), 0
