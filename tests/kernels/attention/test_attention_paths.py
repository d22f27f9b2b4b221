"""Which path and tile a call takes: the rule, a user's own table, and what overrides both."""

from __future__ import annotations

import dataclasses
import json
import warnings
from unittest import mock

import pytest
import torch

from rooflight.kernels.attention import paths, tuned
from rooflight.kernels.attention.paths import Call, decide
from rooflight.kernels.attention.portable import tiles
from rooflight.kernels.attention.tuned import Identity, Tile, UserTable

BF16, CPU = torch.bfloat16, torch.device("cpu")
GPU = Identity("NVIDIA Made-up 1", "sm_90", "3.7.1")
TABLE = UserTable({("fwd", "bfloat16", 128): Tile(64, 64, 4, 2)}, {("forward", "bfloat16", 128): "hopper"})


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def save(content: object) -> None:
    GPU.path.parent.mkdir(parents=True, exist_ok=True)
    GPU.path.write_text(content if isinstance(content, str) else json.dumps(content))


# ---------------------------------------------------------------- paths


def test_what_is_not_measured_is_not_the_default():
    for pass_ in ("forward", "backward"):
        assert decide(Call(pass_, "sm_90", 128, BF16)).path == "portable"
        assert decide(Call(pass_, "sm_90", 128, BF16), measured="hopper").path == "hopper"
        assert decide(Call(pass_, "sm_90", 128, BF16), asked="hopper").path == "hopper"
        assert decide(Call(pass_, "sm_90", 128, BF16), asked="portable", measured="hopper").path == "portable"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architecture": "sm_80"}, "sm_90"),
        ({"architecture": "sm_100"}, "sm_90"),
        ({"architecture": "gfx942"}, "sm_90"),
        ({"dtype": torch.float32}, "fp32"),
        ({"head_dim": 96}, "head sizes"),
        ({"options": frozenset({"softcap"})}, "softcap"),
        ({"options": frozenset({"window", "sinks"})}, "sinks"),
    ],
)
def test_what_hopper_does_not_serve(change, why):
    call = dataclasses.replace(Call("forward", "sm_90", 128, BF16), **change)
    choice = decide(call, measured="hopper")
    assert choice.path == "portable"
    assert why in choice.why
    with pytest.raises(ValueError, match=f"use\\('hopper'\\).*{why}"):
        decide(call, asked="hopper")


def test_use_nests_and_refuses_other_names():
    with paths.use("hopper"):
        with paths.use(None):
            assert paths._asked is None
        assert paths._asked == "hopper"
    assert paths._asked is None
    with (
        pytest.raises(ValueError, match="path: expected one of hopper, portable or None, got 'fast'"),
        paths.use("fast"),
    ):
        pass


def test_the_table_has_every_call_once():
    rows = paths.table("sm_90")
    assert {choice.path for *_, choice in rows} == {"portable"}
    assert any("not measured" in choice.why and "64, 128" in heads for _, heads, _, _, choice in rows)
    assert {choice.path for *_, choice in paths.table("cpu")} == {"sdpa", "eager"}


PLAIN = {"window": False, "packed": False, "softcap": False, "sinks": False}


def chosen(q, obstacle=lambda: None, **used):
    return paths.choose("forward", q, q, obstacle, **(PLAIN | used))


def test_the_interpreter_takes_the_portable_path(monkeypatch):
    monkeypatch.setattr(paths, "INTERPRETED", True)  # there may be a GPU
    with paths.use("hopper"):
        assert chosen(torch.zeros(1, 1, 1, 128, dtype=BF16)) == "portable"


def test_the_tensors_have_the_last_word(monkeypatch):
    monkeypatch.setattr(paths, "INTERPRETED", False)
    monkeypatch.setattr(paths, "architecture", lambda: "sm_90")
    monkeypatch.setattr(paths, "table_of", lambda device: TABLE)
    paths._decided.cache_clear()
    q = torch.zeros(1, 1, 1, 128, dtype=BF16)
    assert chosen(q) == "hopper"  # as the user's table says
    assert chosen(q, softcap=True) == "portable"
    assert chosen(q, lambda: "q is not aligned") == "portable"
    assert chosen(q[:, :, :0]) == "portable"
    with paths.use("portable"):
        assert chosen(q) == "portable"
    with paths.use("hopper"), pytest.raises(ValueError, match="q is not aligned"):
        chosen(q, lambda: "q is not aligned")
    paths._decided.cache_clear()


def test_the_rule_and_the_kernels_agree():
    """What the rule leaves to the hopper path, its launchers take; where it names an obstacle, they do too."""
    from rooflight.kernels.attention.hopper import backward as hopper_backward
    from rooflight.kernels.attention.hopper import forward as hopper_forward

    for head_dim in (32, 64, 96, 128, 256, 512):
        for dtype in (BF16, torch.float16, torch.float32):
            for option in (None, "softcap", "sinks"):
                q = torch.zeros(1, 1, 16, head_dim, dtype=dtype)
                softcap, sinks = (30.0 if option == "softcap" else 0.0), option == "sinks"
                taken = {
                    "forward": hopper_forward.supports(q, q, q, None, softcap, sinks) is None,
                    "backward": hopper_backward.supports(q, q, q, q, None, softcap) is None,
                }
                for pass_, takes in taken.items():
                    call = Call(pass_, "sm_90", head_dim, dtype, frozenset({option} - {None}))
                    assert (decide(call, measured="hopper").path == "hopper") == takes, call


