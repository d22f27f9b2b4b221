"""The whole machine on real text: tokenizer, training, a sample, and prediction beside measurement.

On a CPU the dtype is the one in which this very model's step is faster (some have no arithmetic in bfloat16, and take
nine times as long in it), and the model is compiled where the run is long enough to pay for that.

Every stage leaves its result in the output folder and is passed over when the result is there, and training resumes
from its last checkpoint: the same command goes on after an interruption.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from ..model import ModelConfig, Transformer, stream
from ..tokenizer import Tokenizer, train_bpe
from ..tokenizer.files import atomic
from ..tokenizer.sizes import MAX_TOKENS
from ..training.checkpoint import load_model
from ..training.config import TrainConfig, model_config
from ..training.files import write_json
from ..training.loop import TrainResult, resolve_device, train
from .measure.harness import machine
from .predict.step import Step
from .predict.validate import validate_step
from .rates.ceilings import cache_folder
from .reports.plots import why_no_plots
from .reports.terminal import show
from .text import END_OF_TEXT, find_text, pieces, read_documents, split_text

SETTINGS = "demo.json"  # in a demo's folder, and the sign that it is one
SECONDS = {"cpu": 180.0, "cuda": 120.0}  # of training: on a GPU all of the demo ends within four minutes
CEILINGS_SECONDS = 15.0  # for this machine's rates, where none are kept
COMPILING_PAYS = 120.0  # seconds of training from which on the half minute of the compiler is won back on a CPU
TRIAL_SECONDS = 0.5  # of steps of one sequence, in each dtype


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does; text None takes the plays, steps and seconds bound the training (SECONDS when None),
    fresh sets an earlier run aside. Raises ValueError on a vocabulary without the 256 bytes and END_OF_TEXT.
    """

    out_dir: Path = Path("runs/demo")
    text: Path | None = None
    vocab_size: int = 1024
    seconds: float | None = None
    steps: int = 20_000
    device: str = "auto"
    fresh: bool = False
    prompt: str = "ROMEO\n"
    sample_tokens: int = 300

    def __post_init__(self) -> None:
        if not 256 < self.vocab_size <= MAX_TOKENS:  # the bytes, and END_OF_TEXT
            raise ValueError(f"vocab_size: expected 257 to {MAX_TOKENS}, got {self.vocab_size}")


def demo_training(config: DemoConfig, device: torch.device) -> TrainConfig:
    """The run for this machine: about 1 M parameters on a CPU, about 30 M and the Triton kernels on a GPU."""
    out, on_gpu = config.out_dir, device.type == "cuda"
    if on_gpu:
        model = ModelConfig(config.vocab_size, 512, n_layer=8, n_head=8, d_model=512, qk_norm=True)
    else:
        # Settings compared at equal numbers of tokens on this text: batch 8 before 16, Muon at 0.03 to 0.04 before 0.02
        # and 0.08, tied embeddings and q/k norm each by about 0.02 bits per byte.
        model = ModelConfig(
            config.vocab_size, 256, n_layer=4, n_head=2, d_model=128, d_ff=384, tie_embeddings=True, qk_norm=True
        )
    return TrainConfig(
        model=model,
        train_data=out / "train.bin",
        val_data=out / "val.bin",
        out_dir=out / "training",
        batch_size=64 if on_gpu else 8,
        lr=0.003 if on_gpu else 0.008,
        muon_lr=0.02 if on_gpu else 0.03,
        decay=0.7,
        dtype="bfloat16",
        compile=False,  # on a GPU the step is a graph, on a CPU fastest_on_cpu decides
        # On a CPU a validation takes as long as some twenty steps; a GPU's step takes milliseconds, and its checkpoint
        # most of a second.
        eval_every=1000 if on_gpu else 500,
        checkpoint_every=2000 if on_gpu else 500,
        max_steps=config.steps,
        max_seconds=SECONDS[device.type] if config.seconds is None else config.seconds,
        device=str(device),
        resume=True,
    )


