"""Tables of kernels beside their peers: the terminal's and the page's, a row for each; the README's, a row for a shape.

Rates are of device time wherever it was taken apart from the host's. A record of an older file knows one time, by
events around the call; `records` reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from ...kernels.attention import paths
from ..measure.records import read_measurement

Record = dict[str, Any]

# DYNAMIC: the hopper forward's other schedule, where it is not the default
HOPPER, DYNAMIC, PORTABLE = "rooflight hopper", "rooflight hopper, dynamic", "rooflight portable"
MARK = "*"  # on a call whose time is the host's


def kernel_results(machine: dict[str, Any], heard: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The content of a results file, from what the workers of `bench kernels` said."""
    measurements: dict[tuple[str, str, str], Record] = {}  # a case begun anew measures some of its providers again
    failures, ceilings = [], {}
    for line in heard:
        if "measurement" in line:
            m = line["measurement"]
            case = " ".join((m["operation"], shape_text(m["shape"]), m["dtype"]))
            measurements[case, m["mode"], m["provider"]] = m
        elif "failure" in line:
            failures.append(line["failure"])
        elif "ceilings" in line:
            ceilings = line["ceilings"]
    cases = list(dict.fromkeys(case for case, _, _ in measurements))
    in_order = sorted(measurements, key=lambda key: (cases.index(key[0]), key[1] != "forward"))
    return {
        "kind": "kernels",
        "machine": machine,
        "ceilings": ceilings,
        "measurements": [measurements[key] for key in in_order],
        "failures": failures,
    }


def records(measurements: Iterable[Record]) -> list[Record]:
    """The measurements of a results file, whichever version wrote it, with today's fields."""
    return [m if "device_milliseconds" in m else asdict(read_measurement(m)) for m in measurements]


def of_roof(m: Record, ceilings: dict[str, float]) -> float | None:
    """A measurement's share of the ceiling that bounds it: products for attention and the loss, copies for the rest."""
    if not ceilings:
        return None
    if m["operation"] in ("flash_attention", "linear_cross_entropy"):
        return m["teraflops"] / ceilings["gemm_teraflops"]
    return m["gigabytes_per_second"] / ceilings["copy_gigabytes_per_second"]


def where(machine: dict[str, Any]) -> str:
    """What a result was measured on."""
    parts = [machine["device"], f"torch {machine['torch']}", f"triton {machine['triton']}"]
    if not machine.get("cuda"):
        parts.insert(1, f"{machine['threads']} threads")
    return ", ".join([*parts, f"commit {machine['commit']}", machine["date"]])


