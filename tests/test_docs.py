"""The commands that README.md and docs/ show: the path to one's own model is run, every other is parsed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from rooflight.bench import cli
from rooflight.bench.predict.validate import read_model
from rooflight.kernels import flash_attention, reference
from rooflight.training import pretrained

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "NOTES.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = ("rooflight", "python", "make", "pytest", "bench/on_gpu.sh")


def blocks(page: str, *languages: str) -> list[str]:
    return [block for language, block in FENCE.findall(page) if language in languages]


def commands(page: str) -> list[str]:
    """Lines of code blocks without a language or of bash, and code spans of several words; without comments."""
    lines = [line for block in blocks(page, "", "bash") for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", page))]
    lines = [re.split(r"  +#", line)[0].strip() for line in lines]
    return [line for line in lines if " " in line and line.split(" ")[0] in NAMES]


SHOWN = sorted(
    {(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page.read_text("utf-8"))}
)


@pytest.fixture(scope="module")
def parsed():
    """Runs the command line up to where a command would begin; returns what it would be called with."""
    root = get_command(cli.app)
    called: list[dict] = []

    def only_parse(group) -> None:
        for command in group.commands.values():
            if hasattr(command, "commands"):
                only_parse(command)
            else:
                command.callback = lambda **values: called.append(values)

    only_parse(root)

    def parse(arguments: list[str]) -> dict:
        command, rest = root, arguments
        while rest and hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        if not rest:  # a command that is named, or one that needs nothing
            return {}
        called.clear()
        root.main(arguments, prog_name="rooflight", standalone_mode=False)
        (values,) = called
        return values

    return parse


def check(line: str, parse) -> None:
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "rooflight"]:
        words = words[2:]
    if words[0] == "rooflight":
        values = parse(words[1:])
        models = [values[k] for k in ("config", "model") if isinstance(values.get(k), str)] + (
            values.get("models") or []
        )
        for model in models:
            if not (model.isupper() or model.endswith(".toml")):
                read_model(model)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), f"no target {words[1]}"
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), words[2]
    elif words[0] != "pytest":
        (script,) = (word for word in words if "/" in word)
        assert (ROOT / script).is_file()


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=[f"{page}: {line}" for page, line in SHOWN])
def test_a_shown_command_is_one(page, line, parsed):
    check(line, parsed)


@pytest.mark.parametrize(
    "line",
    [
        "rooflight tokenizer encode DIR FILE",  # no --tokenizer
        "rooflight bench validate gelu",  # no preset
        "rooflight bench validte tiny",
        "rooflight train --model.layers 2",
        "make demonstration",
        "python -m rooflight.bench.measure.hosts",
        "python tests/support/artefacts.py",
    ],
)
def test_a_wrong_command_would_be_found(line, parsed):
    with pytest.raises(Exception):  # noqa: B017, PT011 (typer's usage errors have no public class in common)
        check(line, parsed)


def test_the_commands_are_found():
    assert (
        "README.md",
        "rooflight train --config run.toml --resume --max-steps 2000",
    ) in SHOWN  # a comment after it
    assert ("README.md", "rooflight estimate run.toml --batch-size 16") in SHOWN  # in a sentence
    assert ("README.md", "pytest --benchmark") in SHOWN
    assert len(SHOWN) > 40


def test_the_path_from_a_text_to_a_model(tmp_path, monkeypatch, capsys):
    """The README's section, line by line, with fewer steps and tokens."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("## From your own text to your own model")[1].split("\n## ")[0]
    smaller = {
        "[model]": "[model]\ncontext_length = 32",
        "-n -1000": "-n -20",
        "-n 1000": "-n 20",
        "4096": "300",
        "= 1000 ": "= 2 ",
        "2000": "4",
        '"Once"': '"Once" --max-new-tokens 5',
        "= 16 ": "= 2 ",
    }
    for shown, run in smaller.items():
        assert shown in section
        section = section.replace(shown, run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "open_model", partial(pretrained.open_model, ops=reference))
    Path("text.txt").write_text("Once upon a time there was a mill.\n" * 100, encoding="utf-8")
    (config,) = blocks(section, "toml")
    Path("run.toml").write_text(f"peak_flops = 1e9  # not measured\n{config}", encoding="utf-8")
    for line in "".join(blocks(section, "bash")).splitlines():
        if not line.startswith("rooflight "):
            subprocess.run(line, shell=True, check=True)
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, f"{line}: {capsys.readouterr().err}"
    printed = capsys.readouterr().out
    for word in ("2 steps", "4 steps", "\nOnce", "perplexity", "loss.png: written"):
        assert word in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"train.bin", "val.bin.json", "run", "loss.png"}


def test_the_kernels_example_runs(device):
    (code,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    x = torch.randn(1, 8, 128, device=device)
    names = {f"{name}_proj": torch.nn.Linear(128, 128, device=device) for name in "qkv"}
    names |= {"x": x, "weight": torch.ones(128, device=device)}
    exec(code, names)
    assert names["flash_attention"] is flash_attention
    assert names["y"].shape == (1, 2, 8, 64)