# ---------------------------------------------------------------- a user's own table


def test_a_table_survives_the_file():
    assert tuned.read(GPU) == UserTable()  # no file
    save(TABLE.to_dict(GPU))
    assert tuned.read(GPU) == TABLE
    assert GPU.path.name == "attention-nvidia-made-up-1-sm-90-triton-3.7.1.json"


def broken(**changes: object) -> dict:
    return TABLE.to_dict(GPU) | changes


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "Expecting"),
        ([], "expected an object"),
        (broken(version=2), "version: expected 1, got 2"),
        (broken(gpu="another"), "gpu: expected 'NVIDIA Made-up 1', got 'another'"),
        (broken(triton="3.6.0"), "triton: expected '3.7.1', got '3.6.0'"),
        (broken(tiles={}), "tiles: expected a list"),
        (broken(tiles=[{"kernel": "fwd"}]), "powers of two"),
        (broken(tiles=[broken()["tiles"][0] | {"block_m": 96}]), "powers of two"),
        (broken(tiles=[broken()["tiles"][0] | {"num_stages": 0}]), "1 to 8 stages, got 0"),
        (broken(tiles=[broken()["tiles"][0] | {"kernel": "delta"}]), "kernel: expected one of"),
        (broken(tiles=[broken()["tiles"][0] | {"dtype": "int8"}]), "dtype: expected"),
        (broken(tiles=[broken()["tiles"][0] | {"head_dim": True}]), "head_dim: expected 1 to 512"),
        (broken(paths=[broken()["paths"][0] | {"path": "fast"}]), "paths: expected one of"),
    ],
)
def test_a_broken_table_is_one_sentence_that_names_the_file(content, sentence):
    save(content)
    with pytest.raises(ValueError, match="not a table of `rooflight bench tune`") as error:
        tuned.read(GPU)
    assert sentence in str(error.value)
    assert str(GPU.path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_table_is_left_out_with_a_warning(monkeypatch):
    save("{")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU.gpu)
    monkeypatch.setattr(tuned, "architecture", lambda: GPU.architecture)
    monkeypatch.setattr(tuned, "Identity", lambda gpu, arch: Identity(gpu, arch, GPU.triton))
    tuned.table_of.cache_clear()
    with pytest.warns(UserWarning, match="the tiles that ship are used"):
        assert tuned.table_of(torch.device("cuda")) == UserTable()
    with warnings.catch_warnings():  # once, not at every launch
        warnings.simplefilter("error")
        assert tuned.table_of(torch.device("cuda")) == UserTable()
    save(TABLE.to_dict(GPU))
    tiles.forget()
    assert tuned.table_of(torch.device("cuda")) == TABLE
    tiles.forget()


# ---------------------------------------------------------------- tiles


@pytest.fixture
def made_up_gpu(monkeypatch):
    """Tiles are chosen as on a GPU with 227 KiB of shared memory."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "_shared_memory", lambda device: 227 << 10)
    monkeypatch.setattr(tiles, "architecture", lambda: "sm_90")
    tiles.forget()
    yield
    tiles.forget()


@pytest.mark.usefixtures("made_up_gpu")
def test_a_users_tile_goes_before_the_one_that_ships_and_use_before_both():
    shipped = tiles.choose("fwd", 128, BF16, CPU)
    assert shipped == tiles.shipped("fwd", 128, BF16, CPU)
    tiles.forget()
    with mock.patch.object(tiles, "table_of", return_value=TABLE):
        assert tiles.choose("fwd", 128, BF16, CPU) == Tile(64, 64, 4, 2) != shipped
        assert tiles.choose("fwd", 64, BF16, CPU) == tiles.shipped("fwd", 64, BF16, CPU)
        with tiles.use("fwd", Tile(16, 16)):
            with tiles.use("fwd", Tile(32, 32)):
                assert tiles.choose("fwd", 128, BF16, CPU) == Tile(32, 32)
            assert tiles.choose("fwd", 128, BF16, CPU) == Tile(16, 16)
            assert tiles.choose("dq", 128, BF16, CPU) == tiles.shipped("dq", 128, BF16, CPU)
        assert tiles.choose("fwd", 128, BF16, CPU) == Tile(64, 64, 4, 2)


@pytest.mark.usefixtures("made_up_gpu")
@pytest.mark.parametrize("kernel", tuned.KERNELS)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_candidates_are_tiles_that_a_table_can_hold(kernel, head_dim):
    found = tiles.candidates(kernel, head_dim, BF16, CPU)
    assert found[0] == tiles.shipped(kernel, head_dim, BF16, CPU)
    assert 4 <= len(found) == len(set(found)) <= 60
    for tile in found:
        table = UserTable({(kernel, "bfloat16", head_dim): tile})
        assert UserTable.from_dict(table.to_dict(GPU), GPU) == table
