"""Which path and tile a call takes: the rule, a user's own table, and what overrides both."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from rooflight.kernels import dispatch, flash_attention
from rooflight.kernels.attention import launch, paths, tuned
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


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_what_was_measured_to_win_is_the_default_and_nothing_else(pass_):
    for head_dim in (64, 128):
        for options in (frozenset(), frozenset({"window"})):
            choice = decide(Call(pass_, "sm_90", head_dim, BF16, options))
            assert choice.path == "hopper"
            for fact in ("H200", "2026-11-27", "triton 3.6.0", "TFLOP/s"):
                assert fact in choice.why
    assert "671/456 at 8k" in decide(Call("forward", "sm_90", 128, BF16)).why
    assert all(hopper > portable for rates in paths.MEASURED.values() for hopper, portable in rates.values())
    unmeasured = [Call(pass_, "sm_90", 128, BF16, frozenset({option})) for option in ("packed", "short")]
    if pass_ == "forward":
        unmeasured.append(Call(pass_, "sm_90", 256, BF16))
    for call in unmeasured:
        assert decide(call).path == "portable"
        assert "not measured" in decide(call).why
        assert decide(call, measured="hopper").path == "hopper"
        assert decide(call, asked="hopper").path == "hopper"


def test_use_goes_before_a_users_table_and_that_before_the_measurement():
    call = Call("forward", "sm_90", 128, BF16)
    assert decide(call, measured="portable").path == "portable"
    assert decide(call, asked="portable", measured="hopper").path == "portable"
    assert decide(call, asked="hopper", measured="portable").path == "hopper"
    assert decide(call, measured="hopper", failed="no Gluon") == paths.Choice(
        "portable", "hopper failed on this machine: no Gluon"
    )


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
        ({"options": frozenset({"alibi"})}, "alibi"),
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
    assert {choice.path for *_, choice in rows} == {"portable", "hopper"}
    assert {choice.path for *_, choice in paths.table("sm_80")} == {"portable"}
    assert any("not measured" in choice.why and "packed" in options for *_, options, choice in rows)
    assert {choice.path for *_, choice in paths.table("cpu")} == {"sdpa", "eager"}


def chosen(q, *options):
    return paths.choose("forward", q, q, tuple(option in options for option in paths.OPTIONS))


def test_the_interpreter_takes_the_portable_path(monkeypatch):
    monkeypatch.setattr(paths, "INTERPRETED", True)  # there may be a GPU
    with paths.use("hopper"):
        assert chosen(torch.zeros(1, 1, 1, 128, dtype=BF16)) == "portable"


@pytest.fixture
def hopper_gpu(monkeypatch):
    """CPU tensors stand on an H200; the portable kernels run in the interpreter as ever."""
    if not dispatch.INTERPRETED:
        pytest.skip("the tensors are a CPU's, which run kernels in the interpreter only")
    monkeypatch.setattr(paths, "INTERPRETED", False)
    monkeypatch.setattr(paths, "architecture", lambda: "sm_90")
    monkeypatch.setattr(paths, "table_of", mock.Mock(return_value=UserTable()))
    paths.forget()
    monkeypatch.setattr(paths, "SHORT", 0)  # what the interpreter can run in a second
    launch._hopper.cache_clear()
    yield monkeypatch
    paths.forget()
    launch._hopper.cache_clear()


def test_fewer_queries_than_were_measured_are_short(hopper_gpu):
    hopper_gpu.setattr(paths, "SHORT", 8)
    chooses = hopper_gpu.setattr(paths, "choose", mock.Mock(return_value="portable")) or paths.choose
    for n_query, short in ((7, True), (8, False)):
        q = torch.randn(1, 1, n_query, 64).to(BF16)
        flash_attention(q, q, q)
        assert dict(zip(paths.OPTIONS, chooses.call_args.args[-1], strict=True)) == {
            "window": False, "packed": False, "softcap": False, "sinks": False, "alibi": False, "short": short
        }  # fmt: skip


def test_a_users_table_has_its_say_and_use_the_last(hopper_gpu):
    q = torch.zeros(1, 1, 1, 128, dtype=BF16)
    assert chosen(q) == chosen(q, "window") == "hopper"
    assert chosen(q, "packed") == chosen(q, "softcap") == chosen(q[:, :, :0]) == "portable"
    hopper_gpu.setattr(paths, "table_of", mock.Mock(return_value=TABLE))
    paths.forget()
    assert chosen(q, "packed") == "hopper"  # as the user's table says
    with paths.use("portable"):
        assert chosen(q) == "portable"
    with paths.use("hopper"), pytest.raises(ValueError, match="softcap"):
        chosen(q, "softcap")


# ---------------------------------------------------------------- a hopper path that cannot run


def gradients(head_dim: int = 64) -> list[torch.Tensor]:
    """The output and the gradients of one attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, head_dim).to(BF16).requires_grad_() for _ in range(3))
    out = flash_attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


