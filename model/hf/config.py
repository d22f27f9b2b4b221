"""A ModelConfig as the fields of a Hugging Face config.json, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ModelConfig
from .keys import FAMILIES, read

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
SLIDING, FULL = "sliding_attention", "full_attention"


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json. Raises ValueError naming what no family has a place for."""
    for name, unsupported in (("ffn", config.ffn != "swiglu"), ("softcap", config.softcap != 0)):
        if unsupported:
            raise ValueError(f"{name}: the Llama layout has no place for {name} = {getattr(config, name)!r}")
    # transformers demands of a Llama that n_head divides d_model; a Mistral without a window is the same model
    whole = config.d_model % config.n_head == 0 and config.window is None
    family = "qwen3" if config.qk_norm else "llama" if whole else "mistral"
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if family == "llama":
        fields["mlp_bias"] = False
    else:
        fields["sliding_window"] = None if config.window is None else config.window + 1  # theirs counts the query's own
    if family == "qwen3" and config.window is not None:
        fields |= {"use_sliding_window": True, "max_window_layers": 0, "layer_types": [SLIDING] * config.n_layer}
    return fields


def from_hf(fields: Any, source: Path) -> ModelConfig:
    """The model that config.json (`source`, which holds `fields`) describes. Raises ValueError where it is not ours."""
    model_type, values = read(fields, source)
    if values["hidden_act"] != "silu":
        raise ValueError(f"{source}: hidden_act {values['hidden_act']!r} is not supported, only 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"{source}: {name} {values[name]!r} is not supported, only False")
    found = {ours: values[theirs] for ours, theirs in FIELDS.items() if values[theirs] is not None}
    rope = values["rope_scaling"] or values["rope_parameters"] or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source}: rope_parameters: expected an object, got {rope!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{source}: partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported, only 1.0"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"{source}: rope_type {rope_type!r} is not supported, only 'default'")
    found["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
    found["qk_norm"] = model_type == "qwen3"
    windows = set(_windows(values, source))
    if len(windows) > 1:
        raise ValueError(f"{source}: layer_types {values['layer_types']!r} is not supported, only layers all alike")
    found["window"] = windows.pop()
    return ModelConfig.from_dict(found)


def _windows(values: dict[str, Any], source: Path) -> list[int | None]:
    """Each layer's window, ours: without the query itself."""
    n_layer, size = values["num_hidden_layers"], values.get("sliding_window")
    if not values.get("use_sliding_window", True):
        size = None
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"{source}: sliding_window: expected a whole number >= 1 or null, got {size!r}")
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 0)
        kinds = [SLIDING if size is not None and layer >= first else FULL for layer in range(n_layer)]
    if not isinstance(kinds, list) or len(kinds) != n_layer or not {SLIDING, FULL}.issuperset(kinds):
        raise ValueError(f"{source}: layer_types: expected {n_layer} of {SLIDING} and {FULL}, got {kinds!r}")
    return [size - 1 if kind == SLIDING and size is not None else None for kind in kinds]
