"""Whether every part of a product (HGMMA) reads its operands where the product's first part does, on every path.

    torn_products(listing)       # ["0x75d0: the left operand of the product at 0x7080", ...]; empty where all is well

A product of 64 x N x K is K / 16 instructions. Each takes the addresses of its operands from descriptors in uniform
registers, and these follow from the first instruction's by adding constants. ptxas 12.8 (triton 3.6 and 3.7) has been
seen to compute "the left operand's address + 32 bytes" once, in front of one of two loops that use it, and to read the
register in the other loop too, which can be reached without passing there (bench/NOTES.md, the Hopper forward).

So each register has a value here, a symbol plus a constant: of an addition of a constant the symbol stays, any other
instruction makes one from its operands, and where paths meet with different values the meeting point is the symbol. The
instructions of a product must have the same symbols.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from support.sass import Instruction, blocks_of, parse

Value = tuple[object, int]  # a symbol and what was added to it: the low 32 bits
State = dict[str, Value]  # of the registers and of those spilled, by the name of their place

WORD = 1 << 32
NUMBER = re.compile(r"-?0x[0-9a-f]+|-?\d+")
REGISTER = re.compile(r"(U?R)(\d+)")
SPILLED = re.compile(r"\[R1(\+0x[0-9a-f]+)?\]")


def torn_products(listing: str) -> list[str]:
    code = parse(listing)
    if not any(at.name == "HGMMA" for at in code):
        return []
    found = _torn(code, False)
    return _torn(code, True) if found else []  # most descriptors never leave the uniform registers


def _torn(code: list[Instruction], every_register: bool) -> list[str]:
    found: list[str] = []
    first: Instruction | None = None
    before: dict[str, object] = {}
    for at, state in sorted(_states(code, every_register), key=lambda pair: pair[0].address):
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


def _states(code: list[Instruction], every_register: bool) -> Iterator[tuple[Instruction, State]]:
    """Every HGMMA with the values of the registers before it, or of the uniform ones.

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
                if every_register or at.operands.startswith("UR"):
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
    if operand in ("RZ", "URZ"):
        return None, 0
    if NUMBER.fullmatch(operand):
        return None, int(operand, 0) % WORD
    return state.get(operand, (operand, 0))  # a register that nothing has written: what was there


def _execute(at: Instruction, state: State) -> None:
    """Give what the instruction writes its new value."""
    target, *operands = (part.strip() for part in at.operands.split(","))
    spilled = SPILLED.fullmatch(target) if at.opcode == "STL" else None
    written = REGISTER.fullmatch(target)
    if not (spilled or written):
        return
    value = _result(at, operands, state)
    state[target] = (("maybe", at.address), 0) if at.predicated else value
    if written:
        for n in range(1, _width(at)):
            state[f"{written[1]}{int(written[2]) + n}"] = (("part", n, at.address), 0)


def _width(at: Instruction) -> int:
    """How many registers it writes, at most."""
    if at.name == "HGMMA":
        return int(re.search(r"64x(\d+)x", at.opcode)[1]) // 2  # type: ignore[index]
    if ".128" in at.opcode or at.name in ("HMMA", "LDSM"):
        return 4
    return 2 if re.search(r"\.(64|WIDE)\b", at.opcode) or at.opcode == "CS2R" else 1


def _result(at: Instruction, operands: list[str], state: State) -> Value:
    if at.opcode == "LDL" and SPILLED.fullmatch(operands[0]):
        return _value(operands[0], state)
    carries = [part for part in operands[:2] if re.fullmatch(r"U?P\d|U?PT", part)]  # what it writes besides
    sources = operands[len(carries) :]
    while sources and sources[-1] in ("PT", "!PT", "UPT", "!UPT"):
        sources.pop()
    if any(not (part in ("RZ", "URZ") or NUMBER.fullmatch(part) or _is_register(part)) for part in sources):
        return ("written", at.address), 0
    values = [_value(part, state) for part in sources]
    if at.name in ("UMOV", "MOV", "R2UR", "STL") or (at.opcode.startswith("IMAD.") and values[:2] == [(None, 0)] * 2):
        return values[-1]  # IMAD R0, RZ, RZ, UR6
    if at.opcode in ("ULOP3.LUT", "LOP3.LUT") and sources[3:4] == ["0x3c"]:  # a ^ b: three of them swap two registers
        return _xor(values[0], values[1])
    # an "or", 0xfc, is of a 14-bit address and bits above: the sum
    is_or = at.opcode in ("ULOP3.LUT", "LOP3.LUT") and sources[3:4] == ["0xfc"]
    if is_or or at.opcode in ("UIADD3", "UIADD3.64", "IADD3", "VIADD", "IMAD.IADD"):
        values = values[:3]
        if at.opcode == "IMAD.IADD":
            values = [values[0], values[2]]  # times 1
        terms = [symbol for symbol, _ in values if symbol is not None]
        if len(terms) <= 1:
            return (terms[0] if terms else None), sum(constant for _, constant in values) % WORD
    return ((at.opcode, *values), 0) if at.operands.startswith("UR") else (("written", at.address), 0)


def _xor(*values: Value) -> Value:
    """A symbol of the values that stand in it an odd number of times; a value itself where it is the only one."""
    left: frozenset[Value] = frozenset()
    for value in values:
        symbol = value[0]
        left ^= symbol[1] if isinstance(symbol, tuple) and symbol[0] == "xor" and value[1] == 0 else {value}
    return next(iter(left)) if len(left) == 1 else (("xor", left), 0)


def _is_register(part: str) -> bool:
    return REGISTER.fullmatch(part.removesuffix(".reuse")) is not None
