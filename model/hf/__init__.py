"""Hugging Face checkpoints: a folder of config.json and safetensors, in the layout of Llama and its relatives.

keys.py says which families are this architecture and what becomes of every key of config.json. Their RoPE pairs feature
i with i + head_dim / 2, as ours does, so weights pass unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from ... import kernels
from ..config import ModelConfig
from ..transformer import Transformer, unwrapped
from ..typed import typed
from .config import from_hf, to_hf
from .keys import FAMILIES
from .weights import Weights, places, read_json, write, write_json

__all__ = ["is_hf", "load_hf", "read_hf_config", "save_hf"]

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@typed
def load_hf(
    path: str | Path,
    ops: ModuleType | SimpleNamespace = kernels,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a checkpoint directory: config.json, and model.safetensors or the shards that its index lists.

    dtype: of the parameters, whatever the files hold.
    tie_word_embeddings counts only where the files agree: an output matrix of their own is loaded as such.
    Raises FileNotFoundError on a missing file, ValueError on an architecture that is not ours, on weights that are
    missing, unknown or of another shape, and on a damaged file, with its name.
    """
    directory = Path(path)
    model_type, config = from_hf(read_json(directory / CONFIG), directory / CONFIG)
    weights = Weights(directory)
    both = HEAD in weights and EMBEDDING in weights
    if config.tie_embeddings and both and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        config = replace(config, tie_embeddings=False)
    with torch.device("meta"):
        model = Transformer(config, ops)
    model.to(dtype).to_empty(device=device)
    # a state dict's tensors are the parameters themselves, or rows of them where ours joins matrices
    missing = places(model.state_dict(), config.norm_placement, FAMILIES[model_type].joined)
    for name in weights:
        if name in missing:
            ours, theirs = missing.pop(name), weights[name]
            if not theirs.is_floating_point():
                raise ValueError(f"{name}: expected floating-point numbers, got {theirs.dtype}, in {directory}")
            shape = (sum(part.shape[0] for part in ours), *ours[0].shape[1:])
            if shape != theirs.shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(theirs.shape)}")
            for part, rows in zip(ours, theirs.split([part.shape[0] for part in ours]), strict=True):
                part.copy_(rows)
        # Older files hold the rotation frequencies; tied ones may hold the output matrix too.
        elif not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name == HEAD):
            raise ValueError(f"{name}: not a weight of this {config.n_layer}-layer model, but in {directory}")
    if missing:
        raise ValueError(f"{next(iter(missing))}: missing from {directory}, with {len(missing) - 1} more")
    return model


def is_hf(path: str | Path) -> bool:
    """Whether a folder holds a config.json of the kind that load_hf reads."""
    file = Path(path) / CONFIG
    fields = read_json(file) if file.is_file() else None
    return isinstance(fields, dict) and "model_type" in fields


def read_hf_config(path: str | Path) -> ModelConfig:
    """The configuration of the model in a checkpoint directory. Raises as load_hf does."""
    file = Path(path) / CONFIG
    return from_hf(read_json(file), file)[1]


@typed
def save_hf(model: nn.Module, path: str | Path, *, eos_token: int | None = None) -> None:
    """Write config.json and model.safetensors into the directory `path`, made when it does not exist.

    model: a Transformer, or one inside torch.compile or DistributedDataParallel. A file is replaced whole or not at
    all; an index and shards that the folder held are removed. Beside a tokenizer.json that no tokenizer_config.json
    explains, one is written: by the model's type alone, transformers would give a Qwen3 another pattern.
    eos_token: the id that ends a text for transformers' generate; None: none does.
    Raises ValueError before anything is written on another module, and on a configuration that no family can hold.
    """
    plain = _plain(model)
    fields = to_hf(plain.config) | {"torch_dtype": str(plain.output_weight.dtype).removeprefix("torch.")}
    fields |= {"bos_token_id": None, "eos_token_id": eos_token, "pad_token_id": None}  # theirs default to 1 and 2
    ours = places(plain.state_dict(), plain.config.norm_placement, FAMILIES[fields["model_type"]].joined)
    weights = {name: torch.cat(parts) if len(parts) > 1 else parts[0].contiguous() for name, parts in ours.items()}
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory, weights)
    write_json(directory / CONFIG, fields)
    if (directory / TOKENIZER).exists() and not (directory / TOKENIZER_CONFIG).exists():
        write_json(directory / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _plain(model: nn.Module) -> Transformer:
    inner = unwrapped(model)
    if inner is None:
        raise ValueError(f"model: expected a Transformer, got {type(model).__name__}")
    return inner
