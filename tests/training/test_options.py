"""Every key of the configuration: as a flag, in --help, and in docs/training.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rooflight.model import ModelConfig
from rooflight.training import loop
from rooflight.training.commands import app
from rooflight.training.config import TrainConfig
from rooflight.training.options import REQUIRED, meanings, options, with_tables

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SHAPE = {"vocab_size": "32", "context_length": "8", "n_layer": "1", "n_head": "2", "d_model": "16"}
NEEDED = {"train_data": "x.bin", "out_dir": "run"}


@pytest.fixture
def config_of(monkeypatch):
    """The configuration that `rooflight train` with these arguments would train by."""
    seen: list[TrainConfig] = []

    class Seen(Exception):  # noqa: N818
        pass

    def run(config: TrainConfig) -> None:
        seen.append(config)
        raise Seen

    monkeypatch.setattr(loop, "train", run)

    def config(*arguments: str) -> TrainConfig:
        result = CliRunner().invoke(app, ["train", *arguments])
        if not isinstance(result.exception, Seen):
            raise result.exception or AssertionError(result.output)
        return seen[-1]

    return config


def test_options_are_the_fields_of_the_configurations():
    for table, kind in (("", TrainConfig), ("model", ModelConfig)):
        fields = {f.name: f.default for f in dataclasses.fields(kind) if f.name != "model"}
        found = {o.name: o.default for o in options() if o.table == table}
        assert {k: dataclasses.MISSING if v is REQUIRED else v for k, v in found.items()} == fields
    for option in options():
        assert option.help, f"{option.name} has no line in the docstring"
        assert option.group, option.name


def test_a_docstrings_table_is_read():
    text = """Head.

    First heading
        one          the first,
                     on two lines
        two, three   both
    Second: with more to say
        four         x
    And a sentence.
    """
    found = meanings(text)
    assert found["one"] == ("the first, on two lines", "First heading")
    assert found["two"] == found["three"] == ("both", "First heading")
    assert found["four"] == ("x", "Second")
    assert len(found) == 4


def test_every_key_is_a_flag(config_of):
    arguments = []
    for option in options():
        value = (SHAPE if option.table else NEEDED).get(option.name, option.shown_default)
        if option.type == "bool":
            arguments.append(option.flag if value == "true" else option.flag.replace("--", "--no-"))
        else:
            arguments += [option.flag, value]
    shape = ModelConfig(**{name: int(value) for name, value in SHAPE.items()})
    assert config_of(*arguments) == TrainConfig(model=shape, **NEEDED)


def test_flags_go_over_the_file(config_of, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "train_data = 'x.bin'\nout_dir = 'run'\nlr = 0.1\ngrad_clip = 'none'\n"
        "[model]\npreset = 'tiny'\nn_head = 2\nwindow = 8\n"
    )
    config = config_of("--config", str(path))
    assert (config.grad_clip, config.lr, config.model.n_head, config.model.window) == (None, 0.1, 2, 8)
    config = config_of(
        "--config", str(path), "--grad-clip", "0.5", "--betas", "0.8,0.99", "--model.n_layer", "2",
        "--model.window", "none", "--model.tie_embeddings", "--max-seconds", "9", "--seed", "7",
        "--model.qk_norm", "all", "--model.nope_layers", "0,1", "--model.full_layers", "none",
        "--model.rope_scaling", "{kind = 'linear', factor = 2.0}",
    )  # fmt: skip
    assert (config.grad_clip, config.betas, config.lr) == (0.5, (0.8, 0.99), 0.1)
    assert (config.max_seconds, config.seed) == (9.0, 7)
    assert (config.model.n_layer, config.model.n_head, config.model.window) == (2, 2, None)
    assert config.model.tie_embeddings
    assert (config.model.qk_norm, config.model.nope_layers, config.model.full_layers) == ("all", (0, 1), ())
    assert config.model.rope_scaling.factor == 2.0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["x.bin"], Path("x.bin")),
        (["x.bin", "shards/"], [Path("x.bin"), Path("shards")]),
        (["['x.bin', 'y.bin']"], [Path("x.bin"), Path("y.bin")]),
        (["{'code/' = 0.3, 'web.bin' = 1}"], {"code/": 0.3, "web.bin": 1.0}),
    ],
)
def test_training_data_as_flags(config_of, tmp_path, flags, expected):
    """And the file's forms of the same, which the flags go over."""
    path = tmp_path / "run.toml"
    path.write_text("out_dir = 'run'\n[model]\npreset = 'tiny'\n[train_data]\n'code/' = 0.3\n'web.bin' = 1\n")
    assert config_of("--config", str(path)).train_data == {"code/": 0.3, "web.bin": 1.0}
    given = [part for text in flags for part in ("--train-data", text)]
    assert config_of("--config", str(path), *given).train_data == expected


def test_help_shows_every_flag_with_its_default():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for option in options():
        line = next(line for line in shown.splitlines() if f"{option.flag} " in line and "(default: " in line)
        assert f"(default: {option.shown_default})" in line
        assert option.help in line


def test_the_page_has_the_tables_of_today():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python -m rooflight.training.options docs/training.md`"
    with pytest.raises(ValueError, match="page: expected the markers"):
        with_tables("none here")
