"""The commands that README.md and docs/ show, run in small; those of bench/NOTES.md are parsed.

The README's path from a text to a model makes a folder; every other command runs in a copy of it.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.main import get_command

from rooflight.bench import cli
from rooflight.bench.measure.harness import machine
from rooflight.bench.predict.validate import read_model
from rooflight.bench.rates.ceilings import save_ceilings
from rooflight.kernels import dispatch, flash_attention
from rooflight.model import Ceilings, ModelConfig, Transformer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "NOTES.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CPU = torch.device("cpu")
README = (ROOT / "README.md").read_text(encoding="utf-8")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = ("rooflight", "python", "make", "pytest", "torchrun", "bench/on_gpu.sh")


def blocks(page: str, *languages: str) -> list[str]:
    return [block for language, block in FENCE.findall(page) if language in languages]


def commands(page: str) -> list[str]:
    """Lines of code blocks without a language or of bash, and code spans of several words; without comments."""
    lines = [line for block in blocks(page, "", "bash") for line in block.splitlines()]
    page = FENCE.sub("", page)
    lines += re.findall(r"^    (.*)", page, re.MULTILINE)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", page)]
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
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]  # what each process runs
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


PATH = README.split("## From your own text to your own model")[1].split("\n## ")[0]
# What the path is run with: a model of some thousand parameters, few steps, few tokens.
PATH_SMALLER = {
    "[model]": "[model]\ncontext_length = 32\nn_layer = 2\nn_head = 2\nd_model = 32\nd_ff = 64",
    "-n -1000": "-n -20",
    "-n 1000": "-n 20",
    "4096": "300",
    "= 1000 ": "= 2 ",
    "2000": "4",
    '"Once"': '"Once" --max-new-tokens 5',
    "= 16 ": "= 2 ",
}
# And the other commands: what stands for a page's own words, and what is added, by the command's beginning.
INSTEAD = {
    "--out DIR": "--out made",
    "--out FOLDER": "--out made",
    "--out-dir run": "--out-dir made",
    "FILE.bin": "bare.bin",
    "header train.bin": "header bare.bin",
    "TEXT TOKENIZER": "text.txt tokenizer 2 1",
    "FILE...": "text.txt",
    "RUN...": "run",
    "FILE": "text.txt",
    "DIR": "tokenizer",
    "RUN": "run",
    "FOLDER": "hf",
    "MODEL": "tiny",
    "-t tk": "-t tokenizer",
    "--tokenizer tk": "--tokenizer tokenizer",
    "$SLURM_ARRAY_TASK_ID/16": "3/16",
    "--out tk": "--out made",
    "decode -t tokenizer corpus.bin": "decode -t tokenizer train.bin",
    "--vocab-size 10000": "--vocab-size 300",
    "--max-seconds 60": "--max-steps 2",
    "validate tiny": "validate small.toml",
    "python -m rooflight": "python -m rooflight --help",
    "step gpt2-xl": "step small.toml",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
ALSO = {
    "rooflight generate": "--max-new-tokens 5",
    "rooflight train --config run.toml": "--out-dir made",
    "rooflight train --preset": "--batch-size 2 --model.context_length 32 --model.vocab_size 300 --dtype float32",
    "torchrun --standalone": "--out-dir made",
    "rooflight demo": "--text corpus.txt --steps 2 --vocab-size 300",
    "rooflight tokenizer bench": "--megabytes 0.01 --repeats 1 --peer tokenizers",
    "rooflight bench ceilings": "--seconds 0.01",
    "rooflight bench kernels": "--seconds 1",
    "rooflight bench validate": "--batch-size 1 --dtype float32",
    "rooflight bench step": "--batch-size 1 --seconds 0.1 --dtype float32 --way 'ours, eager'",
    "python -m rooflight.training.options": "page.md",
}
# Those that are parsed only, and why.
NOT_RUN = {
    "make demo": "sets an environment up from the network; `rooflight demo` is run",
    "make test": "sets an environment up from the network, and is what runs this",
    "make test-slow": "sets an environment up from the network, and is what runs this",
    "pytest --benchmark": "tests/bench/test_benchmarks.py runs it",
    "bench/on_gpu.sh OUT": "needs a GPU; tests/bench/test_on_gpu.py runs what does not",
    "torchrun --nnodes 4 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id run --rdzv-endpoint "
    "HOST:29400 -m rooflight train --config run.toml --parallel fsdp": "needs four machines; "
    "tests/training/test_distributed.py restarts the processes of two torchruns",
    "rooflight bench tune": "needs a GPU; tests/bench/test_cli.py holds what it says without one",
    "python tests/support/artifacts.py": "takes minutes; tests/kernels/test_artifacts.py compiles what it does",
}
SLOW = (
    "torchrun",
    "rooflight demo",
    "rooflight tokenizer bench",
    "rooflight bench ceilings",
    "rooflight bench kernels",
    "rooflight bench validate",
)


def smaller(line: str, table: dict[str, str] = INSTEAD) -> str:
    for shown, run in table.items():
        line = re.sub(rf"(?<![\w.]){re.escape(shown)}(?![\w.])", lambda _, run=run: run, line)
    return " ".join([line, *(flags for beginning, flags in ALSO.items() if line.startswith(beginning))])


def needs_more(line: str) -> bool:
    """Whether a line names a command that needs arguments and gives none: a name in a sentence."""
    command, words = get_command(cli.app), shlex.split(line)[1:]
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return not words and (hasattr(command, "commands") or any(p.required for p in command.params))


@contextmanager
def plain_cpu(folder: Path) -> Iterator[None]:
    """In the folder, as without the tests' interpreter, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(dispatch, "INTERPRETED", False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        yield


