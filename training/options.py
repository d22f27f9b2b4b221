"""Every key of a run's configuration, for the command line and for docs/training.md.

Names, defaults and meanings are read from the source of TrainConfig and ModelConfig, and not from the classes, whose
import would have `rooflight --help` wait for torch. `python -m rooflight.training.options FILE` writes the tables into
a Markdown file, between its two markers.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

REQUIRED = object()
MARKERS = ("<!-- keys: written by `python -m rooflight.training.options` -->", "<!-- end of keys -->")
_NAMES = r"[a-z_0-9]+(?:, [a-z_0-9]+)*"


@dataclass(frozen=True)
class Option:
    """A key of the configuration: `name` as in TOML, `table` "" or "model", where it stands."""

    name: str
    table: str
    type: str  # as in the source: "int", "float | None", ...
    default: Any  # REQUIRED where there is none
    help: str
    group: str  # the docstring's heading

    @property
    def parameter(self) -> str:
        """Its name among the command's parameters."""
        return f"{self.table}_{self.name}" if self.table else self.name

    @property
    def flag(self) -> str:
        return f"--{self.table}.{self.name}" if self.table else f"--{self.name.replace('_', '-')}"

    @property
    def shown_default(self) -> str:
        if self.default is REQUIRED:
            return "required"
        if self.default is None or isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default)) or "none"
        return str(self.default)

    def value(self, text: str | bool | list[str]) -> Any:
        """What `text`, from the command line, says, as TOML would have it. Raises ValueError naming the option."""
        if isinstance(text, list):  # a flag given once may hold TOML's own list or table
            return self.value(text[0]) if len(text) == 1 else text
        if not isinstance(text, str):
            return text
        kinds = self.type.split(" | ")
        first = kinds[0]
        numbers = first.startswith("tuple[")
        if text.lower() == "none" and ("None" in kinds or numbers):
            return [] if numbers else None
        if "bool" in kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if first in ("int", "float"):
                return (int if first == "int" else float)(text)
            if numbers:
                one = int if first.startswith("tuple[int") else float
                return [one(part) for part in re.split(r"[\s,]+", text.strip("[]() "))]
            if text.startswith(("{", "[")):
                return tomllib.loads(f"x = {text}")["x"]
        except ValueError:
            expected = {"int": "a whole number", "float": "a number"}.get(first, "as TOML has it")
            expected = "numbers, as 1,2" if numbers else expected
            none = " or none" if "None" in kinds else ""
            raise ValueError(f"{self.flag} must be {expected}{none}, got {text!r}") from None
        return text


def meanings(docstring: str) -> dict[str, tuple[str, str]]:
    """The table in a configuration's docstring: name to (meaning, the heading above it)."""
    found: dict[str, tuple[str, str]] = {}
    heading, current = "", ()
    for line in inspect.cleandoc(docstring).splitlines():
        if entry := re.fullmatch(rf"( *)({_NAMES})  +(\S.*)", line):
            current = tuple(entry[2].split(", "))
            found.update(dict.fromkeys(current, (entry[3], heading)))
        elif current and re.match(r" {8}", line):  # goes on
            found.update({name: (f"{found[name][0]} {line.strip()}", heading) for name in current})
        else:
            heading, current = line.strip().partition(":")[0], ()
    return found


@cache
def options() -> tuple[Option, ...]:
    """Every key: TrainConfig's in its order, then ModelConfig's."""
    here = Path(__file__).parent
    return (
        *_read(here / "config.py", "TrainConfig", ""),
        *_read(here.parent / "model" / "config.py", "ModelConfig", "model"),
    )


def _read(path: Path, name: str, table: str) -> list[Option]:
    (source,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    documented = meanings(ast.get_docstring(source) or "")
    found = []
    for node in source.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id == "_":
            continue
        key, kind = node.target.id, ast.unparse(node.annotation)
        default = REQUIRED if node.value is None else ast.literal_eval(node.value)
        if kind == "ModelConfig":  # the table [model], which follows
            continue
        if default is None and "None" not in kind:  # resolved when the configuration is made
            kind += " | None"
        text, group = documented.get(key, ("", ""))
        found.append(Option(key, table, kind, default, text, "Model" if table else group))
    return found


def signature(*first: inspect.Parameter) -> inspect.Signature:
    """`first`, then a parameter for every option, None where it is not given: what typer makes flags of."""
    parameters = []
    for option in options():
        flag = option.flag
        kind: Any = str | None
        if option.type == "bool":
            flag, kind = f"{flag}/--no-{flag.removeprefix('--')}", bool | None
        elif "list" in option.type:
            kind = list[str] | None
        text = f"{option.help}  (default: {option.shown_default})".replace("[", "\\[")
        name = None if option.type == "bool" else f"<{option.type.removesuffix(' | None').partition('[')[0].lower()}>"
        shown = typer.Option(flag, help=text, metavar=name, rich_help_panel=option.group, show_default=False)
        parameters.append(
            inspect.Parameter(
                option.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, shown]
            )
        )
    return inspect.Signature([*first, *parameters])


def overrides(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that flags give: those of the configuration itself, and those of its [model] table.

    given: by parameter; None where a flag was left out.  Raises ValueError on text that is no such value.
    """
    values: dict[str, dict[str, Any]] = {"": {}, "model": {}}
    for option in options():
        if (text := given[option.parameter]) is not None:
            values[option.table][option.name] = option.value(text)
    return values[""], values["model"]


def tables() -> str:
    """Markdown: a table for each heading, a row for each key."""
    lines: list[str] = []
    heading = ""
    for option in options():
        if option.group != heading:
            heading = option.group
            title = "The table `[model]`" if option.table else heading
            lines += ["", f"### {title}", "", "| key | default | meaning and unit |", "| --- | --- | --- |"]
        meaning = option.help.replace("|", "\\|")
        lines.append(f"| `{option.name}` | {option.shown_default} | {meaning} |")
    return "\n".join(lines[1:]) + "\n"


def with_tables(page: str) -> str:
    """`page`, Markdown, with the tables of today between its markers."""
    before, begin, rest = page.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise ValueError(f"page: expected the markers {MARKERS[0]} and {MARKERS[1]}")
    return f"{before}{begin}\n{tables()}{end}{after}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
