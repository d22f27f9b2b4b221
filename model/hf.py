"""Hugging Face checkpoints: config.json and safetensors in the Llama layout.

Three of its families are this architecture: "llama", "mistral" (a sliding window) and "qwen3" (q/k norm). Their RoPE
pairs feature i with i + head_dim / 2, as ours does, so weights pass unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import kernels
from .config import ModelConfig
from .transformer import Transformer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Ours, theirs: the same number under two names.
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
OPTIONAL = {"num_key_value_heads", "head_dim", "tie_word_embeddings"}

RENAMED = (
    ("embedding.", "embed_tokens."),
    ("attention_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("attention.", "self_attn."),
    ("ffn.", "mlp."),
)


def _hf_name(name: str) -> str:
    """layers.0.attention.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    for name, unsupported in (
        ("ffn", config.ffn != "swiglu"),
        ("softcap", config.softcap != 0),
        ("window", config.window is not None and config.qk_norm),
    ):
        if unsupported:
            raise ValueError(f"{name}: the Llama layout has no place for {name} = {getattr(config, name)!r}")
    family = "qwen3" if config.qk_norm else "llama" if config.window is None else "mistral"
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if family == "llama":
        fields["mlp_bias"] = False
    if family == "mistral" and config.window is not None:
        fields["sliding_window"] = config.window + 1  # theirs counts the query's own position
    return fields


def _from_hf(fields: dict[str, Any], source: Path) -> ModelConfig:
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"{source}: expected model_type {', '.join(ARCHITECTURES)}, got {family!r}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for name, value, expected in (
        ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(fields.get("attention_bias", False)), False),
        ("mlp_bias", bool(fields.get("mlp_bias", False)), False),
        ("rope_type", rope_type, "default"),
        ("use_sliding_window", bool(fields.get("use_sliding_window", False)), False),
    ):
        if value != expected:
            raise ValueError(f"{source}: {name} {value!r} is not supported, only {expected!r}")
    values = {}
    for ours, theirs in FIELDS.items():
        if fields.get(theirs) is not None:
            values[ours] = fields[theirs]
        elif theirs not in OPTIONAL:
            raise ValueError(f"{source}: {theirs} is missing")
    values["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    values["qk_norm"] = family == "qwen3"
    if family == "mistral" and fields.get("sliding_window") is not None:
        values["window"] = fields["sliding_window"] - 1
    return ModelConfig.from_dict(values)


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything that the checkpoint's files hold, one in memory at a time."""
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text())
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    else:
        files = [directory / WEIGHTS]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; expected the checkpoint's safetensors")
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open is no dict)
                yield name, weights.get_tensor(name)


def load_hf(
    path: str | Path,
    ops: ModuleType = kernels,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a checkpoint directory: config.json, and model.safetensors or the shards that its index lists.

    dtype: of the parameters, whatever the files hold.
    Raises FileNotFoundError on a missing file, ValueError on an architecture that is not ours, and on weights that are
    missing, unknown or of another shape.
    """
    directory = Path(path)
    source = directory / CONFIG
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file; expected a checkpoint directory")
    config = _from_hf(json.loads(source.read_text()), source)
    with torch.device("meta"):
        model = Transformer(config, ops)
    model.to(dtype).to_empty(device=device)
    # a state dict's tensors are the parameters themselves, or rows of them where ours joins matrices
    missing = {_hf_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in _tensors(directory):
        if name in missing:
            parameter = missing.pop(name)
            if parameter.shape != tensor.shape:
                raise ValueError(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}")
            parameter.copy_(tensor)
        # Older files hold the rotation frequencies; tied ones may hold the output matrix too.
        elif not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name == "lm_head.weight"):
            raise ValueError(f"{name}: not a weight of this {config.n_layer}-layer model, but in {directory}")
    if missing:
        raise ValueError(f"{next(iter(missing))}: missing from {directory}, with {len(missing) - 1} more")
    return model


def save_hf(model: Transformer, path: str | Path) -> None:
    """Write config.json and model.safetensors into the directory `path`, made when it does not exist.

    A file is replaced whole or not at all. Raises ValueError on a configuration that the layout cannot hold: a GELU
    FFN, a softcap, a window together with q/k norm.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    fields = _to_hf(model.config) | {"torch_dtype": str(dtypes.pop()).removeprefix("torch.")}
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {_hf_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    partial = directory / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_file(weights, partial, metadata={"format": "pt"})
        _replace(partial, directory / WEIGHTS)
        partial = directory / f".{CONFIG}.{os.getpid()}"
        partial.write_text(json.dumps(fields, indent=2) + "\n")
        _replace(partial, directory / CONFIG)
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, target: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
