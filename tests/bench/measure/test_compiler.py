"""A peer never runs eager in a compiler's name. What fails is torch's front end: no more of the compiler runs here."""

import dataclasses
import warnings

import pytest
import torch
import torch._dynamo

from rooflight.bench.cases.case import Case
from rooflight.bench.cases.rows import rms_norm_case
from rooflight.bench.measure import harness
from rooflight.kernels import reference

CPU = torch.device("cpu")
LIMIT = torch._dynamo.config.recompile_limit


def compile_it(function):
    return torch.compile(function, backend="eager", dynamic=False)


def checked(provider, name: str = "torch.compile", rows: int = 8) -> list[harness.Measurement | harness.Failure]:
    case: Case = rms_norm_case(rows, 16, torch.float32, CPU)
    return list(harness.measure(dataclasses.replace(case, providers={name: provider}, timed=False), CPU))


def test_a_function_that_recompiles_nine_times_is_no_measurement():
    norm = compile_it(lambda x, weight, n: reference.rms_norm(x, weight) + 0.0 * n)

    def restless(x, weight):
        for n in range(LIMIT + 1):
            y = norm(x, weight, n)
        return y

    (failure,) = checked(restless)
    assert "FailOnRecompileLimitHit" in failure.error
    assert checked(restless, "torch") == []  # torch's own habit: it ran eagerly, and right


def test_every_case_starts_anew():
    """Nine cases of one function at nine shapes: the ninth is compiled as the first was."""

    norm = compile_it(reference.rms_norm)
    for rows in range(1, LIMIT + 2):
        assert checked(norm, rows=rows) == []


def test_a_graph_break_is_no_measurement():
    def broken(x, weight):
        torch._dynamo.graph_break()
        return reference.rms_norm(x, weight)

    (failure,) = checked(compile_it(broken))
    assert failure.error.startswith("NotCompiled: a graph break: ")


def test_what_was_not_compiled_at_all_is_no_measurement():
    (failure,) = checked(reference.rms_norm)
    assert failure.error == "NotCompiled: nothing was compiled"


@pytest.mark.parametrize(
    "message",
    [
        "flex_attention called without torch.compile() - this will use an unfused implementation",
        "Falling back to eager",
    ],
)
def test_a_warning_of_a_fallback_is_no_measurement(message):
    norm = compile_it(reference.rms_norm)

    def warned(x, weight):
        warnings.warn(message, stacklevel=1)
        return norm(x, weight)

    (failure,) = checked(warned)
    assert message in failure.error


def test_other_warnings_are_none_of_its_business(recwarn):
    def warned(x, weight):
        warnings.simplefilter("always")
        warnings.warn("the clocks are low", stacklevel=1)
        return reference.rms_norm(x, weight)

    assert checked(warned, "torch") == []
    assert {str(warning.message) for warning in recwarn} == {"the clocks are low"}
