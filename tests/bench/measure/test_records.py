"""A results file of any age is read into today's fields."""

from dataclasses import asdict

import pytest

from rooflight.bench.measure.records import Measurement, is_host_bound, read_measurement

OLD = {
    "operation": "rms_norm", "mode": "forward", "shape": {"M": 64, "N": 4096}, "dtype": "bfloat16", "provider": "torch",
    "milliseconds": 0.5, "milliseconds_p20": 0.4, "milliseconds_p80": 0.6, "gigabytes_per_second": 2.0,
    "teraflops": 0.1, "peak_mib": 1.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("host", "host_bound", "timed_by"), [(None, False, "clock"), (249.0, False, "events"), (251.0, True, "events")]
)
def test_an_older_record_has_one_time_for_both(host, host_bound, timed_by):
    m = read_measurement(OLD | {"host_microseconds": host})
    assert (m.device_milliseconds_p20, m.device_milliseconds, m.device_milliseconds_p80) == (0.4, 0.5, 0.6)
    assert m.call_milliseconds == 0.5
    assert (m.host_microseconds, m.host_bound, m.timed_by) == (host, host_bound, timed_by)
    assert (m.gigabytes_per_second, m.teraflops, m.peak_mib) == (2.0, 0.1, 1.5)


def test_a_record_before_host_times_is_read():
    assert read_measurement(OLD).host_microseconds is None


def test_a_record_of_today_is_read_as_it_was_written():
    m = Measurement(
        "rms_norm", "backward", {"M": 2}, "float32", "rooflight", 1.0, 0.9, 1.1, 1.2, 3.0, 4.0, 5.0, 9.0, True
    )
    assert read_measurement(asdict(m)) == m


def test_a_call_is_bound_by_the_host_that_needs_nearly_all_its_time():
    assert is_host_bound(91.0, 0.1)
    assert not is_host_bound(89.0, 0.1)
    assert not is_host_bound(None, 0.1)