def warned(function) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in caught]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_triton_without_gluon_is_one_warning(hopper_gpu):
    with paths.use("portable"):
        expected = gradients()
    for name in list(sys.modules):
        if name.startswith(launch.__package__ + ".hopper"):
            hopper_gpu.delitem(sys.modules, name)
    hopper_gpu.delattr(sys.modules[launch.__package__], "hopper", raising=False)
    hopper_gpu.setitem(sys.modules, "triton.experimental.gluon", None)  # importing it raises ImportError
    found, messages = warned(gradients)
    assert same(found, expected)
    assert len(messages) == 1  # forward and backward together
    assert "ImportError" in messages[0] or "ModuleNotFoundError" in messages[0]
    assert "portable kernels are used" in messages[0]
    assert warned(gradients)[1] == []
    assert "failed on this machine" in decide(Call("forward", "sm_90", 64, BF16), failed=paths._failed["forward"]).why


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"),
        AttributeError("module 'gl' has no attribute 'warp_specialize'"),
        OutOfResources(240_000, 232_448, "shared memory"),
        RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device\nmore"),
    ],
    ids=["compile", "name", "resources", "launch"],
)
def test_a_kernel_that_does_not_compile_or_launch_is_one_warning(hopper_gpu, pass_, error):
    with paths.use("portable"):
        expected = gradients()
    from rooflight.kernels.attention.hopper import backward, forward

    def fail(*args, **kwargs):
        raise error

    module = {"forward": forward, "backward": backward}
    for name in ("forward", "backward"):  # the other pass is not here either: it steps back without a word
        if name == pass_:
            hopper_gpu.setattr(module[name], f"launch_{name}", fail)
        else:
            hopper_gpu.setattr(module[name], "supports", lambda *args: "not this one")
    found, messages = warned(gradients)
    assert same(found, expected)
    assert len(messages) == 1
    assert f"hopper {pass_} cannot run" in messages[0]
    assert str(error).splitlines()[0] in messages[0]
    assert "\n" not in messages[0]
    assert warned(gradients)[1] == []


def test_what_says_nothing_of_the_path_is_raised(hopper_gpu):
    from rooflight.kernels.attention.hopper import forward

    hopper_gpu.setattr(forward, "launch_forward", mock.Mock(side_effect=torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        gradients()
    hopper_gpu.setattr(forward, "launch_forward", mock.Mock(side_effect=RuntimeError("broken")))
    with paths.use("hopper"), pytest.raises(RuntimeError, match="broken"):
        gradients()  # asked for: the error, not another path
    assert not paths._failed


def test_tensors_that_tma_cannot_address_step_back_silently(hopper_gpu):
    q = torch.randn(1, 2, 9, 72).to(BF16)[..., 1:65]  # its rows start between multiples of 16 bytes
    found, messages = warned(lambda: flash_attention(q, q, q))
    assert messages == []
    with paths.use("portable"):
        assert torch.equal(found, flash_attention(q, q, q))
    with paths.use("hopper"), pytest.raises(ValueError, match="q is not aligned"):
        flash_attention(q, q, q)


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
