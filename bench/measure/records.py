"""What a measurement says: one provider's time for one mode of a case, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HOST_BOUND = 0.9  # the host's share of a call's time from which on the device is taken to wait for the host
HOST_SEEN = 0.5  # the same where one time stands for both: on an H200, launches showed from there on (2026-11-26)


@dataclass(frozen=True)
class Measurement:
    """One provider's time for one mode of a case; rates count the case's closed-form cost, not what was executed.

    device_milliseconds: the device alone on a cold L2, the launches taken out; median, p20 and p80. The rates are its.
    call_milliseconds: of calls issued one after another, launches included: what a program pays.
    host_microseconds: until the host has issued the call; None on a CPU, where the call is the device's time.
    host_bound: the call takes as long as the host does, whatever the device's time is.
    timed_by: "graph" (replays of a CUDA graph), "events" (around the call: launches may show) or "clock" (a CPU).
    path: which of ours ran where there are several, "portable" or "hopper".
    """

    operation: str
    mode: str
    shape: dict[str, int | bool]
    dtype: str
    provider: str
    device_milliseconds: float
    device_milliseconds_p20: float
    device_milliseconds_p80: float
    call_milliseconds: float
    gigabytes_per_second: float
    teraflops: float
    peak_mib: float | None  # device memory above the inputs; None on a CPU
    host_microseconds: float | None = None
    host_bound: bool = False
    timed_by: str = "clock"
    path: str | None = None


@dataclass(frozen=True)
class Failure:
    """A provider that does not run a case, or runs it wrong."""

    case: str
    provider: str
    error: str


def is_host_bound(host_microseconds: float | None, call_milliseconds: float, share: float = HOST_BOUND) -> bool:
    """Whether the host needs at least that share of a call's time to issue it."""
    return host_microseconds is not None and host_microseconds / 1e3 >= share * call_milliseconds


def read_measurement(record: Mapping[str, Any]) -> Measurement:
    """A record of a results file, today's or an older one's.

    Files written before device and call were timed apart know one time, "milliseconds", by events around the call: it
    stands for both; where the record is host-bound, the device's time is at most that, and the rates at least theirs.
    """
    if "device_milliseconds" in record:
        return Measurement(**record)
    old = dict(record)
    median, low, high = (old.pop(f"milliseconds{suffix}") for suffix in ("", "_p20", "_p80"))
    host = old.pop("host_microseconds", None)
    return Measurement(
        **old,
        device_milliseconds=median,
        device_milliseconds_p20=low,
        device_milliseconds_p80=high,
        call_milliseconds=median,
        host_microseconds=host,
        host_bound=is_host_bound(host, median, HOST_SEEN),
        timed_by="clock" if host is None else "events",
    )
