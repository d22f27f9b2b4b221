"""What devices send in a step, and when a link between them bounds it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rooflight.model import PRESETS, Ceilings, Estimate, estimate
from rooflight.model.communication import Communication

XL = PRESETS["gpt2-xl"]
PARAMETERS = 1_555_126_400
OUTERMOST = 50257 * 1600 + 1600  # the embedding, which is the output matrix too, and the last norm
RATES = Ceilings({"bfloat16": 8e14}, 4e12, memory_bytes=141 * 10**9, device="a GPU")


def told(e: Estimate) -> str:
    return "\n".join(e.summary())


def test_sharding_divides_states_and_no_activations() -> None:
    one, eight = (estimate(XL, batch_size=1, gpus=n) for n in (1, 8))
    assert eight.memory.parameters == -(-one.memory.parameters // 8)
    assert eight.memory.optimizer == -(-one.memory.optimizer // 8)
    assert eight.memory.activations == one.memory.activations
    assert eight.components[-1].bytes == -(-PARAMETERS // 8) * 28
    # without resharding the weights of all 48 blocks stay, not those of two
    kept = estimate(XL, batch_size=1, gpus=8, reshard=False)
    assert kept.memory.casts - eight.memory.casts == (48 - 2) * 12 * 1600**2 * 2


def test_ddp_divides_nothing() -> None:
    one, eight = (estimate(XL, batch_size=1, gpus=n, parallel="ddp", ops="cpu") for n in (1, 8))
    assert (eight.memory, eight.components) == (one.memory, one.components)
    # on GPUs the optimizer keeps its copies, but the gradients have the dtype of DDP's buckets
    one, eight = (estimate(XL, batch_size=1, gpus=n, parallel="ddp") for n in (1, 8))
    assert eight.memory.casts == one.memory.casts == 2 * 48 * 12 * 1600**2
    assert eight.memory.gradients == one.memory.gradients + 2 * 48 * 12 * 1600**2 == 4 * PARAMETERS
    wider, narrower = (e.components[-1].bytes for e in (eight, one))
    assert wider - narrower == 2 * 48 * 12 * 1600**2  # AdamW reads them; the backward pass writes them, cast
    assert {c.name for c in eight.components} - {c.name for c in one.components} == {"casts"}


@pytest.mark.parametrize(
    ("arguments", "forward", "backward", "start"),
    [
        ({"gpus": 1}, 0, 0, 0),
        ({"gpus": 1, "parallel": "ddp"}, 0, 0, 0),
        ({"gpus": 8, "parallel": "ddp"}, 0, 2 * 4 * PARAMETERS * 7 // 8, 4 * PARAMETERS),
        # 7/8 of all weights in bf16, of the blocks' once more, of all gradients in fp32
        ({"gpus": 8}, 2 * PARAMETERS * 7 // 8, (2 * (PARAMETERS - OUTERMOST) + 4 * PARAMETERS) * 7 // 8, 0),
        ({"gpus": 8, "reshard": False}, 2 * PARAMETERS * 7 // 8, 4 * PARAMETERS * 7 // 8, 0),
        ({"gpus": 2, "reshard": False, "dtype": "float32"}, 2 * PARAMETERS, 2 * PARAMETERS, 0),
    ],
)
def test_bytes_are_the_closed_forms(arguments: dict, forward: int, backward: int, start: int) -> None:
    sent = estimate(XL, batch_size=1, **arguments).communication
    assert sent == Communication(forward, backward, start=start)
    # Muon's results, of 1/8 of the blocks' matrices: to seven others; by fsdp to each its rows, after theirs in fp32
    gpus, size = arguments["gpus"], 4 if "dtype" in arguments else 2
    each = 48 * 12 * 1600**2 // gpus * (gpus - 1)
    update = size * each if arguments.get("parallel") == "ddp" else (4 + size) * each // gpus
    assert estimate(XL, batch_size=1, optimizer="muon", **arguments).communication == replace(sent, update=update)


def test_processes_divide_muons_matrices() -> None:
    one = estimate(XL, batch_size=1, optimizer="muon")
    ddp, fsdp = (
        estimate(XL, batch_size=1, gpus=8, parallel=parallel, optimizer="muon", ceilings=RATES, link=50e9)
        for parallel in ("ddp", "fsdp")
    )
    muon = [e.components[-1].update for e in (one, ddp, fsdp)]
    assert muon[0].executed_flops == 8 * muon[1].executed_flops == 8 * muon[2].executed_flops
    hidden = 48 * 12 * 1600**2
    assert muon[0].bytes == 8 * muon[2].bytes + 6 * hidden  # the copies, which fsdp has none of
    assert muon[1].bytes == muon[2].bytes + 6 * hidden + 5 * 4 * hidden * 7 // 8  # and all momenta and moves
    assert fsdp.memory.optimizer == -(-one.memory.optimizer // 8)
    assert ddp.memory.optimizer == one.memory.optimizer
    for e in ddp, fsdp:  # Muon's update waits for what it sends
        assert e.overlap is not None
        waits = e.communication.update / 50e9
        assert e.overlap.overlapped == pytest.approx(
            sum(map(max, e.overlap.compute[:2], e.overlap.link[:2])) + e.overlap.compute[2] + waits
        )
        assert "in the update" in told(e)


class TestLink:
    @pytest.mark.parametrize(
        ("parallel", "rate", "bound_by"),
        [
            ("ddp", 2e9, "backward"),
            ("ddp", 400e9, ""),
            ("fsdp", 50e9, "forward and backward"),
            ("fsdp", 150e9, "backward"),
            ("fsdp", 400e9, ""),
        ],
    )
    def test_bounds_the_step_where_it_takes_longer_than_a_pass(self, parallel: str, rate: float, bound_by: str) -> None:
        e = estimate(XL, batch_size=4, gpus=8, parallel=parallel, link=rate, ceilings=RATES)
        assert e.overlap is not None
        (forward, backward, update), (gathered, reduced, _) = e.overlap.compute, e.overlap.link
        assert forward + backward + update == pytest.approx(e.seconds)
        assert (gathered, reduced) == (e.communication.forward / rate, e.communication.backward / rate)
        assert e.overlap.bound_by == bound_by
        assert e.overlap.apart == pytest.approx(e.seconds + e.communication_bytes / rate)
        assert e.overlap.overlapped == pytest.approx(max(forward, gathered) + max(backward, reduced) + update)
        assert (e.overlap.overlapped == pytest.approx(e.seconds)) == (not bound_by)
        assert (f"the link is the bound in the {bound_by} pass" if bound_by else "compute is the bound") in told(e)

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_the_covering_batch_is_the_first_that_does(self, parallel: str) -> None:
        e = estimate(XL, batch_size=4, gpus=8, parallel=parallel, link=50e9, ceilings=RATES)
        n = e.covering_batch()
        assert n is not None
        bounds = [
            estimate(XL, batch_size=b, gpus=8, parallel=parallel, link=50e9, ceilings=RATES).overlap.bound_by
            for b in (n - 1, n)
        ]
        assert bounds[0]
        assert not bounds[1]
        assert f"smallest batch per GPU at which compute can hide the link: {n}" in told(e)
        # twice the link, half the batch
        half = replace(e, link=100e9).covering_batch()
        assert half == pytest.approx(n / 2, abs=1)

    def test_without_ceilings_its_own_time_is_told(self) -> None:
        e = estimate(XL, batch_size=4, gpus=8, link=50e9)
        assert (e.overlap, e.covering_batch()) == (None, None)
        assert "at 50.0 GB/s that takes 214.90 ms: the link is the bound where" in told(e)
        assert "; --link GB/s says" in told(estimate(XL, batch_size=4, gpus=8, ceilings=RATES))

    def test_json_has_its_times(self) -> None:
        e = estimate(XL, batch_size=4, gpus=8, link=50e9, ceilings=RATES)
        fields = json.loads(json.dumps(e.to_dict()))
        assert fields["communication"] == {
            "forward": e.communication.forward,
            "backward": e.communication.backward,
            "update": 0,
            "start": 0,
        }
        assert fields["overlap"]["overlapped"] == e.overlap.overlapped
        assert (fields["overlap"]["bound_by"], fields["covering_batch"]) == ("forward and backward", e.covering_batch())
        assert "overlap" not in estimate(XL, batch_size=4, gpus=8, link=50e9).to_dict()