def run_demo(config: DemoConfig, console: Console) -> int:
    """Run every stage; returns the exit status, 1 when the validation loss did not fall.

    What the stages will need is looked at first: nothing is written or moved before all of it is right.
    Raises ValueError or OSError, one sentence, where something is not.
    """
    device = resolve_device(config.device)
    run = demo_training(config, device)
    out, no_plots = config.out_dir, why_no_plots()
    prepared = _prepared(config)
    if prepared:
        _check_model(run)
    source = None if prepared else find_text(config.text, out.parent / "text")
    if no_plots:
        console.print(f"No loss curve will be drawn: {no_plots}", markup=False)
    if config.fresh and _is_demo(out):
        previous = _set_aside(out)
        console.print(f"The earlier run is now in {previous}.")
    if not (out / SETTINGS).exists():
        write_json(out / SETTINGS, _settings(config))

    console.rule("1. Text and tokenizer")
    tokenizer = prepare_data(config, source, console)

    console.rule("2. Training")
    keep_compiled_code(out)
    if device.type == "cpu":
        run, why = fastest_on_cpu(run, device)
        console.print(why, markup=False)
    result = train(run, console=console)
    if result.stopped == "interrupted":
        console.print(f"Interrupted and saved. The same command goes on from step {result.step}.")
        return 130

    console.rule("3. A sample")
    print_sample(config, run, tokenizer, device, console)

    console.rule("4. Predicted and measured")
    validation = validate_step(run, device, measured=result, seconds=CEILINGS_SECONDS)
    show(console, *validation.tables())
    ceilings = validation.predicted.ceilings
    results = {"kind": "demo", "machine": machine(device), "training": asdict(result), **validation.to_dict()}
    results["ceilings"] = ceilings.to_dict() if ceilings else None
    write_json(out / "results.json", json.loads(json.dumps(results, default=str)))

    if no_plots is None:
        plot_loss(run.out_dir / "log.jsonl", out / "loss.png")
        console.print(f"Loss curve: {out / 'loss.png'}")
    return conclude(result, console)


def _settings(config: DemoConfig) -> dict[str, str | int | None]:
    """What the files of a demo's folder depend on."""
    return {"text": str(config.text) if config.text else None, "vocab_size": config.vocab_size}


def _is_demo(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


def _prepared(config: DemoConfig) -> bool:
    """Whether the folder holds this demo's tokens already.

    Raises ValueError when it holds another demo, or something that is none.
    """
    out = config.out_dir
    if out.is_dir() and not _is_demo(out) and any(out.iterdir()):
        raise ValueError(f"{out} holds files, and no demo's: --out takes another folder")
    if config.fresh or not _is_demo(out):
        return False
    try:
        earlier = dict(json.loads((out / SETTINGS).read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / SETTINGS} is damaged ({error}); --fresh starts anew") from None
    for name, value in _settings(config).items():
        if earlier.get(name) != value:
            raise ValueError(
                f"{out} holds a demo with {name} {earlier.get(name)!r}, not {value!r}; "
                "--fresh starts anew, --out takes another folder"
            )
    return (out / "tokenizer").exists()


def _check_model(run: TrainConfig) -> None:
    """Raise ValueError where the training that has begun there is of another model."""
    begun = run.out_dir / "config.json"
    if begun.exists() and model_config(json.loads(begun.read_bytes())["model"]) != run.model:
        raise ValueError(
            f"{run.out_dir.parent} holds a demo of another model, of an earlier version or another kind of device; "
            "--fresh starts anew, --out takes another folder"
        )


def _set_aside(out: Path) -> Path:
    """Rename a demo's folder OUT.previous, or OUT.previous-2 and so on where a folder of that name is no demo's."""
    for number in itertools.count(1):
        previous = out.with_name(f"{out.name}.previous" + (f"-{number}" if number > 1 else ""))
        if _is_demo(previous):
            shutil.rmtree(previous)
        if not previous.exists():
            out.rename(previous)
            return previous
    raise AssertionError


def prepare_data(config: DemoConfig, source: tuple[str, list[Path]] | None, console: Console) -> Tokenizer:
    """Text to token files, and the tokenizer that made them; source: what find_text found, None where that is done."""
    out = config.out_dir
    if source is not None:
        name, files = source
        train_bytes, held_out = split_text(read_documents(files), out / "train.txt", out / "val.txt")
        console.print(f"Text: {name}; {train_bytes:,} bytes to train on, {held_out:,} held out.")
        vocab, merges = train_bpe(out / "train.txt", config.vocab_size, [END_OF_TEXT], progress=True)
        Tokenizer(vocab, merges, [END_OF_TEXT]).save(out / "tokenizer")
    tokenizer = Tokenizer.load(out / "tokenizer")
    for split in ("train", "val"):
        binary = out / f"{split}.bin"
        if not binary.exists():
            text = out / f"{split}.txt"
            n_tokens = tokenizer.encode_file(text, binary)
            console.print(f"{split}: {n_tokens:,} tokens, {text.stat().st_size / n_tokens:.2f} bytes each.")
    return tokenizer


def keep_compiled_code(out: Path) -> None:
    """Have the compilers keep their code for the next run: in the user's cache folder, else in the demo's own.

    What the environment says already stands.
    """
    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:  # a container's user without a home, a cache that belongs to somebody else
        folder = out / "compiled"
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))  # its own is in the home
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def fastest_on_cpu(run: TrainConfig, device: torch.device) -> tuple[TrainConfig, str]:
    """The run in the dtype that is faster here, compiled where that pays, and a line that says so.

    A run that has begun keeps its dtype.
    """
    begun = run.out_dir / "config.json"
    if begun.exists():
        dtype = json.loads(begun.read_bytes())["dtype"]
        step, why = step_seconds(run, dtype, device), f"{dtype}, as it began"
    else:
        steps = {dtype: step_seconds(run, dtype, device) for dtype in ("float32", "bfloat16")}
        dtype = min(steps, key=steps.__getitem__)
        step = steps[dtype]
        slower, slow = max(steps.items(), key=lambda item: item[1])
        why = f"{dtype}: a step of one sequence takes {step * 1e3:.0f} ms, in {slower} {slow * 1e3:.0f}"
    assert run.max_seconds is not None
    planned = min(run.max_seconds, run.max_steps * run.batch_size * step)
    too_short = f"that pays from {COMPILING_PAYS:.0f} seconds of training on"
    missing = too_short if planned < COMPILING_PAYS else no_compiler()
    compiled = "compiled first, half a minute that the next run is spared" if missing is None else ""
    why = f"In {why}; {compiled or f'not compiled: {missing}'}."
    return replace(run, dtype=dtype, compile=missing is None), why