def shape_text(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={int(value)}" for key, value in shape.items())


def case_text(m: Record) -> str:
    return f"{m['operation']} {m['mode']}, {shape_text(m['shape'])}, {m['dtype']}"


COLUMNS = ("device ms", "p20-p80", "call ms", "host us", "GB/s", "TFLOP/s", "% roof", "MiB")


def cells(m: Record, ceilings: dict[str, float]) -> list[str]:
    """One measurement under COLUMNS; a call that the host bounds is marked."""

    def number(key: str, form: str) -> str:
        return "" if m.get(key) is None else format(m[key], form)

    low, high = (number(f"device_milliseconds_{quantile}", ".3f") for quantile in ("p20", "p80"))
    share = of_roof(m, ceilings)
    return [
        number("device_milliseconds", ".3f"),
        f"{low}-{high}" if low else "",
        number("call_milliseconds", ".3f") + MARK * bool(m.get("host_bound")),
        number("host_microseconds", ".1f"),
        number("gigabytes_per_second", ",.1f"),
        number("teraflops", ",.3f"),
        "" if share is None else f"{100 * share:.1f}",
        number("peak_mib", ",.0f"),
    ]


def caption(ceilings: dict[str, float]) -> str:
    """What the shares of the roof are shares of, and what the mark means."""
    text = f"{MARK} the host takes as long to issue the call as the call takes"
    if ceilings:
        gemm, copy = ceilings["gemm_teraflops"], ceilings["copy_gigabytes_per_second"]
        text = f"roof: products {gemm:,.3g} TFLOP/s, copies {copy:,.0f} GB/s; " + text
    return text


def table(measurements: Iterable[Record], ceilings: dict[str, float]) -> Table:
    """For the terminal: one row per provider and mode, in the order measured."""
    out = Table(title="Kernels, ours beside their peers (device time: median; p20 to p80)", expand=False)
    out.caption = caption(ceilings)
    for column in ("case", "provider"):
        out.add_column(column)
    for column in COLUMNS:
        out.add_column(column, justify="right", no_wrap=True)
    before = None
    for m in records(measurements):
        case = case_text(m)
        if before not in (None, case):
            out.add_section()
        out.add_row(case if case != before else "", m["provider"], *cells(m, ceilings))
        before = case
    return out


def failures_table(failures: Iterable[dict[str, str]]) -> Table:
    out = Table(title="Not measured")
    for column in ("case", "provider", "because"):
        out.add_column(column)
    for failure in failures:
        out.add_row(failure["case"], failure["provider"] or "all", failure["error"])
    return out


def paths_table(architecture: str, device: torch.device | None) -> Table:
    """Which path serves which attention call there, and why; ValueError on an architecture that nothing is known of."""
    out = Table("call", "path", "why", title=f"attention on {architecture}")
    for passes, head_dims, dtypes, options, choice in paths.table(architecture, device):
        out.add_row(f"{passes}; head sizes {head_dims}; {dtypes}; {options}", choice.path, choice.why)
    return out


# ---------------------------------------------------------------- a row for a shape


def newest(files: Sequence[dict[str, Any]]) -> list[Record]:
    """The device times of the last day on which a GPU was measured; older code's stay in their files.

    Each shape and pass comes from the first file that has it, whole, so that ours and the peers' stand side by side.
    """
    files = [results for results in files if results["machine"].get("cuda")]
    last = max((results["machine"]["date"] for results in files), default=None)
    found: dict[tuple[str, str, str, str], Record] = {}
    taken: dict[tuple[str, str, str], str] = {}
    for results in files:
        if results["machine"]["date"] != last:
            continue
        for m in records(results["measurements"]):
            if m.get("timed_by", "profiler") == "events" or m["dtype"] != "bfloat16":
                continue  # a call's time, launches included
            case = m["operation"], m["mode"], shape_text(m["shape"])
            place = where(results["machine"])
            if taken.setdefault(case, place) == place:
                found.setdefault((*case, _provider(m)), m | {"measured_on": place})
    return list(found.values())


def _provider(m: Record) -> str:
    """Ours by the path that ran, so that rows of before and after a change of the default stand together."""
    if m["provider"] == "rooflight" and m.get("path"):
        return f"rooflight {m['path']}"
    return m["provider"]


def _beside(measured: Sequence[Record], operation: str) -> dict[tuple[str, str], dict[str, Record]]:
    """{(shape, mode): {provider: measurement}} of one operation."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for m in measured:
        if m["operation"] == operation:
            found.setdefault((shape_text(m["shape"]), m["mode"]), {})[_provider(m)] = m
    return found


def _by_size(item: tuple[tuple[str, str], dict[str, Record]]) -> tuple:
    """Plain shapes first, then the largest heads or rows; a shape's forward before its backward."""
    (text, mode), providers = item
    shape = next(iter(providers.values()))["shape"]
    special = len(shape) if shape.get("causal", True) and shape.get("H") == shape.get("K") else 99
    return special, [-shape[key] for key in ("D", "T", "N", "M") if key in shape], text, mode != "forward"


def _rows(
    measured: Sequence[Record],
    operation: str,
    rate: str,
    ours: Sequence[str],
    peers: Sequence[str],
    name: Callable[[dict[str, Any]], str | None],
) -> list[list[str]]:
    """A row for each shape that `name` names and our first ran: ours, the peers, and our first over the best peer."""
    rows = []
    for (_, mode), providers in sorted(_beside(measured, operation).items(), key=_by_size):
        title = name(next(iter(providers.values()))["shape"])
        mine = providers.get(ours[0])
        best = max((providers[peer][rate] for peer in peers if peer in providers), default=None)
        if title is None or mine is None:
            continue
        shown = [f"{providers[p][rate]:,.0f}" if p in providers else "" for p in (*ours, *peers)]
        rows.append([f"{title}, {mode}", *shown, f"{mine[rate] / best:.2f}" if best else ""])
    return rows


ATTENTION_PEERS = {"torch cuDNN": "cuDNN", "torch flash": "FlashAttention-2", "FlexAttention": "FlexAttention"}
NORM_PEERS = {"torch": "torch", "torch.compile": "torch.compile", "Liger": "Liger", "quack": "quack"}


def _attention_name(shape: dict[str, Any]) -> str | None:
    B, H, K, T, D = (shape[key] for key in "BHKTD")
    parts = [f"{B} x {H} x {T:,} x {D}"]
    parts += [f"{K} key heads"] if K != H else []
    parts += [] if shape["causal"] else ["no mask"]
    parts += [f"window {shape['window']:,}"] if "window" in shape else []
    parts += [f"{shape['documents']} documents"] if "documents" in shape else []
    return ", ".join(parts)


def _norm_name(shape: dict[str, Any]) -> str | None:
    return f"{shape['M']:,} x {shape['N']:,}" + (" with a residual" if shape.get("residual") else "")


def headlines(measured: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """(what it is, columns, rows, where) of attention and of RMSNorm, each where something was measured on a GPU."""
    out = []
    for title, operation, rate, ours, peers, name in (
        (
            "Attention, bf16, causal where nothing else is said (batch x heads x length x head size): TFLOP/s of device"
            " time. The last column is the first of ours over the fastest peer: below 1 we lose",
            "flash_attention", "teraflops", (HOPPER, DYNAMIC, PORTABLE), ATTENTION_PEERS, _attention_name,
        ),
        (
            "RMSNorm, bf16 (rows x size): GB/s of device time, each byte counted once",
            "rms_norm", "gigabytes_per_second", ("rooflight",), NORM_PEERS, _norm_name,
        ),
    ):  # fmt: skip
        seen = {_provider(m) for m in measured if m["operation"] == operation}
        shown = [peer for peer in peers if peer in seen]
        rows = _rows(measured, operation, rate, [each for each in ours if each in seen] or ours, shown, name)
        if rows:
            ours_shown = [each for each in ours if each in seen]
            columns = [operation, *(each.removeprefix("rooflight ") for each in ours_shown), *(peers[p] for p in shown)]
            places = dict.fromkeys(m["measured_on"] for m in measured if m["operation"] == operation)
            out.append((title, [*columns, "ours / best peer"], rows, list(places)))
    return out