def run(line: str) -> str:
    """What a command prints; it must end well. Short ones run in this process, which has torch already."""
    words = shlex.split(line, comments=True)
    modules = {"torchrun": ["torch.distributed.run"]} | ({"rooflight": ["rooflight"]} if line.startswith(SLOW) else {})
    if words[0] in modules:
        words = ["python", "-m", *modules[words[0]], *words[1:]]
    if words[0] != "rooflight":
        shell = words[0] != "python"
        called = line if shell else [sys.executable, *words[1:]]
        done = subprocess.run(called, shell=shell, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code in (0, None), f"{line}: {err.getvalue()}"
    return out.getvalue()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the README's path was walked, line by line, and what that printed."""
    folder, section = tmp_path_factory.mktemp("docs"), PATH
    for shown, instead in PATH_SMALLER.items():
        assert shown in section
        section = section.replace(shown, instead)
    (folder / "text.txt").write_text("Once upon a time there was a mill.\n" * 100, encoding="utf-8")
    (config,) = blocks(section, "toml")
    (folder / "run.toml").write_text(f"peak_flops = 1e9  # not measured\n{config}", encoding="utf-8")
    with plain_cpu(folder):
        printed = [run(line) for line in "".join(blocks(section, "bash")).splitlines()]
        # what the other pages speak of
        run("rooflight export-hf run --tokenizer tokenizer --out hf")
        Path("corpus.txt").write_text("\n".join(page.read_text("utf-8") for page in PAGES), encoding="utf-8")
        Path("corpus").mkdir()
        shutil.copy("corpus.txt", "corpus/corpus.txt")
        with gzip.open("more.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write('{"text": "Once upon a time."}\n' * 10)
        for i in range(2):
            run(f"rooflight tokenizer count corpus/ --out counts/{i} --shard {i}/2")
        shutil.copy("train.bin", "bare.bin")
        shutil.copy("run.toml", "small.toml")
        shutil.copy(ROOT / "README.md", "README.md")
        shutil.copy(ROOT / "docs" / "training.md", "page.md")
        where = machine(torch.device("cpu"))
        rates = {"bfloat16": 1e11, "float32": 1e11}
        save_ceilings(
            Ceilings(rates, 1e10, device=where["device"], versions={"torch": where["torch"]}), torch.device("cpu")
        )
    return folder, "".join(printed)


WALKED = set(commands(PATH))
LINES = sorted({line for page, line in SHOWN if page != "bench/NOTES.md"} - WALKED - NOT_RUN.keys())
RUN = [line for line in LINES if not (line.startswith("rooflight") and needs_more(line))]


@pytest.mark.cpu
def test_the_path_from_a_text_to_a_model(walked):
    folder, printed = walked
    for word in ("2 steps", "4 steps", "\nOnce", "perplexity", "loss.png: written"):
        assert word in printed
    assert {path.name for path in folder.iterdir()} >= {"train.bin", "val.bin.json", "run", "loss.png"}


@pytest.mark.cpu
@pytest.mark.parametrize("line", [pytest.param(line, marks=[pytest.mark.slow] * line.startswith(SLOW)) for line in RUN])
def test_a_shown_command_runs(line, walked, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(walked[0], folder)
    with plain_cpu(folder):
        run(smaller(line))


def test_the_tables_speak_of_what_is_shown():
    assert NOT_RUN.keys() <= {line for _, line in SHOWN}
    for shown in INSTEAD:
        assert any(smaller(line) != smaller(line, INSTEAD | {shown: shown}) for line in RUN), shown
    for beginning in (*ALSO, *SLOW):
        assert any(line.startswith(beginning) for line in RUN), beginning


def test_a_command_that_fails_would_be_found(walked):
    with plain_cpu(walked[0]):
        for line in ("rooflight eval run gone.txt", "python -m rooflight evaluate", "head gone.txt"):
            with pytest.raises(AssertionError, match=line):
                run(line)


CODE = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES[1:]
    for i, code in enumerate(blocks(page.read_text("utf-8"), "python"))
]


@pytest.mark.cpu
@pytest.mark.parametrize("code", CODE)
def test_a_pages_python_runs(code, walked, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(walked[0], folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # FSDP2 asks for one
    try:
        with plain_cpu(folder):
            model = Transformer(ModelConfig(64, 16, n_layer=1, n_head=2, d_model=16))
            exec(code, {"torch": torch, "model": model})
    finally:
        dist.destroy_process_group()


def test_the_kernels_example_runs(device):
    (code,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    x = torch.randn(1, 8, 128, device=device)
    names = {f"{name}_proj": torch.nn.Linear(128, 128, device=device) for name in "qkv"}
    names |= {"x": x, "weight": torch.ones(128, device=device)}
    exec(code, names)
    assert names["flash_attention"] is flash_attention
    assert names["y"].shape == (1, 2, 8, 64)