def step_seconds(run: TrainConfig, dtype: str, device: torch.device) -> float:
    """The best of some steps of one sequence, within TRIAL_SECONDS after the first."""
    step = Step(run.model, 1, run.model.context_length, getattr(torch, dtype), device, optimizer=run.optimizer)
    step()
    times: list[float] = []
    while sum(times) < TRIAL_SECONDS and len(times) < 10:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def no_compiler() -> str | None:
    """None where torch.compile works for a CPU, found out by compiling a sum; else what is missing, in a line."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(8))
    except Exception as error:  # whatever it is, eager PyTorch does the same work
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.compile needs a C++ compiler that works ({first})"
    return None


def print_sample(
    config: DemoConfig, run: TrainConfig, tokenizer: Tokenizer, device: torch.device, console: Console
) -> None:
    """Text out: the trained model goes on from the prompt, and what it says is printed as it is made."""
    model: Transformer = load_model(run.out_dir / "checkpoints", device=device)
    ids = tokenizer.encode(config.prompt)
    n_new = min(config.sample_tokens, run.model.context_length - len(ids))
    if n_new > 0:
        drawn = stream(
            model, torch.tensor([ids], device=device), n_new, temperature=0.8, top_p=0.95,
            generator=torch.Generator(device).manual_seed(run.seed),
        )  # fmt: skip
        for piece in pieces(tokenizer, ids, drawn):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def plot_loss(log: Path, picture: Path) -> None:
    """Training and validation loss against step, from the run's JSONL log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        axes.plot(*itertools.zip_longest(*points), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="rooflight demo")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(picture) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def conclude(result: TrainResult, console: Console) -> int:
    """The last line, and whether the loss fell."""
    assert result.val_loss is not None
    assert result.first_val_loss is not None  # the demo always validates
    fell = result.val_loss < result.first_val_loss
    console.print(
        f"Validation loss {result.first_val_loss:.3f} -> {result.val_loss:.3f} nats per token, "
        f"[bold]{result.val_bits_per_byte:.3f} bits per byte[/bold], after {result.step:,} steps "
        f"({result.tokens:,} tokens) in {result.seconds:.0f} s."
    )
    if not fell:
        console.print("[red]The validation loss did not fall.[/red]")
    return 0 if fell else 1
