"""The bound on an inner loop, on listings small enough to count by hand, and on listings doctored to be worse."""

from __future__ import annotations

import pytest

from support.descriptors import torn_products
from support.sass import inner_loops, together

pytestmark = pytest.mark.cpu

S = [f"HGMMA.64x128x16.F32.BF16 R24, gdesc[UR{n}], {'RZ, !UPT' if n == 0 else 'R24'}" for n in range(8)]
PV = [f"HGMMA.64x128x16.F32.BF16 R88, R{160 + 4 * n}, gdesc[UR4].tnspB, R88" for n in range(8)]
S[-1] += ", gsb0"
PV[-1] += ", gsb0"
EXP = ["MUFU.EX2 R4, R5"] * 66
WAIT1, WAIT0 = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
TRY, MISSED = (
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], RZ",
    "@!P1 BRA 0x8000",
)  # a barrier that is not there yet is waited for out of line


def assembled(*lines: str, at: int = 0) -> str:
    """The lines as cuobjdump lists them, from the given address on."""
    listed = []
    for n, line in enumerate(lines):
        predicate, _, rest = line.rpartition("@")[2].partition(" ") if line.startswith("@") else ("", "", line)
        guard = f"@{predicate} " if predicate else ""
        listed.append(f"        /*{at + 16 * n:04x}*/  {guard:>8}{rest} ;   /* 0x0000000000000000 */")
    return "\n".join(listed) + "\n"


def attention(*body: str, at: int = 0x100) -> str:
    """A prologue, the loop, an end, and the block out of line that a missed barrier, its second line, leads to."""
    listing = assembled("MOV R1, R2", *body, f"@P0 BRA 0x{at:04x}", "EXIT", at=at - 16)
    if MISSED in body:
        listing += assembled(TRY, MISSED, f"BRA 0x{at + 32:04x}", at=0x8000)
    return listing


def test_cycles_are_those_counted_by_hand():
    body = [TRY, MISSED, *S, *PV, WAIT1, *EXP, WAIT0]
    body += ["FFMA R1, R2, R3, R4"] * 10 + ["IMAD R1, R2, R3, R4"] * 3 + ["FMNMX R1, R2, R3, !PT"] * 7
    body += ["STL [R1], R4", "LDL.64 R4, [R1]", "LDL R4, [R1]"]
    body += ["LDS.128 R4, [R5]", "LDSM.16.M88.4 R4, [R5]", "STS [R5], R4"]
    (bound,) = inner_loops(attention(*body), "sm_90", 8)
    assert bound.instructions == len(body) + 1  # and the branch, but not the block out of line
    warpgroups = 2
    assert bound.cycles == {
        "tensor": 16 * 64 * warpgroups,  # 64 x 128 x 16 products at 4 x 512 a cycle
        "exp": 66 * 8 * 2,
        "fma": (10 + 3 * 2) * 2,
        "alu": 7 * 2 * 2,
        # the right operand 128 x 16, of S also the left 64 x 16; then 512, 512 and 128 bytes for each of 8 warps
        "shared": ((16 * 128 * 32 + 8 * 64 * 32) * warpgroups + (512 + 512 + 128) * 8) / 128,
        "issue": (len(body) + 1) * 2,
    }
    assert bound.limit == "tensor"
    assert bound.ideal == 1.0
    assert bound.in_turn == pytest.approx(2048 / (2048 + 1056))
    assert (bound.exponentials, bound.overlapped, bound.serialised, bound.spills) == (66, 66, 0, 3)


def test_a_wait_hoisted_above_the_exponentials_shows():
    (bound,) = inner_loops(attention(*S, *PV, WAIT1, WAIT0, *EXP), "sm_90", 8)
    assert (bound.exponentials, bound.overlapped) == (66, 0)


def test_a_product_left_in_flight_over_the_iteration_counts():
    (bound,) = inner_loops(attention(*EXP, *S, WAIT0, *EXP, *PV), "sm_90", 8)
    assert (bound.exponentials, bound.overlapped) == (132, 66)


def test_products_that_ptxas_serialised_show():
    cut = [line for hgmma in S for line in (hgmma.removesuffix(", gsb0") + ", gsb0", WAIT0)]
    (bound,) = inner_loops(attention(*cut, *EXP, *PV, WAIT0), "sm_90", 8)
    assert bound.serialised == len(S) - 1


def test_the_hot_loop_is_the_one_without_masks():
    masked = attention(*S, *PV, *["FSEL R1, R2, R3, P0"] * 64, WAIT0, at=0x4000)
    (bound,) = inner_loops(attention(*S, *PV, WAIT0) + masked, "sm_90", 8)
    assert bound.address == 0x100
    assert bound.cycles["alu"] == 0


