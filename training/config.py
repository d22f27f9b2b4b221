"""The configuration of a training run: one frozen, validated dataclass, read from TOML."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..kernels.reference import FP8_MULTIPLE
from ..model import ModelConfig, preset
from ..model.typed import typed
from .data import ORDERS
from .optim import OPTIMIZERS
from .optim.schedule import lr_factor
from .pretrained import read_config

DTYPES = ("float32", "bfloat16")
KERNELS = ("auto", "triton", "eager")
PARALLEL = ("none", "ddp", "fsdp")

_COUNTS = (
    "batch_size", "gradient_accumulation", "max_steps", "eval_every", "eval_batches",
    "checkpoint_every", "keep_checkpoints", "log_every",
)  # fmt: skip
# What a resumed run may do otherwise than it began; every other option decides what it learns, and is refused.
MAY_CHANGE = frozenset((
    "train_data", "val_data", "out_dir",  # where they lie: their tokenizer and train_data's size must be the same
    "batch_size", "gradient_accumulation", "max_steps", "max_seconds",
    "lr", "muon_lr", "muon_momentum", "betas", "weight_decay", "schedule", "warmup", "decay", "min_lr_ratio",
    "grad_clip", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "async_checkpoints",
    "log_every", "tensorboard", "wandb", "dtype", "device", "compile", "checkpointing", "kernels", "peak_flops",
    "resume", "overwrite",
    "cuda_graph", "init_from", "parallel", "reshard", "fp8",
))  # fmt: skip
_FP8_ROWS = f"false unless a micro-batch has a multiple of {FP8_MULTIPLE} tokens, of which it has {{}}"
_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}
_TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    Data and model
        train_data              token files to train on: x.bin beside x.bin.json, as `tokenizer encode` writes them, or
                                a folder of such shards; several in a list; in a table path = weight, each has that
                                share of the windows
        val_data                token file or folder to validate on; None: no validation
        order                   "random": windows begin anywhere; "epochs": each of the windows that stand one after
                                another is seen once an epoch, in an order by seed and epoch
        documents               attention and positions begin anew with each document, and nothing predicts its first
                                token; else a window is one text
        eod                     id of the token that ends documents, where the token files do not say it
        out_dir                 folder that receives config.json, log.jsonl and checkpoints/
        batch_size              sequences of model.context_length per optimizer step, of all processes together
        gradient_accumulation   micro-batches that a step's batch is split into; divides batch_size
    Length: the run ends with whichever comes first, and its schedule with it
        max_steps               optimizer steps
        max_seconds             seconds of training, evaluation and checkpoints included, compilation not, summed over
                                resumes
    Optimization
        optimizer               "muon" (hidden matrices; AdamW for the rest) or "adamw" (for all)
        lr                      AdamW's peak learning rate, per step
        muon_lr                 Muon's peak learning rate, per step
        muon_momentum           Muon's momentum, in [0, 1)
        betas                   AdamW's two decay rates of its moments, each in [0, 1)
        weight_decay            decoupled decay of matrices and embeddings, times the learning rate; norms have none
        schedule                "trapezoid", "cosine" or "constant", of progress in [0, 1]
        warmup                  fraction of the run that the learning rate rises over, linearly
        decay                   fraction of the run that the trapezoid falls over at its end, linearly
        min_lr_ratio            the last learning rate over the peak
        grad_clip               largest global 2-norm of the gradients; None: no clipping
    Observation
        eval_every              steps between validations, besides one before the first step and one after the last
        eval_batches            batches per validation, spread over the file; None: the whole file
        checkpoint_every        steps between checkpoints; there is always one after the last step
        keep_checkpoints        checkpoints to keep, the latest
        async_checkpoints       write them while the run goes on, from a copy of their tensors in the host's memory
        log_every               steps between log records; the only steps that wait for the device
        tensorboard             the records to TensorBoard too, in out_dir/tensorboard; needs the package tensorboard
        wandb                   a project of Weights & Biases that gets the records too; needs the package wandb
    Execution
        dtype                   "float32", or "bfloat16" by torch.autocast (parameters and their updates stay float32)
        fp8                     multiply the blocks' matrices in fp8 (e4m3, gradients e5m2, a scale for each tensor);
                                not in validation; on a GPU of compute capability 8.9 or later, and slowly on a CPU
        device                  "auto" (CUDA when there is one), or a torch device
        compile                 torch.compile the model
        cuda_graph              on a GPU, replay a captured step: the host then costs no time
        checkpointing           recompute each block's activations in the backward pass instead of keeping them
        kernels                 "triton", "eager" (the oracle), or "auto": Triton on CUDA, else the fastest eager path
        peak_flops              FLOP/s that MFU is held against; None: measured by a short GEMM
        parallel                what the processes of torchrun share, each with its rows of the batch: "none", so that
                                there may be but one; "ddp", gradients, averaged; "fsdp", parameters and optimizer too
        reshard                 with "fsdp", gather a block's parameters again in the backward pass instead of keeping
                                them
        seed                    of initialisation and batches, below 2^64
        resume                  go on from out_dir's latest whole checkpoint, if there is one
        overwrite               begin anew in an out_dir that holds something, which moves to out_dir/previous-<n>
        init_from               begin with the weights of this checkpoint, run or Hugging Face folder; its model too,
                                where `model` says nothing, or but some of its fields (another context_length, say)
    A resumed run has the model, optimizer, seed, order and documents, and train_data the tokens, that it began with;
    MAY_CHANGE lists what may be another, and the run says what is.
    Raises ValueError on a value out of range.
    """

    model: ModelConfig
    train_data: Path | list[Path] | dict[str, float]
    val_data: Path | None = None
    order: str = "random"
    documents: bool = False
    eod: int | None = None
    out_dir: Path
    batch_size: int = 32
    gradient_accumulation: int = 1

    max_steps: int = 1000
    max_seconds: float | None = None

    optimizer: str = "muon"
    lr: float = 3e-3
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    schedule: str = "trapezoid"
    warmup: float = 0.02
    decay: float = 0.5
    min_lr_ratio: float = 0.0
    grad_clip: float | None = 1.0

    eval_every: int = 250
    eval_batches: int | None = None
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    async_checkpoints: bool = False
    log_every: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    dtype: str = "bfloat16"
    fp8: bool = False
    device: str = "auto"
    compile: bool = False
    cuda_graph: bool = True
    checkpointing: bool = False
    kernels: str = "auto"
    peak_flops: float | None = None
    parallel: str = "none"
    reshard: bool = True
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    init_from: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_data", self._train_data())
        for name in ("val_data", "out_dir", "init_from"):  # strings are welcome; TOML has nothing else
            value, optional = getattr(self, name), name in ("val_data", "init_from")
            self._require(name, _is_path(value) or (optional and value is None), "a path")
            if value is not None:
                object.__setattr__(self, name, Path(value))
        if not isinstance(self.betas, list | tuple) or not all(isinstance(b, int | float) for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        self._check_types()
        for name in _COUNTS:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        self._require(
            "gradient_accumulation",
            self.batch_size % self.gradient_accumulation == 0,
            f"a divisor of batch_size {self.batch_size}",
        )
        for name in ("lr", "muon_lr", "max_seconds", "grad_clip", "peak_flops"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "positive and finite")
        self._require("seed", 0 <= self.seed < 2**64, "at least 0 and below 2^64")
        self._require("overwrite", not (self.overwrite and self.resume), "false where resume is true")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite")
        self._require("muon_momentum", 0 <= self.muon_momentum < 1, "in [0, 1)")
        self._require("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._require("order", self.order in ORDERS, f"one of {', '.join(ORDERS)}")
        self._require("eod", self.eod is None or self.eod >= 0, "an id, at least 0")
        self._require("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        if self.dtype == "float16":
            raise ValueError(
                "dtype float16 would need loss scaling to train; use bfloat16, which every GPU since sm_80 has"
            )
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._require("kernels", self.kernels in KERNELS, f"one of {', '.join(KERNELS)}")
        self._require("parallel", self.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}")
        self._require("fp8", not (self.fp8 and self.parallel != "none"), 'false unless parallel is "none"')
        rows = self.batch_size // self.gradient_accumulation * self.model.context_length
        self._require("fp8", not self.fp8 or rows % FP8_MULTIPLE == 0, _FP8_ROWS.format(rows))
        self.lr_factor(0.0)  # checks schedule, warmup, decay and min_lr_ratio

    def _train_data(self) -> Path | list[Path] | dict[str, float]:
        given: Any = self.train_data
        if isinstance(given, dict):
            weights = all(isinstance(w, int | float) and not isinstance(w, bool) for w in given.values())
            paths = all(_is_path(path) for path in given)
            fits = weights and paths and len(given) > 0 and all(0 < w < math.inf for w in given.values())
            self._require("train_data", fits, "a table of paths and their weights, positive and finite")
            return {str(path): float(weight) for path, weight in given.items()}
        several = given if isinstance(given, list | tuple) else [given]
        fits = len(several) > 0 and all(_is_path(path) for path in several)
        self._require("train_data", fits, "a path, a list of paths or a table of paths and weights")
        return [Path(path) for path in several] if len(several) > 1 else Path(several[0])

    def _check_types(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise ValueError(
                f"model must be a ModelConfig, got {type(self.model).__name__}; in TOML, a table [model] of its fields "
                "or of a preset's name"
            )
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            expected = str(option.type).removesuffix(" | None")
            if expected not in _TYPES or (value is None and option.type != expected):
                continue
            # bool is an int to Python, but `seed = true` is a mistake
            matches = isinstance(value, _TYPES[expected]) and isinstance(value, bool) == (expected == "bool")
            self._require(option.name, matches, _TYPE_NAMES[expected])

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def lr_factor(self, progress: float) -> float:
        """The schedule's factor on the learning rates at `progress` in [0, 1]."""
        return lr_factor(
            progress, schedule=self.schedule, warmup=self.warmup, decay=self.decay, min_ratio=self.min_lr_ratio
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as for JSON; `from_dict` reads it back."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        if isinstance(self.train_data, list):
            values["train_data"] = [str(path) for path in self.train_data]
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    def changes_since(self, began: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Options that differ from those of `began`, a to_dict(): name to (then, now). One that it lacks is the same.

        Raises ValueError on one that is not in MAY_CHANGE.
        """
        now = self.to_dict()
        changed = {k: (began[k], now[k]) for k in now if k in began and began[k] != now[k]}
        for name, (then, value) in changed.items():
            if name not in MAY_CHANGE:
                raise ValueError(f"{name} must stay {then!r} as the run began, got {value!r}")
        return changed

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """A TrainConfig from plain values; `model` is a table of its fields, where `preset` names one
        of PRESETS to start from. "none" is None where that has a meaning.

        Raises ValueError on an unknown or missing name, or a value out of range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"values: expected a table of the options, got {values!r}")
        values = dict(values)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            near = get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected some of {', '.join(known)}"
            raise ValueError(f"unknown training options: {', '.join(unknown)}{hint}")
        for option in dataclasses.fields(cls):  # TOML and a command line have no null
            if values.get(option.name) == "none" and "None" in str(option.type):
                values[option.name] = None
        table = values.get("model") or {}
        if values.get("init_from") is not None and isinstance(table, dict) and "preset" not in table:
            values["model"] = read_config(values["init_from"]).to_dict() | table
        if isinstance(values.get("model"), dict):
            values["model"] = model_config(values["model"])
        missing = [
            f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and values.get(f.name) is None
        ]
        if missing:
            raise ValueError(f"missing training options: {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """A TrainConfig from a TOML file, with the overrides that are not None.

        Paths are relative to the working directory.
        Raises FileNotFoundError, or ValueError on TOML that cannot be read or values that from_dict refuses.
        """
        return cls.from_dict(read_toml(path) | {k: v for k, v in overrides.items() if v is not None})


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path) and value != ""  # which Path takes for the current folder


@typed
def read_toml(path: str | Path) -> dict[str, Any]:
    """The plain values of a TOML file. Raises FileNotFoundError, or ValueError on TOML that cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training configuration at {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def model_config(values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from a [model] table: its fields, over those of the preset that the key `preset` names, if any.

    Raises ValueError on an unknown preset or field, or a value out of range.
    """
    fields = {k: None if v == "none" else v for k, v in values.items() if k != "preset"}
    if "preset" not in values:
        return ModelConfig.from_dict(fields)
    return ModelConfig.from_dict(preset(values["preset"]).to_dict() | fields)