def test_partitions_add_up():
    def partition(at: int) -> str:
        head = assembled("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", at=at)
        return head + assembled(*S, *PV, WAIT1, *EXP, WAIT0, f"@P0 BRA 0x{at + 32:04x}", "BRA 0x0020", at=at + 32)

    dispatch = assembled("MOV R1, R2", "BRX R2 -0x10", "EXIT")
    bounds = inner_loops(dispatch + partition(0x100) + partition(0x2000), "sm_90", 12)
    assert [b.warps for b in bounds] == [4, 4]
    both = together(bounds)
    assert both.warps == 8
    assert both.cycles["tensor"] == both.peak == 2 * 16 * 64
    assert both.exponentials == both.overlapped == 2 * 66


def test_older_tensor_cores():
    body = ["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 32 + ["HMMA.1688.F32.BF16 R4, R8, R12, R4"] * 2 + EXP
    (ampere,) = inner_loops(attention(*body), "sm_80", 4)
    assert ampere.cycles["tensor"] == ampere.peak == 33 * 8
    assert ampere.limit == "exp"
    (hopper,) = inner_loops(attention(*body), "sm_90", 4)
    assert hopper.peak == 33 * 4  # half of what the warp-wide instruction needs there
    assert hopper.cycles["tensor"] == pytest.approx(33 * 4 / 0.63)
    assert inner_loops(attention(*body), "sm_100", 4) == []  # whose products name no shape


def test_no_loop_without_products():
    assert inner_loops(attention(*EXP), "sm_90", 4) == []
    assert inner_loops("", "sm_90", 4) == []


# ---------------------------------------------------------------- operands of a product's parts

QUERIES = ["USGXT.U32 UR8, UR6, 0xe", "UMOV UR9, 0x40000040"]  # the first part's left operand
LATER = ["UIADD3 UR6, UP0, UR8, 0x2, URZ", "UMOV UR4, UR6", "UIADD3 UR20, UP0, UR4, 0x2, URZ"]  # the later ones'
KEYS = ["UIADD3 UR10, UR53, 0x10000, URZ", "UIADD3 UR6, UP0, UR10, 0x2, URZ", "UIADD3.64 UR22, UR6, 0x2, URZ"]
PRODUCT = [
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
]
MASKED = [*KEYS, *PRODUCT, "UIADD3 UR53, UR53, 0x1, URZ"]


def two_loops(first: list[str], between: list[str], keys: list[str]) -> str:
    """As the withdrawn forward: a loop that a branch passes by, in front of it `first`, then another loop."""
    head = [*QUERIES, "UMOV UR4, UR13"]
    skipped = len(head) + 1 + len(first) + len(MASKED) + 1
    lines = [*head, f"@!P1 BRA {16 * skipped:#x}", *first, *MASKED]
    lines += [f"@P0 BRA {16 * (len(head) + 1 + len(first)):#x}", *between]
    start = 16 * len(lines)
    return assembled(*lines, *keys, *PRODUCT, "UIADD3 UR53, UR53, 0x1, URZ", f"@P0 BRA {start:#x}", "EXIT")


def test_operands_that_a_branch_leaves_behind():
    """ptxas computed UR4 in front of the first loop alone: a path to the second finds there what was there before."""
    again = "UIADD3 UR20, UP0, UR4, 0x2, URZ"
    found = torn_products(two_loops(LATER, [again], KEYS))
    assert len(found) == 2  # both later parts of the second loop's product, none of the first's
    assert all("left operand" in what for what in found)
    assert torn_products(two_loops(LATER, LATER, KEYS)) == []
    assert torn_products(two_loops([], [], [*LATER, *KEYS])) != []  # the first loop has nothing to read
    assert torn_products(two_loops(LATER, LATER, KEYS[:-1]).replace("gdesc[UR20]", "gdesc[UR4]")) == []


@pytest.mark.parametrize("at", [2, 4])
def test_operands_of_another_block_of_keys(at):
    """The right operand: one part reads where another instruction has moved the register to."""
    lines = [*QUERIES, *LATER, *KEYS, *PRODUCT, "EXIT"]
    assert torn_products(assembled(*lines)) == []
    moved = [*QUERIES, *LATER, *KEYS, PRODUCT[0], "R2UR UR6, R4" if at == 2 else "R2UR UR22, R4", *PRODUCT[1:], "EXIT"]
    assert len(torn_products(assembled(*moved))) == 1


def test_operands_whose_registers_were_swapped():
    """By three exclusive ors: the value is the same, in the other register."""
    swap = [f"ULOP3.LUT UR{a}, UR10, UR11, URZ, 0x3c, !UPT" for a in (10, 11, 10)]
    lines = [
        *QUERIES,
        *LATER,
        KEYS[0],
        PRODUCT[0],
        *swap,
        KEYS[1].replace("UR10", "UR11"),
        KEYS[2],
        *PRODUCT[1:],
        "EXIT",
    ]
    assert torn_products(assembled(*lines)) == []
    assert torn_products(assembled(*(line for line in lines if line != swap[1]))) != []
